"""The scheduler inside its engine, over a simulated device that notices every wrong read."""

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from server.engine.request import AdapterRef
from tests.server.engine.simulated import Simulation

FEW = settings(stateful_step_count=40, deadline=None)
MANY = settings(stateful_step_count=80, deadline=None)
ONE_PAGE, ALSO_ONE, TWO_PAGES, WHOLE_BANK, DAMAGED = (
    AdapterRef(digest, rows) for digest, rows in [("a", 1), ("b", 8), ("c", 9), ("d", 24), ("x", 3)]
)
ADAPTERS = [None, ONE_PAGE, ALSO_ONE, TWO_PAGES, WHOLE_BANK, DAMAGED]


class SchedulerMachine(RuleBasedStateMachine):
    """Few blocks, few rows, a small bank: something always runs out."""

    @initialize(
        overlap=st.booleans(),
        prefix_caching=st.booleans(),
        token_fair=st.booleans(),
        max_step_tokens=st.sampled_from([3, 8, 32]),
        num_blocks=st.sampled_from([8, 12]),
    )
    def set_up(
        self,
        overlap: bool,
        prefix_caching: bool,
        token_fair: bool,
        max_step_tokens: int,
        num_blocks: int,
    ) -> None:
        self.simulation = Simulation(
            overlap=overlap,
            prefix_caching=prefix_caching,
            token_fair=token_fair,
            max_step_tokens=max_step_tokens,
            num_blocks=num_blocks,
            block_size=4,
            num_pages=3,
            max_running=3,
            max_wait_s=5.0,
        )
        self.simulation.bank.damaged["x"] = ValueError("torn object")
        self.aborted: set[str] = set()

    @rule(
        prompt=st.lists(st.integers(0, 1), min_size=1, max_size=20),
        adapter=st.sampled_from(ADAPTERS),
        max_tokens=st.integers(1, 12),
        ignore_eos=st.booleans(),
        tenant=st.sampled_from(["", "t"]),
    )
    def add(
        self,
        prompt: list[int],
        adapter: AdapterRef | None,
        max_tokens: int,
        ignore_eos: bool,
        tenant: str,
    ) -> None:
        self.simulation.add(
            prompt, adapter, max_tokens=max_tokens, ignore_eos=ignore_eos, tenant=tenant
        )

    @precondition(lambda self: self.simulation.requests)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        request = data.draw(st.sampled_from(self.simulation.requests))
        if not request.is_finished:
            self.aborted.add(request.request_id)
        self.simulation.engine.abort(request.request_id)
        self.simulation.check()

    @rule(count=st.integers(1, 6))
    def step(self, count: int) -> None:
        for _ in range(count):
            self.simulation.step()

    @rule(seconds=st.sampled_from([0.1, 3.0, 6.0]))
    def wait(self, seconds: float) -> None:
        self.simulation.now += seconds

    @precondition(lambda self: self.simulation.executor.waiting)
    @rule(data=st.data())
    def end_a_load(self, data: st.DataObject) -> None:
        waiting = self.simulation.executor.waiting
        self.simulation.executor.finish(data.draw(st.integers(0, len(waiting) - 1)))

    @rule(adapter=st.sampled_from(ADAPTERS[1:]))
    def drop(self, adapter: AdapterRef) -> None:
        self.simulation.engine.drop_adapter(adapter.digest)

    def teardown(self) -> None:
        if not hasattr(self, "simulation"):
            return
        self.simulation.run(seconds=0.5)
        for request in self.simulation.requests:
            self.check_outcome(request.request_id)
        assert self.simulation.blocks.num_free == self.simulation.blocks.num_blocks
        self.simulation.load(WHOLE_BANK)  # nothing is left leased

    def check_outcome(self, request_id: str) -> None:
        """A request has its own answer, an error, or was aborted; and it ended once."""
        [request] = [r for r in self.simulation.requests if r.request_id == request_id]
        outputs = self.simulation.outputs.get(request_id, [])
        token_ids = [token for output in outputs for token in output.token_ids]
        endings = [o for o in outputs if o.finish_reason is not None or o.error is not None]
        expected = self.simulation.expected(request)
        if request_id in self.aborted:
            assert not endings
            assert token_ids == expected[: len(token_ids)]
        elif request.adapter is DAMAGED:
            assert [ending.error_code for ending in endings] == ["adapter_load_failed"]
            assert token_ids == []
        else:
            assert token_ids == expected
            assert [ending.error for ending in endings] == [None]


def test_every_request_gets_its_own_answer_whatever_the_order_of_events() -> None:
    run_state_machine_as_test(SchedulerMachine, settings=settings(FEW, max_examples=80))


@pytest.mark.slow
def test_every_request_gets_its_own_answer_over_many_orders_of_events() -> None:
    run_state_machine_as_test(SchedulerMachine, settings=settings(MANY, max_examples=1500))
