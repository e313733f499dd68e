"""What the HTTP side needs of the engine; `server.engine.client` provides it, tests put a fake."""

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Protocol

from server.engine.messages import (
    AdapterEvent,
    AddRequest,
    EngineInfo,
    EngineStats,
    RequestOutput,
    WeightSetEvent,
)
from server.engine.request import AdapterRef


class OutputStream(Protocol):
    """One request's outputs, coalesced: a slow reader gets several tokens in one."""

    def __aiter__(self) -> AsyncIterator[RequestOutput]: ...

    async def __anext__(self) -> RequestOutput:
        """Return what is new. Raises ServeError if the request failed."""
        ...

    def close(self) -> None:
        """Abort in the engine what is unfinished. Idempotent."""
        ...


class Engine(Protocol):
    """The API process's side of the bridge."""

    @property
    def info(self) -> EngineInfo:
        """What the engine found out while starting; valid once it was ready."""
        ...

    @property
    def stats(self) -> EngineStats: ...

    @property
    def is_ready(self) -> bool: ...

    @property
    def num_restarts(self) -> int: ...

    def submit(self, request: AddRequest) -> OutputStream:
        """Hand a request over. Raises ServeError 503 if the engine is down."""
        ...

    async def load_adapter(self, adapter: AdapterRef, *, pinned: bool = False) -> AdapterEvent:
        """Bring an adapter into the bank, and keep it there if pinned."""
        ...

    async def drop_adapter(self, digest: str) -> None:
        """Free everything the engine holds of it."""
        ...

    def unpin_adapter(self, digest: str) -> None: ...

    async def load_weight_set(self, digest: str, folder: Path) -> WeightSetEvent:
        """Load a merged model beside the base: loaded, or failed and why."""
        ...

    async def drop_weight_set(self, digest: str) -> None:
        """Free a merged model; returns when nothing runs on it any more."""
        ...
