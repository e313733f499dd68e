"""Which artifacts the engine serves: load what names ask for, unload the rest, know what failed.

The adapter path serves whatever happens here.
"""

import asyncio
import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from adapters.artifacts import Artifact
from adapters.catalog import Revision
from adapters.promotions import WAITING
from adapters.registry import Registry
from server.api.ports import Engine
from server.errors import ServeError, WeightSetRefused
from server.metrics import Metrics

_RETRY_S = 300.0  # before a weight set that was refused is tried again

log = logging.getLogger(__name__)


class MergedPath(Protocol):
    """Merged models in the engine, by the adapter revision that each one answers for."""

    async def load(self, adapter_digest: str, artifact_digest: str, folder: Path) -> None:
        """Load the checkpoint and route to it. Raises WeightSetRefused."""
        ...

    async def unload(self, adapter_digest: str) -> None:
        """Route to the adapter path again; returns when nobody uses the weight set any more."""
        ...

    def route(self, adapter_digest: str) -> str | None:
        """The weight set that answers for it now; None is the adapter path."""
        ...


@dataclass(frozen=True, slots=True)
class Trouble:
    """Why an artifact is not served."""

    artifact: str
    message: str
    since: float  # monotonic seconds
    ended_engine: bool = False  # it ended while it loaded this; the next one may do so too


class WeightSets:
    """Keeps the engine's merged models equal to what the published names' artifacts are.

    Its methods are called one at a time.
    """

    def __init__(
        self, registry: Registry, engine: Engine, metrics: Metrics, merged: MergedPath | None
    ) -> None:
        """Without `merged` everything is served by the adapter path."""
        self._registry, self._engine, self._metrics = registry, engine, metrics
        self._store, self._merged = registry.artifacts, merged
        self._loaded: dict[str, str] = {}  # adapter digest -> artifact digest
        self._whole: set[str] = set()  # artifacts whose bytes were checked
        self._troubles: dict[str, Trouble] = {}  # by adapter digest
        self._leaving: set[asyncio.Task[None]] = set()  # one for each model that is to be freed
        self._engine_number = -1

    def artifact(self, adapter_digest: str) -> Artifact | None:
        """The revision's artifact, if it was made from the base that serves."""
        artifact = self._store.find(adapter_digest)
        is_ours = artifact is not None and artifact.base_digest == self._registry.base_digest
        return artifact if is_ours else None

    def is_promoted(self, adapter_digest: str) -> bool:
        """Whether it has an artifact that shall serve."""
        artifact = self.artifact(adapter_digest)
        return artifact is not None and not self._store.is_demoted(artifact.digest)

    def published(self) -> dict[str, Revision]:
        """What each name means now, by digest."""
        current = [adapter.current for adapter in self._registry.list()]
        return {revision.digest: revision for revision in current if revision is not None}

    async def reconcile(self) -> None:
        """Load what should be served and is not; unload what no name asks for any more."""
        merged = self._merged
        if merged is None or not self._engine.is_ready:
            return
        if self._engine.num_restarts != self._engine_number:
            self._engine_number = self._engine.num_restarts
            self._forgive_refusals()
            self._loaded.clear()
        wanted = self._wanted()
        for digest, artifact_digest in list(self._loaded.items()):
            if digest not in wanted or wanted[digest].digest != artifact_digest:
                await self.unload(digest)
        for digest, artifact in wanted.items():
            if merged.route(digest) is not None:
                self._loaded.setdefault(digest, artifact.digest)
            elif self._may_try(digest, artifact):
                await self._load(merged, digest, artifact)
        self._count(wanted)

    async def unload(self, adapter_digest: str) -> None:
        """Serve it by the adapter path; the model leaves when its last request is over.

        Nobody waits for that: it may take as long as the longest stream.
        """
        self._troubles.pop(adapter_digest, None)
        self._metrics.weight_set_bytes.pop(adapter_digest, None)
        if self._merged is not None and self._loaded.pop(adapter_digest, None) is not None:
            leaving = asyncio.create_task(self._leave(self._merged, adapter_digest))
            self._leaving.add(leaving)
            leaving.add_done_callback(self._leaving.discard)
            await asyncio.sleep(0)  # it runs: the engine hears of this before it hears of a load

    def forgive(self, adapter_digest: str) -> None:
        """Let the next `reconcile` try it again."""
        self._troubles.pop(adapter_digest, None)

    def path(self, adapter_digest: str) -> str:
        """Which path serves it now: merged or adapter."""
        route = None if self._merged is None else self._merged.route(adapter_digest)
        return "adapter" if route is None else "merged"

    def why_not_merged(self, revision: Revision) -> str:
        """In words, why the adapter path serves a revision that has an artifact; else nothing."""
        artifact = self.artifact(revision.digest)
        if artifact is None or self.path(revision.digest) == "merged":
            return ""
        if self._store.is_demoted(artifact.digest):
            return "demoted, and kept"
        if self._merged is None:
            return "this engine serves no merged models"
        if revision.digest not in self.published():
            return "no name means this revision now"
        trouble = self._troubles.get(revision.digest)
        return WAITING if trouble is None else trouble.message

    def card(self, artifact: Artifact) -> dict[str, Any]:
        """An artifact as GET /v1/adapters/{name} shows it."""
        return {
            "digest": artifact.digest,
            "created": int(artifact.created),
            "num_bytes": artifact.num_bytes,
            "merge_base": artifact.settings.get("merge_base"),
            "group_size": artifact.settings.get("group_size"),
            "is_demoted": self._store.is_demoted(artifact.digest),
            "report": artifact.report,
        }

    async def _leave(self, merged: MergedPath, adapter_digest: str) -> None:
        """Free its model. Where there was no room for another one, there may be now."""
        try:
            await merged.unload(adapter_digest)
        except ServeError as error:  # an engine that is down holds nothing
            log.warning("not unloaded: %s", error.message, extra={"adapter": adapter_digest})
        self._forgive_refusals()

    def _forgive_refusals(self) -> None:
        """Let the next `reconcile` try everything again that no engine has ended of."""
        troubles = self._troubles.items()
        self._troubles = {digest: each for digest, each in troubles if each.ended_engine}

    async def _load(self, merged: MergedPath, digest: str, artifact: Artifact) -> None:
        message, ended_engine = "", False
        if artifact.digest not in self._whole:
            try:
                if await asyncio.to_thread(self._store.is_whole, artifact.digest):
                    self._whole.add(artifact.digest)
                else:
                    message = "its files are damaged; promote it again"
            except OSError as error:
                message = f"its files cannot be read: {error}"
        if not message:
            try:
                await merged.load(digest, artifact.digest, self._store.path(artifact.digest))
            except (WeightSetRefused, ServeError) as error:
                message, ended_engine = error.message, isinstance(error, ServeError)
        if message:
            now = time.monotonic()
            self._troubles[digest] = Trouble(artifact.digest, message, now, ended_engine)
            log.warning("not served merged: %s", message, extra={"adapter": artifact.revision})
            return
        self._troubles.pop(digest, None)
        self._loaded[digest] = artifact.digest
        log.info("served merged", extra={"adapter": artifact.revision})

    def _wanted(self) -> dict[str, Artifact]:
        """What should be served merged: adapter digest -> artifact."""
        newest = {each.adapter_digest: each for each in self._store.every()}  # the oldest is first
        published = self.published() if newest else {}
        return {
            digest: artifact
            for digest, artifact in newest.items()
            if digest in published
            and artifact.base_digest == self._registry.base_digest
            and not self._store.is_demoted(artifact.digest)
        }

    def _may_try(self, digest: str, artifact: Artifact) -> bool:
        trouble = self._troubles.get(digest)
        if trouble is None or trouble.artifact not in ("", artifact.digest):
            return True
        return time.monotonic() - trouble.since >= _RETRY_S

    def _count(self, wanted: Mapping[str, Artifact]) -> None:
        self._metrics.weight_set_bytes = {
            digest: wanted[digest].num_bytes for digest in self._loaded.keys() & wanted.keys()
        }
