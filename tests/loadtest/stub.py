"""A server whose latencies, refusals, cuts and lies are known, because the test chose them."""

import asyncio
import contextlib
import json
import threading
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

BASE = "stub-base"


@dataclass(kw_only=True)
class Behaviour:
    """How one model is answered."""

    ttft_s: float = 0.0
    gap_s: float = 0.0
    status: int = 200
    code: str = "tenant_overloaded"  # of an error
    refuse_every: int = 0  # the status, every so many requests only; 0: always
    cut_after: int | None = None  # the connection breaks after so many tokens
    error_after: int | None = None  # an error event comes after so many tokens
    short_by: int = 0  # tokens fewer than asked for
    digest: str | None = None  # sent as x-adapter-digest
    path: str | None = "adapter"
    tier: str | None = "gpu"
    adapter_id: str | None = None
    word: str = "word"  # the text is this word over and over
    loaded_word: str | None = None  # another word while more than one request is under way
    cached_tokens: int = 0
    closes: bool = False  # the connection after each reply
    per_request_s: float = 0.0  # requests are served one after the other, each taking so long


@dataclass
class Stub:
    """The server; `seen` holds every body that was posted, `headers` their headers."""

    default: Behaviour = field(default_factory=Behaviour)
    models: dict[str, Behaviour] = field(default_factory=dict)
    registry: dict[str, list[str]] | None = None  # digests of each adapter's revisions
    listed: list[dict[str, Any]] = field(default_factory=list)  # by /v1/models
    seen: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    pushed: dict[str, dict[str, bytes]] = field(default_factory=dict)  # files by name
    url: str = ""
    most_at_once: int = 0
    _under_way: int = 0
    _counts: Counter[str] = field(default_factory=Counter)
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    def clear(self) -> None:
        self.seen.clear()
        self.headers.clear()
        self.most_at_once = 0

    async def answer_route(self, request: Request) -> Response:
        body = await request.json()
        self.seen.append(body)
        assert request.client is not None
        self.headers.append({**request.headers, "x-port": str(request.client.port)})
        model = body["model"]
        behaviour = self.models.get(model, self.default)
        self._counts[model] += 1
        if self._refuses(behaviour, model):
            error = {"message": "no", "type": "X", "param": None, "code": behaviour.code}
            return JSONResponse({"error": error}, behaviour.status, {"retry-after": "1"})
        is_chat = request.url.path.endswith("chat/completions")
        return StreamingResponse(
            self._stream(behaviour, body, is_chat=is_chat),
            media_type="text/event-stream",
            headers=_headers(behaviour, model),
        )

    def _refuses(self, behaviour: Behaviour, model: str) -> bool:
        if behaviour.status == 200:
            return False
        return not behaviour.refuse_every or self._counts[model] % behaviour.refuse_every == 0

    async def _stream(
        self, behaviour: Behaviour, body: dict[str, Any], *, is_chat: bool
    ) -> AsyncIterator[bytes]:
        self._under_way += 1
        self.most_at_once = max(self.most_at_once, self._under_way)
        try:
            if behaviour.per_request_s:
                async with self._turn:
                    await asyncio.sleep(behaviour.per_request_s)
            await asyncio.sleep(behaviour.ttft_s)
            async for event in self._events(behaviour, body, is_chat=is_chat):
                yield event
        finally:
            self._under_way -= 1

    async def _events(
        self, behaviour: Behaviour, body: dict[str, Any], *, is_chat: bool
    ) -> AsyncIterator[bytes]:
        num_tokens = body["max_tokens"] - behaviour.short_by
        word = behaviour.word
        if behaviour.loaded_word is not None and self._under_way > 1:
            word = behaviour.loaded_word
        for index in range(num_tokens):
            if index == behaviour.cut_after:
                raise RuntimeError("cut")
            if index == behaviour.error_after:
                error = {"error": {"message": "gone", "code": "engine_failed"}}
                yield b"event: error\n" + event(error) + b"data: [DONE]\n\n"
                return
            if index:
                await asyncio.sleep(behaviour.gap_s)
            yield event(chunk(f"{word} ", is_chat=is_chat))
        yield event(chunk("", is_chat=is_chat, finish_reason="length"))
        usage = {
            "prompt_tokens": num_prompt_tokens(body),
            "completion_tokens": num_tokens,
            "prompt_tokens_details": {"cached_tokens": behaviour.cached_tokens},
        }
        last = {**identity(is_chat=is_chat), "choices": [], "usage": usage}
        yield event(last) + b"data: [DONE]\n\n"

    async def models_route(self, request: Request) -> Response:
        return JSONResponse({"data": self.listed})

    async def adapters_route(self, request: Request) -> Response:
        if self.registry is None:
            return JSONResponse({"error": {"code": "route_not_found"}}, 404)
        cards = [
            {"name": name, "current": {"digest": digests[-1]} if digests else None}
            for name, digests in self.registry.items()
        ]
        return JSONResponse({"data": cards})

    async def push_route(self, request: Request) -> Response:
        async with request.form() as form:
            name = str(form["name"])
            files = {key: await part.read() for key, part in form.items() if key != "name"}  # type: ignore[union-attr]
        if name in self.pushed:
            return JSONResponse({"error": {"code": "adapter_conflict", "message": "again"}}, 409)
        self.pushed[name] = files
        return JSONResponse({}, 201)

    async def revisions_route(self, request: Request) -> Response:
        assert self.registry is not None
        digests = self.registry[request.path_params["name"]]
        cards = [{"revision": i, "digest": digest} for i, digest in enumerate(digests, start=1)]
        return JSONResponse({"data": cards})

    async def version_route(self, request: Request) -> Response:
        return JSONResponse({"version": "stub"})


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content).encode() + b"\n\n"


def chunk(text: str, *, is_chat: bool = False, finish_reason: str | None = None) -> dict[str, Any]:
    said: dict[str, Any] = {"delta": {"content": text}} if is_chat else {"text": text}
    choices = [{"index": 0, **said, "finish_reason": finish_reason}]
    return {**identity(is_chat=is_chat), "choices": choices, "usage": None}


def identity(*, is_chat: bool) -> dict[str, Any]:
    """What clients expect of every chunk."""
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    return {"id": "stub", "object": kind, "created": 0, "model": "stub"}


def num_prompt_tokens(body: dict[str, Any]) -> int:
    """Words, or ids."""
    if "messages" in body:
        return len(body["messages"][0]["content"].split())
    prompt = body["prompt"]
    return len(prompt.split()) if isinstance(prompt, str) else len(prompt)


def _headers(behaviour: Behaviour, model: str) -> dict[str, str]:
    headers = {
        "x-serving-path": behaviour.path,
        "x-adapter-tier": behaviour.tier,
        "x-adapter-digest": behaviour.digest,
        "x-adapter-id": behaviour.adapter_id or (f"{model}@1" if behaviour.digest else None),
        "connection": "close" if behaviour.closes else None,
    }
    return {name: value for name, value in headers.items() if value is not None}


class Host:
    """Serves one stub after the other on the same port; what is under way stays with its own."""

    def __init__(self) -> None:
        self.url = ""
        self._current = Stub()

    def fresh(self) -> Stub:
        """A stub that nobody has asked yet, from now on the one that is served."""
        self._current = Stub(url=self.url)
        return self._current

    def app(self) -> Starlette:
        def to(name: str) -> Any:
            async def route(request: Request) -> Response:
                answer: Response = await getattr(self._current, name)(request)
                return answer

            return route

        return Starlette(
            routes=[
                Route("/v1/completions", to("answer_route"), methods=["POST"]),
                Route("/v1/chat/completions", to("answer_route"), methods=["POST"]),
                Route("/v1/models", to("models_route")),
                Route("/v1/adapters", to("adapters_route")),
                Route("/v1/adapters", to("push_route"), methods=["POST"]),
                Route("/v1/adapters/{name}/revisions", to("revisions_route")),
                Route("/version", to("version_route")),
            ]
        )


@contextlib.contextmanager
def serving() -> Iterator[Host]:
    """Serve stubs on a free port in a thread."""
    host = Host()
    options = uvicorn.Config(
        host.app(), port=0, log_level="critical", http="httptools", timeout_graceful_shutdown=1
    )
    server = uvicorn.Server(options)
    started = threading.Event()

    async def main() -> None:
        task = asyncio.ensure_future(server.serve())
        while not server.started:
            assert not task.done(), "the stub did not start"
            await asyncio.sleep(0.01)
        started.set()
        await task

    thread = threading.Thread(target=asyncio.run, args=(main(),))
    thread.start()
    try:
        assert started.wait(20), "the stub did not start in time"
        host.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield host
    finally:
        server.should_exit = True
        thread.join(20)
