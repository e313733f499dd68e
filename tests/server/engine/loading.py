"""A bank and an executor for adapter loads whose worker is the test: loads end when it says so."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any

from server.engine.adapter_cache import HostAdapter
from server.engine.request import AdapterRef


@dataclass(frozen=True)
class FakeHost:
    """An adapter in host memory."""

    digest: str
    num_bytes: int
    gain_row: int | None = None


@dataclass
class Load:
    """One submitted load that has not run yet."""

    future: Future[Any]
    run: Callable[..., Any]
    arguments: tuple[Any, ...]

    @property
    def digest(self) -> str:
        """Which adapter it loads."""
        adapter: AdapterRef = self.arguments[0]
        return adapter.digest

    @property
    def pages(self) -> list[int]:
        """Where it will write."""
        pages: list[int] = self.arguments[2]
        return pages


class HandExecutor(Executor):
    """Keeps what is submitted until `finish`."""

    def __init__(self) -> None:
        self.waiting: list[Load] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Keep it for later."""
        assert not kwargs
        load = Load(Future(), fn, args)
        self.waiting.append(load)
        return load.future

    def finish(self, index: int = 0) -> Load:
        """Run one load to its end, good or bad."""
        load = self.waiting.pop(index)
        try:
            load.future.set_result(load.run(*load.arguments))
        except (OSError, ValueError, RuntimeError) as error:
            load.future.set_exception(error)
        return load


@dataclass
class FakeBank:
    """Which adapter each page holds, and which objects on disk are damaged."""

    damaged: dict[str, Exception] = field(default_factory=dict)
    pages: dict[int, str] = field(default_factory=dict)
    num_reads: int = 0
    bytes_of: Callable[[AdapterRef], int] = lambda adapter: 10
    gain_row_of: Callable[[AdapterRef], int | None] = lambda adapter: None

    def read(self, adapter: AdapterRef) -> FakeHost:
        """From disk, unless damaged."""
        if adapter.digest in self.damaged:
            raise self.damaged[adapter.digest]
        self.num_reads += 1
        return FakeHost(adapter.digest, self.bytes_of(adapter), self.gain_row_of(adapter))

    def write(self, pages: list[int], adapter: HostAdapter) -> None:
        """Into the pages."""
        assert isinstance(adapter, FakeHost)
        self.pages.update(dict.fromkeys(pages, adapter.digest))
