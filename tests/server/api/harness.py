"""A fake engine that the test directs, a small tokenizer, and the app on a real socket."""

import asyncio
import contextlib
import functools
import itertools
import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import openai
import uvicorn
from starlette.applications import Starlette
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from adapters.manifest import BaseShape
from adapters.registry import Registry
from server.api.app import create_app
from server.api.protocol import BoundedHead
from server.api.residency import EngineDropper
from server.api.services import Services
from server.api.tokenizer import TextCodec
from server.api.weight_sets import MergedPath
from server.config import AdapterConfig, Config, ModelConfig, PromotionConfig, ServerConfig
from server.engine.messages import (
    AdapterEvent,
    AddRequest,
    EngineInfo,
    EngineStats,
    FirstToken,
    RequestOutput,
    TokenLogprobs,
    WeightSetEvent,
)
from server.engine.request import AdapterRef, FinishReason
from server.errors import ServeError
from server.metrics import Metrics
from server.promotion.jobs import Jobs

BASE = "tiny"
BOS, EOS = 0, 1
MAX_MODEL_LEN = 2048
TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' and loop.index0 > 0 and messages[loop.index0 - 1]['role'] == "
    "'user' %}{{ raise_exception('Roles must alternate.') }}{% endif %}"
    "{{ bos_token if loop.first else '' }}[{{ message['role'] }}]{{ message['content'] }}"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
_CORPUS = [
    "the quick brown fox jumps over the lazy dog",
    "once upon a time there was a train on its way to the sea",
    "[system]you are helpful[user]hello there[assistant]hello to you",
]


@functools.cache
def small_tokenizer() -> Tokenizer:
    """Byte-level BPE over every byte and a few words, with <s> and </s>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    return tokenizer


def small_codec() -> TextCodec:
    """A codec over `small_tokenizer`; its template writes <s> itself."""
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    return TextCodec(small_tokenizer(), chat_template=TEMPLATE, named_tokens=named)


@dataclass
class Script:
    """What the fake engine answers to one request."""

    token_ids: list[int]
    finish: FinishReason | None = "length"  # None: never ends
    delay_s: float = 0.0  # between tokens
    fail_after: int | None = None  # tokens until the engine dies
    tokens_at_once: int = 1
    first_delay_s: float = 0.0


class FakeStream:
    """Plays a script as the engine would."""

    def __init__(self, engine: "FakeEngine", request: AddRequest, script: Script) -> None:
        self._engine = engine
        self._request = request
        self._script = script
        self._sent = 0
        self.is_finished = False
        self.is_closed = False

    def __aiter__(self) -> AsyncIterator[RequestOutput]:
        return self

    async def __anext__(self) -> RequestOutput:
        script, request = self._script, self._request
        if self.is_finished or self.is_closed:
            raise StopAsyncIteration
        await asyncio.sleep(script.delay_s if self._sent else script.first_delay_s)
        await self._engine.gate.wait()
        if script.fail_after is not None and self._sent >= script.fail_after:
            self.is_finished = True
            raise ServeError(503, "engine_failed", "The engine died.", retry_after_s=1.0)
        if script.finish is None and self._sent >= len(script.token_ids):
            await asyncio.Event().wait()
        # max_tokens bounds what the script says, as it does in the engine
        ids = script.token_ids[: request.sampling.max_tokens]
        new = ids[self._sent : self._sent + script.tokens_at_once]
        is_first, self._sent = self._sent == 0, self._sent + len(new)
        reason: FinishReason | None = None
        if self._sent >= len(ids) and script.finish is not None:
            is_cut = len(ids) < len(script.token_ids)
            reason, self.is_finished = ("length" if is_cut else script.finish), True
        return RequestOutput(
            request_id=request.request_id,
            token_ids=new,
            logprobs=_logprobs(new, request.sampling.logprobs, self._engine.logprob),
            prompt_logprobs=_prompt_logprobs(request) if is_first else None,
            first=self._first() if is_first else None,
            finish_reason=reason,
        )

    def close(self) -> None:
        if not self.is_finished and not self.is_closed:
            self._engine.aborted.append(self._request.request_id)
        self.is_closed = True

    def _first(self) -> FirstToken:
        now = time.monotonic()
        tier = None if self._request.adapter is None else self._engine.tier
        return FirstToken(
            scheduled_time=now - 0.001,
            first_token_time=now,
            num_cached_tokens=self._engine.num_cached.pop(0) if self._engine.num_cached else 3,
            tier=tier,
        )


def _logprobs(ids: list[int], top: int | None, logprob: float = -0.5) -> list[TokenLogprobs] | None:
    if top is None:
        return None
    alternatives = list(range(top))
    others = [-1.0 - i for i in range(len(alternatives))]
    return [TokenLogprobs(logprob, alternatives, others) for _ in ids]


def _prompt_logprobs(request: AddRequest) -> list[TokenLogprobs | None] | None:
    given = _logprobs(request.prompt_ids[1:], request.sampling.prompt_logprobs)
    return None if given is None else [None, *given]


class FakeEngine:
    """Answers with `script` (by default the prompt again), and remembers what it was asked."""

    def __init__(self, vocab_size: int) -> None:
        self.info = EngineInfo(
            base_digest="b" * 64,
            device="cpu",
            dtype="float32",
            quantization="none",
            num_blocks=64,
            block_size=16,
            max_model_len=MAX_MODEL_LEN,
            bank_rows=64,
            page_rows=8,
            vocab_size=vocab_size,
            eos_token_ids=[EOS],
            kernels={"linear": "reference"},
        )
        self.stats = EngineStats()
        self.is_ready = True
        self.num_restarts = 0
        self.tier: Any = "host"
        self.logprob = -0.5
        self.num_cached: list[int] = []  # of the next first tokens; then 3
        self.scripts: list[Script] = []
        self.requests: list[AddRequest] = []
        self.aborted: list[str] = []
        self.loaded: list[tuple[AdapterRef, bool]] = []
        self.dropped: list[str] = []
        self.unpinned: list[str] = []
        self.weight_sets: dict[str, Path] = {}
        self.load_failure: str | None = None
        self.is_full = False  # the bank
        self.gate = asyncio.Event()
        self.gate.set()

    def submit(self, request: AddRequest) -> FakeStream:
        self.requests.append(request)
        default = Script(request.prompt_ids)
        return FakeStream(self, request, self.scripts.pop(0) if self.scripts else default)

    async def load_adapter(self, adapter: AdapterRef, *, pinned: bool = False) -> AdapterEvent:
        if self.load_failure is not None:
            return AdapterEvent(
                digest=adapter.digest, event="failed", tier="gpu", message=self.load_failure
            )
        self.loaded.append((adapter, pinned))
        if self.is_full:
            return AdapterEvent(digest=adapter.digest, event="postponed", tier="disk")
        self.stats.resident_adapters = [*self.stats.resident_adapters, adapter.digest]
        return AdapterEvent(digest=adapter.digest, event="loaded", tier="gpu", num_bytes=10)

    async def drop_adapter(self, digest: str) -> None:
        self.dropped.append(digest)

    def unpin_adapter(self, digest: str) -> None:
        self.unpinned.append(digest)

    async def load_weight_set(self, digest: str, folder: Path) -> WeightSetEvent:
        if self.load_failure is not None:
            return WeightSetEvent(digest=digest, event="failed", message=self.load_failure)
        self.weight_sets[digest] = folder
        return WeightSetEvent(digest=digest, event="loaded")

    async def drop_weight_set(self, digest: str) -> None:
        del self.weight_sets[digest]


@dataclass
class Server:
    """The app, serving; `client()` is the official one."""

    app: Starlette
    engine: FakeEngine
    registry: Registry
    codec: TextCodec
    metrics: Metrics
    url: str
    loop: asyncio.AbstractEventLoop
    connections: set[Any]  # uvicorn's open ones
    dropper: EngineDropper
    clients: list[Any] = field(default_factory=list)

    @property
    def services(self) -> Services:
        services = self.app.state.services
        assert isinstance(services, Services)
        return services

    def client(self, api_key: str = "none") -> Any:
        """The official client. Its types know neither our fields nor mistakes: hence `Any`."""
        client = openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key=api_key,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(verify=False),
        )
        self.clients.append(client)
        return client

    def http(self) -> httpx.Client:
        client = httpx.Client(base_url=self.url, timeout=20, verify=False)  # plain HTTP: no CAs
        self.clients.append(client)
        return client

    def ids(self, text: str) -> list[int]:
        return self.codec.encode(text)

    def say(self, text: str, finish: FinishReason | None = "stop", **script: Any) -> None:
        """Script the next request to answer `text`; `stop` ends it with the end of sequence."""
        ids = self.ids(text) + ([EOS] if finish == "stop" else [])
        self.engine.scripts.append(Script(ids, finish, **script))

    def run(self, coroutine: Any) -> Any:
        """Run a coroutine on the server's loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(20)


def wait_until(condition: Any, limit_s: float = 10.0) -> None:
    """Poll until the condition holds."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


_numbers = itertools.count()


@contextlib.contextmanager
def serving(
    base_folder: Path,
    store: Path,
    *,
    allowed_roots: tuple[Path, ...] = (),
    promotion: PromotionConfig | None = None,
    merged: MergedPath | None = None,
    jobs: Jobs | None = None,
    **server: Any,
) -> Iterator[Server]:
    """Serve the app on a free port of 127.0.0.1 in a thread; `server` goes to ServerConfig."""
    codec = small_codec()
    config = Config(
        model=ModelConfig(path=base_folder, name=BASE),
        adapters=AdapterConfig(store=store, allowed_roots=allowed_roots, bank_rows=64),
        server=ServerConfig(**{"drain_s": 5.0, **server}),
        promotion=promotion or PromotionConfig(),
    )
    engine = FakeEngine(vocab_size=512)
    dropper = EngineDropper(engine)
    base = BaseShape.from_config(base_folder, BASE, "b" * 64)
    registry = Registry.open(store, base, on_free=dropper)
    metrics = Metrics(BASE, names=registry.names_of)
    app = create_app(
        config, engine, registry, codec, metrics, dropper=dropper, merged=merged, jobs=jobs
    )
    started = threading.Event()
    loops: list[asyncio.AbstractEventLoop] = []
    options = uvicorn.Config(
        app, port=0, log_level="error", http=BoundedHead, timeout_graceful_shutdown=1
    )
    uvicorn_server = uvicorn.Server(options)

    async def main() -> None:
        task = asyncio.ensure_future(uvicorn_server.serve())
        while not uvicorn_server.started:
            assert not task.done(), "the server did not start"
            await asyncio.sleep(0.01)
        loops.append(asyncio.get_running_loop())
        started.set()
        await task

    thread = threading.Thread(target=asyncio.run, args=(main(),), name=f"serve-{next(_numbers)}")
    thread.start()
    assert started.wait(20), "the server did not start in time"
    port = uvicorn_server.servers[0].sockets[0].getsockname()[1]
    handle = Server(
        app,
        engine,
        registry,
        codec,
        metrics,
        f"http://127.0.0.1:{port}",
        loops[0],
        uvicorn_server.server_state.connections,
        dropper,
    )
    try:
        yield handle
    finally:
        for client in handle.clients:
            client.close()
        uvicorn_server.should_exit = True
        thread.join(20)
        registry.close()
        assert not thread.is_alive(), "the server did not stop"
