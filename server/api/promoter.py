"""Promotions while the server runs: start, follow, cancel and undo them; apply the policy.

One task and one lock: nothing here is done twice at once. What blocks runs in a thread.
"""

import asyncio
import contextlib
import hashlib
import logging
import sqlite3
import time
import uuid
from collections.abc import Mapping
from typing import Any

from adapters.artifacts import Artifact
from adapters.catalog import Revision
from adapters.manifest import AdapterConflict, AdapterError, AdapterNotFound
from adapters.promotions import PromotionRequest, PromotionState
from adapters.registry import Registry
from adapters.store import file_sha256
from server.api.popularity import Popularity
from server.api.ports import Engine
from server.api.weight_sets import WeightSets
from server.config import Config
from server.metrics import Metrics
from server.promotion.jobs import Jobs
from server.promotion.policy import Demote, PolicyLimits, Promote, Standing, decide

_LOOK_S = 1.0  # between two looks at jobs and names
_POLICY_S = 30.0  # between two decisions

log = logging.getLogger(__name__)


class Promoter:
    """Owns the store's promotions while the server runs."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        registry: Registry,
        metrics: Metrics,
        jobs: Jobs,
        sets: WeightSets,
        popularity: Popularity,
    ) -> None:
        self._config, self._engine, self._registry = config, engine, registry
        self._metrics = metrics
        self._jobs, self._sets, self.popularity = jobs, sets, popularity
        self._changing = asyncio.Lock()
        self._woken = asyncio.Event()
        self._running: set[str] = set()  # adapter digests whose job had not ended at the last look
        self._changed: dict[str, float] = {}  # adapter digest -> unix seconds

    async def run(self) -> None:
        """Take over what an earlier server left, then keep everything as it should be."""
        next_decision = time.monotonic() + _POLICY_S
        is_auto = self._config.promotion.policy == "auto"
        is_recovered = False
        while True:
            try:
                if not is_recovered:
                    await asyncio.to_thread(self._jobs.recover)
                    is_recovered = True
                await self.look()
                if is_auto and time.monotonic() >= next_decision:
                    next_decision = time.monotonic() + _POLICY_S
                    await self.apply_policy(time.time())
            # A full disk, a name that was just deleted.
            except (OSError, sqlite3.Error, AdapterError) as error:
                log.error("promotions are not followed: %s", error)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._woken.wait(), _LOOK_S)
            self._woken.clear()

    async def look(self) -> None:
        """Take in jobs that have ended; load and unload what names and artifacts ask for."""
        async with self._changing:
            await self._follow()
            await self._sets.reconcile()

    def request(self, revision: Revision, **options: Any) -> PromotionRequest:
        """A request to promote a revision. Raises AdapterConflict for another base's."""
        base_digest = self._registry.base_digest
        if base_digest is None or revision.base_digest != base_digest:
            raise AdapterConflict(
                f"The adapter {revision.id} was registered for base {revision.base_digest[:12]}; "
                f"this server's is {(base_digest or 'none')[:12]}, so it cannot be merged into it."
            )
        return PromotionRequest(
            job=uuid.uuid4().hex,
            adapter_digest=revision.digest,
            revision=revision.id,
            store=str(self._registry.root.resolve()),
            base=str(self._config.model.path.resolve()),
            base_name=self._config.model.name,
            base_digest=base_digest,
            **options,
        )

    async def promote(
        self, request: PromotionRequest, contents: Mapping[str, bytes]
    ) -> PromotionState | None:
        """Start a job; None where the revision has just such an artifact, which serves again.

        Raises AdapterConflict while a job works on the revision.
        """
        async with self._changing:
            await self._follow()  # of a job that has just ended, all is taken in first
            digest = request.adapter_digest
            if await asyncio.to_thread(self._registry.artifacts.reuse, digest, request.settings):
                self._sets.forgive(digest)
                self._woken.set()
                return None
            state = await asyncio.to_thread(self._jobs.start, request, contents)
            self._running.add(digest)
            self._metrics.num_promoting = len(self._running)
            log.info("promotion begun", extra={"adapter": request.revision})
            return state

    async def cancel(self, revision: Revision) -> PromotionState:
        """End the revision's job. Raises AdapterNotFound where none is under way."""
        async with self._changing:
            try:
                state = await asyncio.to_thread(self._jobs.cancel, revision.digest)
            except AdapterNotFound:
                message = f"No promotion of {revision.id} is under way."
                raise AdapterNotFound(message) from None
            await self._follow()
            return state

    async def demote(self, revision: Revision, *, keep: bool) -> str:
        """Serve the revision by the adapter path; delete its artifact, or keep it unserved.

        Returns the artifact's digest; streams that run on its model end as they began. Raises
        AdapterConflict where there is none.
        """
        async with self._changing:
            await self._follow()  # of a job that has just ended, all is taken in first
            state = await asyncio.to_thread(self._jobs.state, revision.digest)
            if state is not None and not state.has_ended:
                raise AdapterConflict(
                    f"A promotion of {revision.id} is under way; cancel it first."
                )
            artifact = self._registry.artifacts.find(revision.digest)
            if artifact is None:
                raise AdapterConflict(f"The adapter {revision.id} is not promoted.")
            await self._demote(artifact, keep=keep)
            return artifact.digest

    async def card(self, revision: Revision) -> dict[str, Any]:
        """Everything about a revision's promotion, as GET /v1/adapters/{name} shows it."""
        state = await asyncio.to_thread(self._jobs.state, revision.digest)
        process = await asyncio.to_thread(self._jobs.process_id, revision.digest)
        artifact = self._sets.artifact(revision.digest)
        return {
            "path": self._sets.path(revision.digest),
            "message": self._sets.why_not_merged(revision),
            "job": None if state is None else job_card(revision, state, process),
            "artifact": None if artifact is None else self._sets.card(artifact),
        }

    def under_way(self) -> list[str]:
        """The adapter digests of the jobs that have not ended. Reads the disk."""
        return self._jobs.running()

    async def apply_policy(self, now: float) -> Promote | Demote | None:
        """Do the one next thing that popularity asks for; return what it was."""
        config = self._config.promotion
        limits = PolicyLimits(
            min_tokens=config.min_tokens, max_sets=config.max_sets, cool_down_s=config.cool_down_s
        )
        standings = await asyncio.to_thread(self._standings)
        decision = decide(standings, limits, now, is_busy=bool(self._running))
        if decision is None:
            return None
        self._changed[decision.digest] = now
        try:
            await self._carry_out(decision)
        except (AdapterError, OSError) as error:
            log.warning("the policy failed: %s", error, extra={"adapter": decision.digest})
        return decision

    async def _carry_out(self, decision: Promote | Demote) -> None:
        revision = self._sets.published().get(decision.digest)
        if revision is None:
            return  # deleted a moment ago
        log.info("the policy %ss", type(decision).__name__.lower(), extra={"adapter": revision.id})
        if isinstance(decision, Demote):
            await self.demote(revision, keep=False)
            return
        path, config = self.popularity.rows_of(revision), self._config.promotion
        assert path is not None, "the policy chooses only from those that have rows"
        rows, text = await asyncio.to_thread(path.read_bytes), config.text
        request = self.request(
            revision,
            rows_sha256=hashlib.sha256(rows).hexdigest(),
            text=None if text is None else str(text.resolve()),
            text_sha256=None if text is None else await asyncio.to_thread(file_sha256, text),
            device=config.device,
        )
        await self.promote(request, {"rows": rows})

    async def _follow(self) -> None:
        """Take in the jobs that have ended since the last look."""
        running = set(await asyncio.to_thread(self._jobs.running))
        named = self._named() if running or self._running else set()
        for digest in (running | self._running) - named:  # their adapters were deleted
            await asyncio.to_thread(self._jobs.forget, digest)
            await asyncio.to_thread(self._registry.artifacts.remove_of, digest)
        for digest in (self._running - running) & named:
            state = await asyncio.to_thread(self._jobs.state, digest)
            if state is not None:
                await self._take_in(digest, state)
            self._running.discard(digest)
        self._running = running & named
        self._metrics.num_promoting = len(self._running)

    async def _take_in(self, digest: str, state: PromotionState) -> None:
        """Do what the end of a job asks for; count it once that is done."""
        if state.status == "done":
            self._sets.forgive(digest)
            made, store = str(state.result.get("artifact")), self._registry.artifacts
            await asyncio.to_thread(store.remove_of, digest, but=made)
            with contextlib.suppress(AdapterNotFound):  # somebody has deleted it by hand
                await asyncio.to_thread(store.restore, made)  # the same bytes may have been demoted
        self._metrics.promotions[state.status] += 1
        self._changed[digest] = time.time()
        log.info("promotion ended: %s %s", state.status, state.message, extra={"adapter": digest})

    async def _demote(self, artifact: Artifact, *, keep: bool) -> None:
        store = self._registry.artifacts
        await asyncio.to_thread(store.demote, artifact.digest)  # first: no restart serves it again
        await self._sets.unload(artifact.adapter_digest)
        self._changed[artifact.adapter_digest] = time.time()
        if not keep:
            await asyncio.to_thread(store.remove_of, artifact.adapter_digest)

    def _named(self) -> set[str]:
        """Every digest that a revision has."""
        named: set[str] = set()
        for adapter in self._registry.list():
            with contextlib.suppress(AdapterNotFound):  # deleted a moment ago
                named |= {each.digest for each in self._registry.revisions(adapter.name)}
        return named

    def _standings(self) -> list[Standing]:
        found, _, _ = self.popularity.candidates()
        published = self._sets.published()
        has_room = self._has_room(sum(each.is_promoted for each in found))
        return [
            Standing(
                digest=each.served.digest,
                recent_tokens=each.served.recent_tokens,
                saved_s=each.saved_s,
                is_promoted=each.is_promoted,
                changed=self._last_change(each.served.digest),
                can_promote=has_room and self._may_promote(published.get(each.served.digest)),
            )
            for each in found
        ]

    def _has_room(self, num_promoted: int) -> bool:
        """Whether what was set aside for merged models holds one more; a CPU has no such limit."""
        if not self._engine.is_ready:
            return False
        set_aside = self._config.promotion.memory_bytes
        if set_aside == 0 and self._engine.info.device == "cpu":
            return True
        return (num_promoted + 1) * self.popularity.num_set_bytes <= set_aside

    def _may_promote(self, revision: Revision | None) -> bool:
        """Whether the policy can: there are rows, and no operator has said no."""
        if revision is None or revision.base_digest != self._registry.base_digest:
            return False
        is_kept = self._sets.artifact(revision.digest) is not None  # demoted by an operator
        return not is_kept and self.popularity.rows_of(revision) is not None

    def _last_change(self, digest: str) -> float | None:
        """When anything last happened to a revision's promotion, also before a restart."""
        state, artifact = self._jobs.state(digest), self._sets.artifact(digest)
        times = (
            self._changed.get(digest),
            None if state is None else state.finished,
            None if artifact is None else artifact.created,
        )
        return max((each for each in times if each is not None), default=None)


def job_card(revision: Revision, state: PromotionState, process: int | None) -> dict[str, Any]:
    """A job as the HTTP routes show it."""
    return {
        "object": "adapter.promotion",
        "id": revision.id,
        "status": state.status,
        "stage": state.stage,
        "fraction": round(state.fraction, 4),
        "message": state.message,
        "attempt": state.attempt,
        "pid": process,
        "started": int(state.started),
        "updated": int(state.updated),
        "finished": None if state.finished is None else int(state.finished),
        "result": state.result,
    }
