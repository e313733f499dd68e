"""An engine whose device is simulated: KV is a hash chain, so any wrong read changes the tokens."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch

from server.config import SchedulerConfig
from server.engine.adapter_cache import AdapterCache
from server.engine.batch import build_input
from server.engine.block_manager import BlockManager
from server.engine.engine import Engine
from server.engine.model_runner import Sampled
from server.engine.request import NO_STATE_ROW, AdapterRef, Request, SamplingParams
from server.engine.scheduler import Plan, Scheduled, Scheduler
from server.engine.weight_sets import WeightSets
from tests.server.engine.loading import FakeBank, HandExecutor

if TYPE_CHECKING:
    from server.engine.messages import RequestOutput

VOCAB = 8
EOS = 0


def chain_after(chain: int, token: int) -> int:
    """The KV of a token, given the KV of the one before it."""
    return hash((chain, token))


def next_token(chain: int) -> int:
    """What the simulated model samples after a context."""
    return (chain >> 7) % VOCAB


@dataclass
class Truth:
    """What a request's tokens and KV must be, worked out alone."""

    tokens: list[int]
    chains: list[int]

    @classmethod
    def of(cls, request: Request, length: int) -> "Truth":
        """The prompt, and what follows it up to `length` tokens."""
        chain = int.from_bytes(request.prefix_root[:7], "big")
        tokens, chains = list(request.prompt_ids), []
        for position in range(length):
            if position == len(tokens):
                tokens.append(next_token(chain))
            chain = chain_after(chain, tokens[position])
            chains.append(chain)
        return cls(tokens, chains)


@dataclass
class SimulatedStep:
    """A launched plan and the tokens that it samples."""

    runner: "SimulatedRunner"
    plan: Plan
    tokens: list[int]


class SimulatedRunner:
    """Runs plans as a device would, in launch order, and checks each against the truth."""

    def __init__(self, simulation: "Simulation") -> None:
        self._simulation = simulation
        self._last_tokens = torch.zeros(simulation.config.max_running, dtype=torch.int64)
        self._kv: dict[int, int] = {}
        self.plans: list[Plan] = []

    def launch(self, plan: Plan) -> SimulatedStep:
        """Check a plan, then compute it."""
        self._check_bounds(plan)
        simulation = self._simulation
        step = build_input(
            plan, simulation.adapters, self._last_tokens, simulation.blocks.block_size
        )
        tokens, slots = step.token_ids.tolist(), step.slot_mapping.tolist()
        sampled = []
        first = 0
        for part in plan.parts:
            last = first + part.num_tokens
            self._compute(part, tokens[first:last], slots[first:last])
            first = last
            if part.samples:
                token = next_token(self._kv[slots[last - 1]])
                self._last_tokens[part.request.state_row] = token
                sampled.append(token)
        self.plans.append(plan)
        return SimulatedStep(self, plan, sampled)

    def collect(self, launched: SimulatedStep) -> list[Sampled]:
        """Hand the tokens over."""
        parts = [part for part in launched.plan.parts if part.samples]
        return [Sampled(part, t, None) for part, t in zip(parts, launched.tokens, strict=True)]

    def _compute(self, part: Scheduled, tokens: list[int], slots: list[int]) -> None:
        request, size = part.request, self._simulation.blocks.block_size
        truth = Truth.of(request, part.stop)
        table = request.block_table
        context = [self._kv.get(table[p // size] * size + p % size) for p in range(part.start)]
        assert context == truth.chains[: part.start], f"{request.request_id} reads others' KV"
        assert tokens == truth.tokens[part.start : part.stop], "a wrong input token"
        for slot, chain in zip(slots, truth.chains[part.start :], strict=True):
            self._kv[slot] = chain

    def _check_bounds(self, plan: Plan) -> None:
        simulation = self._simulation
        requests = [part.request for part in plan.parts]
        assert (
            0
            < sum(part.num_tokens for part in plan.parts)
            <= (
                simulation.config.max_step_tokens
                if plan.decodes
                else simulation.config.max_prefill_tokens
            )
        )
        assert len(set(map(id, requests))) == len(requests) <= simulation.config.max_running
        assert all(part.num_tokens == 1 and part.samples for part in plan.decodes)
        for request in requests:
            assert any(request is running for running in simulation.scheduler.running)
            if request.adapter is not None:
                digest = request.adapter.digest
                assert simulation.adapters.is_ready(digest), "it runs without its adapter"
                pages = simulation.adapters.pages(digest)
                assert {simulation.bank.pages[page] for page in pages} == {digest}


class Simulation:
    """The real engine, scheduler, blocks and adapter cache, over simulated devices and a clock."""

    def __init__(
        self,
        *,
        overlap: bool = False,
        num_blocks: int = 64,
        block_size: int = 4,
        num_pages: int = 4,
        page_rows: int = 8,
        prefix_caching: bool = True,
        **config: Any,
    ) -> None:
        self.config = SchedulerConfig(
            **{
                "max_step_tokens": 32,
                "max_prefill_tokens": config.get("max_step_tokens", 32),
                "max_running": 8,
                "max_wait_s": 10.0,
                **config,
            }
        )
        self.now = 100.0
        self.bank, self.executor = FakeBank(), HandExecutor()
        self.blocks = BlockManager(num_blocks, block_size)
        self.adapters = AdapterCache(
            num_pages=num_pages,
            page_rows=page_rows,
            max_host_bytes=10 * num_pages,
            read=self.bank.read,
            write=self.bank.write,
            executor=self.executor,
        )
        self.scheduler = Scheduler(
            self.config, self.blocks, self.adapters, "base", prefix_caching=prefix_caching
        )
        self.runner = SimulatedRunner(self)
        runner: Any = self.runner
        self.weight_sets = WeightSets(runner, load=lambda folder: runner)
        self.engine = Engine(
            self.scheduler, self.weight_sets, self.blocks, self.adapters, (EOS,), overlap=overlap
        )
        self.requests: list[Request] = []
        self.outputs: dict[str, list[RequestOutput]] = {}
        self._ids = itertools.count()

    def add(
        self,
        prompt: Sequence[int] = (1, 2, 3),
        adapter: AdapterRef | None = None,
        *,
        max_tokens: int = 4,
        ignore_eos: bool = True,
        tenant: str = "",
        age_s: float = 0.0,
    ) -> Request:
        """Queue a request, as if it had come `age_s` ago."""
        request = Request(
            request_id=str(next(self._ids)),
            prompt_ids=list(prompt),
            sampling=SamplingParams(max_tokens=max_tokens, ignore_eos=ignore_eos),
            adapter=adapter,
            tenant=tenant,
            arrival_time=self.now - age_s,
            seed=0,
        )
        self.requests.append(request)
        self.engine.add(request)
        return request

    def step(self) -> Plan | None:
        """One engine step at the simulated time; the plan that it launched."""
        num_plans = len(self.runner.plans)
        with mock.patch("server.engine.engine.time", SimpleNamespace(monotonic=lambda: self.now)):
            outputs = self.engine.step()
        for output in outputs:
            self.outputs.setdefault(output.request_id, []).append(output)
        self.check()
        return self.runner.plans[-1] if len(self.runner.plans) > num_plans else None

    def run(self, max_steps: int = 2000, *, seconds: float = 0.0, load: bool = True) -> int:
        """Step until nothing is left to do; how many steps it took."""
        for num_steps in range(max_steps):
            if not self.engine.has_work:
                return num_steps
            if load and self.executor.waiting:
                self.executor.finish()
            self.step()
            self.now += seconds
        unfinished = [r.request_id for r in self.requests if not r.is_finished]
        raise AssertionError(f"requests {unfinished} are not done after {max_steps} steps")

    def load(self, *adapters: AdapterRef) -> None:
        """Bring adapters into the bank, as idle ones."""
        self._finish_loads()
        for adapter in adapters:
            self.adapters.prefetch(adapter)
            self._finish_loads()
            assert self.adapters.is_ready(adapter.digest)

    def _finish_loads(self) -> None:
        while self.executor.waiting:
            self.executor.finish()
        self.adapters.poll()

    def expected(self, request: Request) -> list[int]:
        """The output of a request that nothing aborts."""
        length = len(request.prompt_ids)
        tokens = Truth.of(request, length + request.sampling.max_tokens).tokens[length:]
        if EOS in tokens and not request.sampling.ignore_eos:
            return tokens[: tokens.index(EOS) + 1]
        return tokens

    def check(self) -> None:
        """Assert what must hold between two steps."""
        running, waiting = self.scheduler.running, list(self.scheduler.waiting)
        assert len(running) <= self.config.max_running
        rows = [request.state_row for request in running]
        assert len(set(rows)) == len(rows)
        assert set(rows) <= set(range(self.config.max_running))
        for request in running:
            self._check_running(request)
        for request in self.requests:
            assert request.num_pending in (0, 1)
            if not any(request is other for other in running):
                held = (request.block_table, request.state_row, request.num_computed_tokens)
                assert request.is_finished or held == ([], NO_STATE_ROW, 0)
            if request.is_finished:
                held_at_end = (request.block_table, request.state_row, request.holds_adapter)
                assert held_at_end == ([], NO_STATE_ROW, False)
                assert not any(request is other for other in waiting)
        held_blocks = {block for request in running for block in request.block_table}
        assert self.blocks.num_free == self.blocks.num_blocks - len(held_blocks)
        self._check_sharing(running)

    def _check_running(self, request: Request) -> None:
        size = self.blocks.block_size
        assert not request.is_finished
        assert len(request.block_table) * size >= request.num_computed_tokens
        assert request.num_computed_tokens <= request.num_known_tokens + request.num_pending
        num_sampled = len(request.output_ids) + request.num_pending
        assert num_sampled <= max(request.sampling.max_tokens, 1)
        if request.adapter is not None:
            assert request.holds_adapter
            assert self.adapters.is_ready(request.adapter.digest)

    def _check_sharing(self, running: Sequence[Request]) -> None:
        """A block in two tables holds the same full prefix under the same root."""
        size = self.blocks.block_size
        owner: dict[int, tuple[bytes, list[int]]] = {}
        for request in running:
            for index, block in enumerate(request.block_table):
                stop = (index + 1) * size
                holds = (request.prefix_root, request.known_tokens(0, stop))
                if block in owner:
                    assert owner[block] == holds
                    assert stop <= request.num_computed_tokens
                owner[block] = holds
