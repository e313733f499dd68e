"""Which requests join the next step, how many tokens each, and who gives way when room runs out."""

from dataclasses import dataclass

from server.config import SchedulerConfig
from server.engine.adapter_cache import AdapterCache
from server.engine.block_manager import BlockManager, extend_chain, prefix_root
from server.engine.fairness import FairQueue
from server.engine.request import NO_STATE_ROW, Request

_MAX_SCORED_TOKENS = 512  # of one prompt in a step, where each needs a row of logits of its own


@dataclass(frozen=True, slots=True)
class Scheduled:
    """One request's part in a step: tokens [start, start + num_tokens) of it."""

    request: Request
    start: int
    num_tokens: int
    samples: bool  # the step computes its newest token, so it yields the next one

    @property
    def stop(self) -> int:
        """The first token that this step does not compute."""
        return self.start + self.num_tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """One step: decode rows first (one token, sampled), then prompt chunks."""

    decodes: tuple[Scheduled, ...]
    chunks: tuple[Scheduled, ...]

    @property
    def parts(self) -> tuple[Scheduled, ...]:
        """Everything in the step, in the order of its tokens."""
        return self.decodes + self.chunks


class Scheduler:
    """Plans steps. It knows token counts, never token values: step N+1 is planned while N runs.

    Running requests hold a state row, blocks that cover their computed tokens, and a lease on
    their adapter. Waiting ones hold at most the lease, and only while the adapter loads.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        blocks: BlockManager,
        adapters: AdapterCache,
        base_digest: str,
        *,
        prefix_caching: bool = True,
    ) -> None:
        self.running: list[Request] = []  # in order of admission
        self.waiting = FairQueue(token_fair=config.token_fair)
        self.num_preemptions = 0
        self.prefix_queries = 0
        self.prefix_hits = 0
        self._config = config
        self._blocks = blocks
        self._adapters = adapters
        self._base_digest = base_digest
        self._prefix_caching = prefix_caching
        self._free_rows = list(range(config.max_running))[::-1]
        self._roots: dict[str, set[bytes]] = {}  # adapter digest -> where its hash chains start

    def add(self, request: Request) -> None:
        """Queue a request. It must fit the KV cache and the bank when it is alone."""
        needed = self._blocks.blocks_for(len(request.prompt_ids) + request.sampling.max_tokens)
        assert needed <= self._blocks.num_blocks, f"{request.request_id} needs {needed} blocks"
        digest = request.adapter.digest if request.adapter else None
        if digest is not None:
            request.tier = self._adapters.tier(digest)
        request.prefix_root = prefix_root(self._base_digest, request.fairness_key, request.tenant)
        self._roots.setdefault(request.fairness_key, set()).add(request.prefix_root)
        request.queued_time = request.arrival_time
        self.waiting.push(request)

    def finish(self, request: Request) -> None:
        """Take a request out, done or not, and free all that it holds at once.

        A step in flight may still write to its blocks and read its adapter's pages. That is safe:
        later steps run after it on the same stream, and copies into the bank wait for it.
        """
        if request.is_finished:
            return
        request.is_finished = True
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)
        self._release(request)

    def schedule(self, now: float) -> Plan:
        """Plan the next step; empty if nothing can run."""
        budget = _Budget(self._config.max_step_tokens)
        for request in list(self.running):
            if request.num_uncomputed_tokens == 1 and request.wants_more:
                self._plan_running(request, budget, now)
        if not budget.given:
            budget = _Budget(self._config.max_prefill_tokens)
        for request in list(self.running):
            if request.num_uncomputed_tokens > 1:
                self._plan_running(request, budget, now)
        self._admit(budget, now)
        return self._launch(budget)

    def remember_blocks(self, part: Scheduled) -> None:
        """Let later requests share what a committed step computed of this one."""
        request = part.request
        if not self._prefix_caching or request.state_row == NO_STATE_ROW:
            return
        # Readmitted in the very next step, it has new blocks, computed so far and no farther.
        num_tokens = min(part.stop, request.num_known_tokens, request.num_computed_tokens)
        num_full = num_tokens // self._blocks.block_size
        first = part.start // self._blocks.block_size
        hashes = self._hashes(request, num_full)
        for index in range(first, num_full):
            self._blocks.remember(request.block_table[index], hashes[index], request.prefix_root)

    def forget_adapter(self, digest: str) -> None:
        """Drop the cached KV of an adapter or of a merged model."""
        for root in self._roots.pop(digest, ()):
            self._blocks.forget(root)

    def _plan_running(self, request: Request, budget: "_Budget", now: float) -> None:
        """Give a running request its tokens, preempting the newest ones if blocks run out."""
        if request.state_row == NO_STATE_ROW:  # preempted by one planned before it
            return
        num_tokens = _chunk(request, request.num_uncomputed_tokens, budget)
        if num_tokens == 0:
            return
        while not self._blocks.grow(request.block_table, request.num_computed_tokens + num_tokens):
            victim = self.running[-1]
            self._preempt(victim, budget, now)
            if victim is request:
                return
        self._give(request, num_tokens, budget)

    def _admit(self, budget: "_Budget", now: float) -> None:
        """Let waiting requests in: first one whose adapter had no turn for max_wait_s."""
        overdue = self._find_overdue(now)
        while overdue is not None:
            is_in = self._try_admit(overdue, budget, now)
            has_no_budget = budget.remaining == 0 and self._free_rows
            if is_in or has_no_budget or self._is_loading(overdue):  # it needs no place, only time
                overdue = None
            elif not self._make_way(overdue, budget, now):
                break
        for request in self.waiting.candidates():
            if budget.remaining == 0 or not self._free_rows:
                return
            if overdue is None or _may_overtake(request, overdue):
                self._try_admit(request, budget, now)

    def _find_overdue(self, now: float) -> Request | None:
        request = self.waiting.most_overdue()
        if request is None or now - self.waiting.waiting_since(request) <= self._config.max_wait_s:
            return None
        return request

    def _try_admit(self, request: Request, budget: "_Budget", now: float) -> bool:
        """Move a waiting request into the step, if its adapter, a row and blocks are there."""
        if request.adapter is not None and not self._lease(request):
            return False
        if request.num_pending or budget.remaining == 0 or not self._free_rows:
            return False
        hashes = self._known_prefix(request)
        num_cached = len(hashes) * self._blocks.block_size
        num_uncached = request.num_uncomputed_tokens - num_cached
        # Room for all of it, not only this chunk: admitting what must soon give way helps nobody.
        self._blocks.reuse(request.block_table, hashes)
        if not self._blocks.grow(request.block_table, num_cached + num_uncached):
            self._blocks.release(request.block_table)
            return False
        self._start(request, num_cached, now)
        self._give(request, _chunk(request, num_uncached, budget), budget)
        return True

    def _start(self, request: Request, num_cached: int, now: float) -> None:
        self.waiting.admit(request, now)
        self.running.append(request)
        request.state_row = self._free_rows.pop()
        request.num_computed_tokens = num_cached
        request.admitted_time = now
        request.num_admitted_tokens = request.num_known_tokens
        if request.first_scheduled_time is None:  # later its own blocks are what it finds
            request.first_scheduled_time = now
            request.num_cached_tokens = num_cached
            self.prefix_queries += len(request.prompt_ids)
            self.prefix_hits += num_cached

    def _lease(self, request: Request) -> bool:
        """Hold the request's adapter; True once it is in the bank."""
        assert request.adapter is not None
        if not request.holds_adapter:
            request.holds_adapter = self._adapters.acquire(request.adapter)
        return request.holds_adapter and self._adapters.is_ready(request.adapter.digest)

    def _known_prefix(self, request: Request) -> list[bytes]:
        """The leading blocks that need not be computed; one token at least always is."""
        if not self._prefix_caching or request.sampling.prompt_logprobs is not None:
            return []
        num_full = (request.num_known_tokens - 1) // self._blocks.block_size
        hashes = self._hashes(request, num_full)[:num_full]
        return hashes[: self._blocks.find(hashes)]

    def _hashes(self, request: Request, num_full: int) -> list[bytes]:
        """The request's hash chain over its first `num_full` blocks at least."""
        size, hashes = self._blocks.block_size, request.block_hashes
        while len(hashes) < num_full:
            parent = hashes[-1] if hashes else request.prefix_root
            start = len(hashes) * size
            hashes.append(extend_chain(parent, request.known_tokens(start, start + size)))
        return hashes

    def _make_way(self, request: Request, budget: "_Budget", now: float) -> bool:
        """Take something from another adapter's requests for one that has waited too long.

        First the leases of those that wait too, then a place in the step from one that has had its
        turn. False if nobody has yet: then the request waits for it.
        """
        if _lacks_bank(request) and self._take_idle_leases():
            return True
        victims = [other for other in self.running if self._had_turn(other, request, now)]
        if _lacks_bank(request):  # only adapters that nobody else runs on leave the bank
            kept = {other.fairness_key for other in self.running if other not in victims}
            victims = [v for v in victims if v.adapter is not None and v.fairness_key not in kept]
        if not victims:
            return False
        victim = max(victims, key=lambda other: self.waiting.served(other.fairness_key))
        self._preempt(victim, budget, now)
        return True

    def _had_turn(self, other: Request, request: Request, now: float) -> bool:
        """Whether a running request may give way: it has had max_wait_s, and got on by a token.

        (A prompt that takes longer than that would otherwise never be done.)
        """
        is_other = other.fairness_key != request.fairness_key
        got_on = other.num_known_tokens + other.num_pending > other.num_admitted_tokens
        return is_other and got_on and now - other.admitted_time > self._config.max_wait_s

    def _take_idle_leases(self) -> bool:
        """Release the ready adapters that other waiting requests hold; False if there are none."""
        idle = [
            other for other in self.waiting if other.holds_adapter and not self._is_loading(other)
        ]
        for other in idle:
            self._release_adapter(other)
        return bool(idle)

    def _is_loading(self, request: Request) -> bool:
        return request.holds_adapter and not self._adapters.is_ready(request.fairness_key)

    def _give(self, request: Request, num_tokens: int, budget: "_Budget") -> None:
        budget.give(request, num_tokens)
        self._charge(request, num_tokens)

    def _charge(self, request: Request, num_tokens: int) -> None:
        is_decode = request.num_uncomputed_tokens == 1
        self.waiting.charge(request.fairness_key, num_tokens, is_decode=is_decode)

    def _preempt(self, request: Request, budget: "_Budget", now: float) -> None:
        """Send a running request back to the queue; it recomputes what it loses."""
        self._charge(request, -budget.take_back(request))
        self.running.remove(request)
        self._release(request)
        request.num_computed_tokens = 0
        request.queued_time = now
        self.num_preemptions += 1
        self.waiting.push(request)

    def _release(self, request: Request) -> None:
        self._blocks.release(request.block_table)
        if request.state_row != NO_STATE_ROW:
            self._free_rows.append(request.state_row)
            request.state_row = NO_STATE_ROW
        if request.holds_adapter:
            self._release_adapter(request)

    def _release_adapter(self, request: Request) -> None:
        assert request.adapter is not None
        request.holds_adapter = False
        self._adapters.release(request.adapter.digest)

    def _launch(self, budget: "_Budget") -> Plan:
        """Turn counts into parts, and count their tokens as computed from here on."""
        decodes: list[Scheduled] = []
        chunks: list[Scheduled] = []
        for request, num_tokens in budget.given.items():
            start = request.num_computed_tokens
            is_decode = request.num_uncomputed_tokens == 1 and start >= len(request.prompt_ids)
            request.num_computed_tokens += num_tokens
            samples = request.num_uncomputed_tokens == 0
            request.num_pending += samples
            part = Scheduled(request, start, num_tokens, samples)
            (decodes if is_decode else chunks).append(part)
        return Plan(tuple(decodes), tuple(chunks))


class _Budget:
    """Tokens of the step being planned, by request."""

    def __init__(self, num_tokens: int) -> None:
        self.remaining = num_tokens
        self.given: dict[Request, int] = {}

    def give(self, request: Request, num_tokens: int) -> None:
        self.given[request] = num_tokens
        self.remaining -= num_tokens

    def take_back(self, request: Request) -> int:
        num_tokens = self.given.pop(request, 0)
        self.remaining += num_tokens
        return num_tokens


def _chunk(request: Request, num_tokens: int, budget: _Budget) -> int:
    """How many of a request's tokens the step may take."""
    if request.sampling.prompt_logprobs is not None and not request.output_ids:
        num_tokens = min(num_tokens, _MAX_SCORED_TOKENS)
    return min(num_tokens, budget.remaining)


def _lacks_bank(request: Request) -> bool:
    """Whether a request waits for room in the bank, not yet for its load."""
    return request.adapter is not None and not request.holds_adapter


def _may_overtake(request: Request, overdue: Request) -> bool:
    """Whether letting a younger request in keeps nothing from one that waits for room.

    It waits for the bank: then a request of the base may. It waits for blocks or a row: nobody may.
    """
    return _lacks_bank(overdue) and request.adapter is None
