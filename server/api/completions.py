"""POST /v1/completions."""

import time
import uuid
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from server.api.chat import finite
from server.api.choice import Delta, Plan, Target
from server.api.detokenizer import Detokenizer
from server.api.generation import Generation, respond
from server.api.schemas import CompletionBody
from server.api.services import Services, read_json, services_of
from server.api.tokenizer import TextCodec
from server.engine.messages import TokenLogprobs
from server.errors import bad_request

_DEFAULT_MAX_TOKENS = 16  # OpenAI's

_encode = msgspec.json.encode


async def completions(request: Request) -> Response:
    """Go on from each prompt, `n` times over. Choice `i` goes on from prompt `i // n`."""
    services = services_of(request)
    body = await read_json(request, CompletionBody)
    body.check()
    plan = partial(_plan, services, body)
    writer = partial(CompletionWriter, services, body)
    return await respond(request, body, body.n * len(body.prompt), plan, writer)


async def _plan(services: Services, body: CompletionBody, target: Target) -> list[Plan]:
    info = target.limits(services.engine.info)
    plans = []
    for prompt in body.prompt:
        prompt_ids = await _encode_prompt(services, prompt)
        plans += [
            Plan(
                prompt_ids=prompt_ids,
                sampling=body.sampling(
                    info,
                    len(prompt_ids),
                    max_tokens=body.max_tokens,
                    fill=_DEFAULT_MAX_TOKENS,
                    num_logprobs=body.logprobs,
                    num_prompt_logprobs=body.logprobs if body.echo else None,
                    seed_offset=index,
                ),
                stops=body.stop,
            )
            for index in range(body.n)
        ]
    return plans


async def _encode_prompt(services: Services, prompt: str | list[int]) -> list[int]:
    if isinstance(prompt, str):
        prompt_ids = await services.codec.run(len(prompt), services.codec.encode, prompt)
        if not prompt_ids:
            raise bad_request("The prompt has no tokens.", param="prompt")
        return prompt_ids
    vocab_size = services.engine.info.vocab_size
    if max(prompt) >= vocab_size:
        raise bad_request(
            f"The prompt holds the token id {max(prompt)}; the vocabulary ends at "
            f"{vocab_size - 1}.",
            param="prompt",
        )
    return prompt


class CompletionWriter:
    """Writes deltas as text_completion chunks or one text_completion."""

    def __init__(self, services: Services, body: CompletionBody, generation: Generation) -> None:
        assert generation.target is not None, "begun"
        self._generation = generation
        self._codec = services.codec
        self._echo = body.echo
        self._wants_usage = body.wants_usage
        self._logprobs = (
            None
            if body.logprobs is None
            else [
                LogprobWriter(services.codec, () if body.echo else choice.prompt_ids)
                for choice in generation.choices
            ]
        )
        self._begun: set[int] = set()
        self._identity = {
            "id": f"cmpl-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": generation.target.model,
            "system_fingerprint": generation.target.fingerprint(services.engine.info),
        }
        self._head = b"data: " + _encode(self._identity)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if self._wants_usage else b"]}\n\n"

    def event(self, delta: Delta) -> bytes:
        """One chunk, with the prompt before the first text if it is to be echoed."""
        text, logprobs = self._part(delta)
        if not text and logprobs is None and delta.finish_reason is None:
            return b""
        return b'%s{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s}%s' % (
            self._head, delta.index, _encode(text), _encode(logprobs), _encode(delta.finish_reason),
            self._tail,
        )  # fmt: skip

    def last_event(self) -> bytes:
        """The usage, if asked for."""
        if not self._wants_usage:
            return b""
        return self._head + b'],"usage":' + _encode(self._generation.usage()) + b"}\n\n"

    def whole(self, deltas: Iterable[Delta]) -> bytes:
        """One text_completion."""
        choices: list[dict[str, Any]] = [
            {"index": index, "text": [], "logprobs": None, "finish_reason": None}
            for index in range(len(self._generation.choices))
        ]
        for delta in deltas:
            choice = choices[delta.index]
            text, logprobs = self._part(delta)
            choice["text"].append(text)
            choice["finish_reason"] = delta.finish_reason
            if logprobs is not None:
                choice["logprobs"] = _joined(choice["logprobs"], logprobs)
        for choice in choices:
            choice["text"] = "".join(choice["text"])
        reply = {**self._identity, "choices": choices, "usage": self._generation.usage()}
        return _encode(reply)

    def _part(self, delta: Delta) -> tuple[str, dict[str, list[Any]] | None]:
        """The delta's text and logprobs, those of an echoed prompt included."""
        text, writer = delta.text, self._logprobs[delta.index] if self._logprobs else None
        logprobs = None
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            if self._echo:
                prompt_ids = self._generation.choices[delta.index].prompt_ids
                text = self._codec.decode(prompt_ids) + text
                if writer is not None:
                    logprobs = writer.write(prompt_ids, delta.prompt_logprobs or [])
        if writer is not None and delta.token_ids:
            logprobs = _joined(logprobs, writer.write(delta.token_ids, delta.logprobs or []))
        return text, logprobs


class LogprobWriter:
    """Writes one choice's logprobs as completions have them; keeps count of characters."""

    def __init__(self, codec: TextCodec, before: Sequence[int]) -> None:
        """`before` is what stands before the text: the prompt, or nothing if it is echoed."""
        self._codec = codec
        self._detokenizer = Detokenizer(codec, before, (), 0)
        self._offset = 0  # in characters: where the next token's text begins

    def write(
        self, token_ids: Sequence[int], given: Sequence[TokenLogprobs | None]
    ) -> dict[str, list[Any]]:
        """The next tokens; one without logprobs (a prompt's first) has null."""
        offsets = []
        for token_id in token_ids:
            offsets.append(self._offset)
            self._offset += len(self._detokenizer.feed((token_id,)))
        return {
            "tokens": [self._codec.text_of(token_id) for token_id in token_ids],
            "token_logprobs": [each and finite(each.logprob) for each in given],
            "top_logprobs": [
                each and self._top(token_id, each)
                for token_id, each in zip(token_ids, given, strict=True)
            ],
            "text_offset": offsets,
        }

    def _top(self, token_id: int, given: TokenLogprobs) -> dict[str, float]:
        """The alternatives by text, and the token itself whether it is among them or not."""
        top = zip(given.top_ids, given.top_logprobs, strict=True)
        return {self._codec.text_of(other): finite(logprob) for other, logprob in top} | {
            self._codec.text_of(token_id): finite(given.logprob)
        }


def _joined(
    before: dict[str, list[Any]] | None, after: dict[str, list[Any]]
) -> dict[str, list[Any]]:
    if before is None:
        return after
    return {name: before[name] + values for name, values in after.items()}
