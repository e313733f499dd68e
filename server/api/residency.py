"""What the HTTP side asks of the adapter bank: load, keep, free."""

import asyncio
import logging

from adapters.catalog import Revision
from adapters.registry import Registry
from server.api.ports import Engine
from server.api.services import Services
from server.engine.request import AdapterRef
from server.errors import ServeError

log = logging.getLogger(__name__)


class EngineDropper:
    """Tells the engine to free what nothing names or leases any more: the registry's `on_free`."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._registry: Registry | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def attach(self, registry: Registry) -> None:
        """Serve from the running loop on. Before that the engine holds nothing to be freed."""
        self._registry, self._loop = registry, asyncio.get_running_loop()

    def __call__(self, digest: str) -> None:
        """May be called from any thread; returns at once."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._start, digest)

    def _start(self, digest: str) -> None:
        task = asyncio.ensure_future(self.drop(digest))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def drop(self, digest: str) -> None:
        """Have the engine free the digest, unless a name has come to mean it again."""
        assert self._registry is not None, "attached"
        if self._registry.names_of(digest):
            return  # pushed again meanwhile: what the engine holds of it is right
        try:
            await self._engine.drop_adapter(digest)
        except ServeError as error:  # an engine that is down holds nothing
            log.warning("adapter not dropped: %s", error.message, extra={"adapter": digest})


async def follow_pin(
    services: Services, name: str, before: Revision | None, after: Revision
) -> None:
    """Move a pinned adapter's pin from the revision it meant to the one it means now."""
    is_same = before is not None and before.digest == after.digest
    if is_same or not services.registry.get(name).pinned:
        return
    if before is not None:
        unpin(services, before)
    if services.engine.is_ready:  # else `restore_pins` does it, once it is
        await load(services, after, pinned=True)


def unpin(services: Services, revision: Revision) -> None:
    """Let the revision leave the bank, unless another adapter that is pinned means it too."""
    pinned = {
        adapter.current.digest
        for adapter in services.registry.list()
        if adapter.pinned and adapter.current is not None
    }
    if revision.digest not in pinned:
        services.engine.unpin_adapter(revision.digest)


async def load(services: Services, revision: Revision, *, pinned: bool = False) -> bool:
    """Bring a revision into the bank. False: there is no room now; a pinned one comes in later.

    Raises ServeError 409 when it cannot be loaded, 503 without an engine.
    """
    services.check_open()
    adapter = AdapterRef.of(revision)
    event = await services.engine.load_adapter(adapter, pinned=pinned)
    if pinned:
        unpin(services, revision)  # should nobody pin it by now
    if event.event not in ("loaded", "postponed"):
        raise ServeError(
            409, "adapter_not_loaded", f"{revision.id} was not loaded: {event.message}"
        )
    return event.event == "loaded"


async def restore_pins(services: Services) -> None:
    """Load and pin, in an engine that has just started, what operators have pinned."""
    for adapter in services.registry.list():
        if adapter.pinned and adapter.current is not None:
            try:
                await load(services, adapter.current, pinned=True)
            except ServeError as error:
                log.warning("pin not restored: %s", error.message, extra={"adapter": adapter.name})
