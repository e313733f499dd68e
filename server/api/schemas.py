"""Request bodies: every field with its bounds, and every refusal with the field's name."""

import math
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from server.api.parsing import StrictBody
from server.api.unserved import UNSERVED_IN_CHAT, UNSERVED_IN_COMPLETIONS, UNSERVED_IN_MESSAGES
from server.engine.messages import EngineInfo
from server.engine.request import SamplingParams
from server.errors import bad_request

MAX_CHOICES = 16  # `n`
MAX_PROMPTS = 256  # in one completions request
MAX_MESSAGES = 4096
MAX_STOPS = 16
MAX_STOP_CHARS = 256
MAX_LOGPROBS = 20
MAX_BIASES = 1024
INT32_MAX, INT64_MAX = 2**31 - 1, 2**63 - 1


def _as_stops(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _token_ids(values: list[Any]) -> list[int]:
    if any(type(value) is not int or not 0 <= value <= INT32_MAX for value in values):
        raise PydanticCustomError("token_ids", "token ids must be integers, 0 or more")
    return values


def _as_prompts(value: Any) -> list[str | list[int]]:
    """A string, strings, token ids, or lists of token ids; always a list of prompts at the end."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise PydanticCustomError(
            "prompt", "must be a string, a list of strings, token ids, or lists of token ids"
        )
    if type(value[0]) is int:
        return [_token_ids(value)]
    if len(value) > MAX_PROMPTS:
        raise PydanticCustomError(
            "prompt",
            "holds {given} prompts; the limit is {limit}",
            {"given": len(value), "limit": MAX_PROMPTS},
        )
    if all(isinstance(prompt, str) for prompt in value):
        return value
    if all(isinstance(prompt, list) and prompt for prompt in value):
        return [_token_ids(prompt) for prompt in value]
    raise PydanticCustomError("prompt", "must not mix strings and token ids, nor hold an empty one")


def _as_text(value: Any) -> str:
    """A message's content, its text parts joined by line breaks."""
    if isinstance(value, str):
        return value
    if value is None:
        return ""
    if not isinstance(value, list):
        raise PydanticCustomError("content", "must be a string or a list of text parts")
    if len(value) > MAX_MESSAGES:
        raise PydanticCustomError("content", "holds too many parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            shown = kind[:64] if isinstance(kind, str) else "none"
            raise PydanticCustomError(
                "content", "holds a part of type {kind}; only text is served", {"kind": shown}
            )
        if set(part) != {"type", "text"} or not isinstance(part["text"], str):
            raise PydanticCustomError("content", "text parts have `type` and `text`, a string")
        texts.append(part["text"])
    return "\n".join(texts)


class Message(StrictBody):
    """One turn of a chat."""

    unserved = UNSERVED_IN_MESSAGES

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_as_text)]
    name: Annotated[str, Field(min_length=1, max_length=64)] | None = None

    def for_template(self) -> dict[str, str]:
        """As chat templates know it: they have no developer."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": self.content}
        return message if self.name is None else message | {"name": self.name}


def _as_message(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    for name, harmless in UNSERVED_IN_MESSAGES.items():
        if name in value and value[name] is not None and value[name] not in harmless:
            raise PydanticCustomError("unserved", "{name} is not supported", {"name": name})
    kept = {key: item for key, item in value.items() if key not in UNSERVED_IN_MESSAGES}
    if kept.get("content") is None and kept.get("role") != "assistant":
        raise PydanticCustomError("content", "content is required")
    return {"content": None} | kept


class StreamOptions(StrictBody):
    """What a stream carries besides its text."""

    include_usage: bool = False
    include_obfuscation: Literal[False] = False
    continuous_usage_stats: Literal[False] = False


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: item for key, item in value.items() if item is not None}
    return value


class SamplingBody(StrictBody):
    """The fields that chat and completions share."""

    model: str = Field(min_length=1, max_length=256)
    max_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=INT32_MAX)
    min_p: float = Field(0.0, ge=0, le=1)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    best_of: int | None = None
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(
        default_factory=dict, max_length=MAX_BIASES
    )
    seed: int | None = Field(None, ge=-INT64_MAX - 1, le=INT64_MAX)
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]],
        Field(max_length=MAX_STOPS),
        BeforeValidator(_as_stops),
    ] = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=MAX_STOPS * 4)
    min_tokens: int = Field(0, ge=0, le=INT32_MAX)
    ignore_eos: bool = False
    stream: bool = False
    stream_options: Annotated[StreamOptions, BeforeValidator(_without_nulls)] | None = None
    user: str | None = Field(None, max_length=512)

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """What pydantic cannot say of one field alone. Raises ServeError."""
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options is only for stream=true.", param="stream_options")
        if self.best_of is not None and self.best_of != self.n:
            raise bad_request(
                f"best_of is {self.best_of} and n is {self.n}; best_of is not supported.",
                param="best_of",
                code="unsupported_parameter",
            )

    def sampling(
        self, info: EngineInfo, num_prompt_tokens: int, *, max_tokens: int | None, fill: int | None,
        num_logprobs: int | None, num_prompt_logprobs: int | None = None, seed_offset: int = 0,
    ) -> SamplingParams:  # fmt: skip
        """One choice in the engine's terms. `fill` is max_tokens' default, None what remains.

        Raises ServeError for a request that cannot fit, and for ids the vocabulary does not hold.
        """
        max_tokens = _fit(info, num_prompt_tokens, max_tokens, fill)
        if self.min_tokens > max_tokens:
            raise bad_request(
                f"min_tokens is {self.min_tokens}, more than max_tokens ({max_tokens}).",
                param="min_tokens",
            )
        seed = None if self.seed is None else _wrap_int64(self.seed + seed_offset)
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            repetition_penalty=self.repetition_penalty,
            logit_bias=_biases(self.logit_bias, info.vocab_size),
            seed=seed,
            stop_token_ids=_in_vocabulary(self.stop_token_ids, info.vocab_size),
            min_tokens=self.min_tokens,
            ignore_eos=self.ignore_eos,
            logprobs=num_logprobs,
            prompt_logprobs=num_prompt_logprobs,
        )


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    unserved = UNSERVED_IN_CHAT

    messages: list[Annotated[Message, BeforeValidator(_as_message)]] = Field(
        min_length=1, max_length=MAX_MESSAGES
    )
    max_completion_tokens: int | None = Field(None, ge=1, le=INT32_MAX)
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @property
    def token_limit(self) -> int | None:
        """`max_completion_tokens`, or `max_tokens`, its older name."""
        return self.max_completion_tokens or self.max_tokens

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs needs logprobs=true.", param="top_logprobs")
        if None not in (self.max_tokens, self.max_completion_tokens) and (
            self.max_tokens != self.max_completion_tokens
        ):
            raise bad_request(
                "max_tokens and max_completion_tokens name one limit; they differ.",
                param="max_tokens",
            )


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    unserved = UNSERVED_IN_COMPLETIONS

    prompt: Annotated[list[Any], BeforeValidator(_as_prompts)]  # of str, or of list[int]
    max_tokens: int | None = Field(None, ge=0, le=INT32_MAX)
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False

    def check(self) -> None:
        super().check()
        if self.max_tokens == 0 and not self.echo:
            raise bad_request(
                "max_tokens is 0, which leaves nothing to answer without echo=true.",
                param="max_tokens",
            )


class TokenizeBody(StrictBody):
    """POST /tokenize: a prompt, or a chat."""

    model: str | None = Field(None, min_length=1, max_length=256)
    prompt: str | None = None
    messages: list[Annotated[Message, BeforeValidator(_as_message)]] | None = Field(
        None, min_length=1, max_length=MAX_MESSAGES
    )
    add_special_tokens: bool | None = None  # true for a prompt, false for a chat
    add_generation_prompt: bool = True
    return_token_strs: bool = False


class DetokenizeBody(StrictBody):
    """POST /detokenize."""

    model: str | None = Field(None, min_length=1, max_length=256)
    tokens: Annotated[list[int], BeforeValidator(lambda v: _token_ids(v) if type(v) is list else v)]


class LoadLoraBody(StrictBody):
    """POST /v1/load_lora_adapter, as vLLM's controllers send it."""

    lora_name: str = Field(max_length=256)
    lora_path: str = Field(max_length=4096)
    load_inplace: bool = False


class UnloadLoraBody(StrictBody):
    """POST /v1/unload_lora_adapter."""

    lora_name: str = Field(max_length=256)
    lora_int_id: int | None = None  # vLLM's own number, which its controllers may send; not used


class PushBody(StrictBody):
    """POST /v1/adapters with a folder."""

    name: str = Field(max_length=256)
    path: str = Field(min_length=1, max_length=4096)
    publish: bool = True
    preload: bool = False  # bring it into the bank too
    allow_mismatch: bool = False  # take it though turnout.json names another base or template


class FormBody(StrictBody):
    """POST /v1/adapters with an upload: the fields beside the files."""

    name: str = Field(max_length=256)
    publish: bool = True
    preload: bool = False
    allow_mismatch: bool = False


class PublishBody(StrictBody):
    """POST /v1/adapters/{name}/publish."""

    revision: int = Field(ge=1, le=INT32_MAX)


def _fit(info: EngineInfo, num_prompt: int, max_tokens: int | None, fill: int | None) -> int:
    remaining = info.max_model_len - num_prompt
    least = 1 if max_tokens is None else max_tokens
    if least > remaining:
        needed = num_prompt + least
        raise bad_request(
            f"Prompt and completion need {needed} tokens ({num_prompt} in the prompt); "
            f"the limit is {info.max_model_len}.",
            param="messages" if fill is None else "prompt",
            code="context_length_exceeded",
        )
    if max_tokens is not None:
        return max_tokens
    return remaining if fill is None else min(fill, remaining)


def _biases(given: dict[str, float], vocab_size: int) -> dict[int, float]:
    biases = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 9 and int(key) < vocab_size):
            raise bad_request(
                f"logit_bias names {key[:32]!r}, not a token id below {vocab_size}.",
                param="logit_bias",
            )
        assert math.isfinite(bias), "bounded above"
        biases[int(key)] = bias
    return biases


def _in_vocabulary(token_ids: list[int], vocab_size: int) -> tuple[int, ...]:
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise bad_request(
                f"stop_token_ids holds {token_id}, not a token id below {vocab_size}.",
                param="stop_token_ids",
            )
    return tuple(token_ids)


def _wrap_int64(value: int) -> int:
    return (value + INT64_MAX + 1) % 2**64 - INT64_MAX - 1
