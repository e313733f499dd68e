"""POST /v1/chat/completions."""

import time
import uuid
from collections.abc import Iterable
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from server.api.choice import Delta, Plan, Target
from server.api.generation import Generation, respond
from server.api.schemas import ChatBody
from server.api.services import Services, read_json, services_of
from server.api.tokenizer import TextCodec
from server.engine.messages import TokenLogprobs
from server.engine.request import FinishReason

_LEAST_LOGPROB = -9999.0  # what OpenAI writes for minus infinity, which JSON does not have

_encode = msgspec.json.encode


async def chat_completions(request: Request) -> Response:
    """Answer a chat with one message for each choice."""
    services = services_of(request)
    body = await read_json(request, ChatBody)
    body.check()
    plan = partial(_plan, services, body)
    return await respond(request, body, body.n, plan, partial(ChatWriter, services, body))


async def _plan(services: Services, body: ChatBody, target: Target) -> list[Plan]:
    messages = [message.for_template() for message in body.messages]
    num_chars = sum(len(message["content"]) for message in messages)
    if target.chat_template is not None:
        num_chars += 1 << 20  # an upload's template may take its time: never on the event loop
    prompt_ids = await services.codec.run(
        num_chars, services.codec.encode_chat, messages, template=target.chat_template
    )
    num_logprobs = (body.top_logprobs or 0) if body.logprobs else None
    info = target.limits(services.engine.info)
    return [
        Plan(
            prompt_ids=prompt_ids,
            sampling=body.sampling(
                info,
                len(prompt_ids),
                max_tokens=body.token_limit,
                fill=None,
                num_logprobs=num_logprobs,
                seed_offset=index,
            ),
            stops=body.stop,
        )
        for index in range(body.n)
    ]


class ChatWriter:
    """Writes deltas as chat chunks or one chat completion.

    The head of a chunk never changes within a request, so it is encoded once.
    """

    def __init__(self, services: Services, body: ChatBody, generation: Generation) -> None:
        assert generation.target is not None, "begun"
        self._codec = services.codec
        self._generation = generation
        self._wants_usage = body.wants_usage
        self._wants_logprobs = body.logprobs
        self._begun: set[int] = set()
        self._identity = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": generation.target.model,
            "system_fingerprint": generation.target.fingerprint(services.engine.info),
        }
        head = _encode({**self._identity, "object": "chat.completion.chunk"})[:-1]
        self._head = b"data: " + head + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if self._wants_usage else b"]}\n\n"

    def event(self, delta: Delta) -> bytes:
        """One write: the role before the first text, the finish reason after the last."""
        events = b""
        if delta.index not in self._begun:
            self._begun.add(delta.index)
            first = b'{"role":"assistant","content":"","refusal":null}'
            events = self._chunk(delta.index, first, b"null", None)
        logprobs = self._logprobs(delta)
        if delta.text or logprobs is not None:
            content = b'{"content":' + _encode(delta.text) + b"}"
            events += self._chunk(delta.index, content, _encode(logprobs), None)
        if delta.finish_reason is not None:
            events += self._chunk(delta.index, b"{}", b"null", delta.finish_reason)
        return events

    def last_event(self) -> bytes:
        """The usage, if asked for."""
        if not self._wants_usage:
            return b""
        return self._head + b'],"usage":' + _encode(self._generation.usage()) + b"}\n\n"

    def whole(self, deltas: Iterable[Delta]) -> bytes:
        """One chat completion."""
        choices = [self._choice(index) for index in range(len(self._generation.choices))]
        texts: list[list[str]] = [[] for _ in choices]
        for delta in deltas:
            choice = choices[delta.index]
            texts[delta.index].append(delta.text)
            if (logprobs := self._logprobs(delta)) is not None:
                choice["logprobs"]["content"].extend(logprobs["content"])
            choice["finish_reason"] = delta.finish_reason
        for choice, text in zip(choices, texts, strict=True):
            choice["message"]["content"] = "".join(text)
        reply = {
            **self._identity,
            "object": "chat.completion",
            "choices": choices,
            "usage": self._generation.usage(),
        }
        return _encode(reply)

    def _chunk(
        self, index: int, delta: bytes, logprobs: bytes, finish_reason: FinishReason | None
    ) -> bytes:
        reason = b"null" if finish_reason is None else b'"' + finish_reason.encode() + b'"'
        return b'%s{"index":%d,"delta":%s,"logprobs":%s,"finish_reason":%s}%s' % (
            self._head, index, delta, logprobs, reason, self._tail,
        )  # fmt: skip

    def _choice(self, index: int) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": "",
            "refusal": None,
            "annotations": [],
        }
        logprobs: dict[str, Any] = {"content": [], "refusal": None}
        return {
            "index": index,
            "message": message,
            "logprobs": logprobs if self._wants_logprobs else None,
            "finish_reason": None,
        }

    def _logprobs(self, delta: Delta) -> dict[str, Any] | None:
        if not self._wants_logprobs or not delta.token_ids:
            return None
        given = delta.logprobs or []
        entries = [
            token_logprob(self._codec, token_id, each.logprob)
            | {"top_logprobs": top_logprobs(self._codec, each)}
            for token_id, each in zip(delta.token_ids, given, strict=True)
        ]
        return {"content": entries, "refusal": None}


def token_logprob(codec: TextCodec, token_id: int, logprob: float) -> dict[str, Any]:
    """One token as chat's logprobs show it."""
    return {
        "token": codec.text_of(token_id),
        "logprob": finite(logprob),
        "bytes": list(codec.piece(token_id)),
    }


def top_logprobs(codec: TextCodec, given: TokenLogprobs) -> list[dict[str, Any]]:
    """The alternatives, most likely first."""
    return [
        token_logprob(codec, token_id, logprob)
        for token_id, logprob in zip(given.top_ids, given.top_logprobs, strict=True)
    ]


def finite(logprob: float) -> float:
    """A logprob that JSON can hold."""
    return max(logprob, _LEAST_LOGPROB)
