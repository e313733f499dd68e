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

from server.engine.request import AdapterRef, SamplingParams
from tests.server.engine.simulated import EOS, VOCAB, Simulation

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
        max_tokens=st.integers(0, 12),
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


def test_a_step_mixes_decodes_with_chunks_of_prompts_within_its_budget() -> None:
    simulation = Simulation(max_step_tokens=8, max_running=4)
    short = simulation.add([1, 2, 3], max_tokens=8)
    long = simulation.add(range(20), max_tokens=8)

    first, second, third = simulation.step(), simulation.step(), simulation.step()

    assert first is not None
    assert second is not None
    assert third is not None
    assert [(p.request, p.start, p.num_tokens, p.samples) for p in first.chunks] == [
        (short, 0, 3, True),
        (long, 0, 5, False),
    ]
    assert [part.request for part in second.decodes] == [short]
    assert [(p.request, p.start, p.num_tokens) for p in second.chunks] == [(long, 5, 7)]
    assert [(p.start, p.num_tokens, p.samples) for p in third.chunks] == [(12, 7, False)]


def test_a_step_is_longer_where_nobody_decodes_and_so_nobody_waits() -> None:
    simulation = Simulation(max_step_tokens=8, max_prefill_tokens=24, max_running=2)
    simulation.add(range(30), max_tokens=8)
    simulation.step()
    simulation.add(range(100, 130), max_tokens=8)
    simulation.step()
    simulation.step()
    chunks = [[part.num_tokens for part in plan.chunks] for plan in simulation.runner.plans]
    assert chunks == [[24], [6, 18], [7]]
    assert len(simulation.runner.plans[2].decodes) == 1


def test_a_prompt_whose_own_logprobs_are_wanted_takes_few_tokens_of_a_long_step() -> None:
    simulation = Simulation(max_step_tokens=2000, num_blocks=4096)
    scored, other = simulation.add(range(1300)), simulation.add(range(100))
    scored.sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)
    for _ in range(3):
        simulation.step()
    given = [[part.num_tokens for part in plan.chunks] for plan in simulation.runner.plans[:3]]
    assert given == [[512, 100], [512], [276]]
    assert other.output_ids


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("length", [1, 8, 9, 16])  # 9 leaves one token for the second step
def test_a_request_for_no_tokens_ends_when_its_prompt_is_computed(
    length: int, overlap: bool
) -> None:
    simulation = Simulation(max_step_tokens=8, num_blocks=4, overlap=overlap)
    request = simulation.add([1] * length, max_tokens=0)
    request.sampling = SamplingParams(max_tokens=0, stop_token_ids=tuple(range(VOCAB)))

    simulation.run()

    [output] = simulation.outputs[request.request_id]
    assert (output.token_ids, output.logprobs, output.finish_reason) == ([], None, "length")
    assert output.first is not None
    assert sum(part.num_tokens for plan in simulation.runner.plans for part in plan.parts) == length


def test_a_prompt_longer_than_a_step_neither_holds_up_decodes_nor_is_held_up() -> None:
    simulation = Simulation(max_step_tokens=8, max_running=2)
    decoding = simulation.add([1], max_tokens=30)
    simulation.step()
    long = simulation.add(range(21), max_tokens=1)

    for _ in range(3):
        simulation.step()

    assert len(decoding.output_ids) == 4
    assert long.is_finished


def test_the_tokens_of_a_step_in_flight_are_planned_before_they_are_known() -> None:
    simulation = Simulation(overlap=True)
    request = simulation.add([1, 2, 3], max_tokens=3)

    simulation.step()
    assert (request.output_ids, request.num_pending, request.num_uncomputed_tokens) == ([], 1, 1)
    second = simulation.step()  # launched before the first step's token is on the host

    assert second is not None
    assert [(part.start, part.num_tokens) for part in second.decodes] == [(3, 1)]
    assert (len(request.output_ids), request.num_pending) == (1, 1)
    simulation.run()
    assert request.output_ids == simulation.expected(request)


def test_no_step_is_launched_beyond_max_tokens() -> None:
    simulation = Simulation(overlap=True)
    request = simulation.add([1, 2, 3], max_tokens=2)

    simulation.run()

    assert len(simulation.runner.plans) == 2
    assert len(request.output_ids) == 2


@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_that_stops_early_frees_everything_and_its_over_run_token_is_dropped(
    overlap: bool,
) -> None:
    simulation = Simulation(overlap=overlap)
    prompts = [[first, second] for first in range(8) for second in range(8)]
    requests = [simulation.add(p, max_tokens=30, ignore_eos=False) for p in prompts]

    simulation.run()

    stopped = [request for request in requests if request.output_ids[-1] == EOS]
    assert stopped
    for request in requests:
        assert request.output_ids == simulation.expected(request)
    assert simulation.blocks.num_free == simulation.blocks.num_blocks


def test_when_blocks_run_out_the_newest_request_gives_way_and_answers_the_same_later() -> None:
    simulation = Simulation(num_blocks=6, block_size=4, prefix_caching=False)
    old = simulation.add([1, 2, 3, 4, 5, 6, 7], max_tokens=12)
    new = simulation.add([7, 6, 5, 4, 3, 2, 1], max_tokens=12)

    while not simulation.scheduler.num_preemptions:
        simulation.step()

    assert simulation.scheduler.running == [old]
    assert list(simulation.scheduler.waiting) == [new]
    assert new.output_ids
    simulation.run()
    for request in (old, new):
        assert request.output_ids == simulation.expected(request)


def test_a_request_preempted_with_a_token_pending_comes_back_after_that_token_is_known() -> None:
    simulation = Simulation(overlap=True, num_blocks=6, block_size=4)
    old = simulation.add([1, 2, 3, 4, 5, 6, 7], max_tokens=12)
    new = simulation.add([7, 6, 5, 4, 3, 2, 1], max_tokens=12)
    while not simulation.scheduler.num_preemptions:
        num_outputs = len(new.output_ids)
        simulation.step()

    assert len(new.output_ids) == num_outputs + 1  # delivered although it runs no more
    assert (new.num_pending, new.num_computed_tokens, new.block_table) == (0, 0, [])
    simulation.run()
    for request in (old, new):
        assert request.output_ids == simulation.expected(request)


def test_a_resumed_request_takes_its_input_from_the_host_and_not_from_an_old_state_row() -> None:
    """With its prefix cached it resumes as a decode row: one token, whose value must be its own."""
    simulation = Simulation(overlap=True, block_size=4, max_running=1)
    request = simulation.add([1, 2, 3, 4, 5, 6, 7], max_tokens=12)
    for _ in range(3):
        simulation.step()
    simulation.now += 20
    other = simulation.add([1], ONE_PAGE, max_tokens=2, age_s=15)
    simulation.load(ONE_PAGE)

    simulation.run()

    resumed = [p for plan in simulation.runner.plans for p in plan.decodes if p.num_tokens == 1]
    assert simulation.scheduler.num_preemptions == 1
    assert any(part.request is request and part.start == 8 for part in resumed)
    for each in (request, other):
        assert each.output_ids == simulation.expected(each)


def test_a_second_request_reuses_the_blocks_of_a_common_prefix() -> None:
    simulation = Simulation(block_size=4)
    simulation.add([*range(10), 11], max_tokens=1)
    simulation.run()

    second = simulation.add([*range(10), 12], max_tokens=1)
    plan = simulation.step()

    assert plan is not None
    assert [(part.start, part.num_tokens) for part in plan.chunks] == [(8, 3)]
    assert second.num_cached_tokens == 8
    assert (simulation.scheduler.prefix_queries, simulation.scheduler.prefix_hits) == (22, 8)


def test_what_a_preempted_request_finds_of_its_own_counts_as_no_hit() -> None:
    simulation = Simulation(num_blocks=6, block_size=4)
    simulation.add([1, 2, 3, 4, 5, 6, 7], max_tokens=12)
    simulation.add([7, 6, 5, 4, 3, 2, 1], max_tokens=12)

    simulation.run()

    scheduler = simulation.scheduler
    assert scheduler.num_preemptions > 0
    assert (scheduler.prefix_queries, scheduler.prefix_hits) == (14, 0)


def test_the_last_token_of_a_prompt_is_always_computed() -> None:
    simulation = Simulation(block_size=4)
    simulation.add(range(8), max_tokens=1)
    simulation.run()

    simulation.add(range(8), max_tokens=1)
    plan = simulation.step()

    assert plan is not None
    assert [(part.start, part.num_tokens, part.samples) for part in plan.chunks] == [(4, 4, True)]


def test_blocks_filled_while_generating_are_shared_too() -> None:
    simulation = Simulation(block_size=4)
    first = simulation.add([1, 2, 3], max_tokens=8)
    simulation.run()

    simulation.add([1, 2, 3, *first.output_ids, 5], max_tokens=1)
    plan = simulation.step()

    assert plan is not None
    assert plan.parts[0].start == 8


@pytest.mark.parametrize("difference", ["adapter", "tenant"])
def test_no_prefix_is_shared_between_adapters_or_tenants(difference: str) -> None:
    simulation = Simulation(block_size=4)
    simulation.load(ONE_PAGE)
    simulation.add(range(12), max_tokens=1)
    simulation.run()

    if difference == "adapter":
        second = simulation.add(range(12), ONE_PAGE, max_tokens=1)
    else:
        second = simulation.add(range(12), tenant="other", max_tokens=1)
    simulation.run()

    assert second.num_cached_tokens == 0


def test_without_prefix_caching_nothing_is_reused() -> None:
    simulation = Simulation(block_size=4, prefix_caching=False)
    for _ in range(2):
        request = simulation.add(range(12), max_tokens=1)
        simulation.run()

    assert request.num_cached_tokens == 0


def test_a_prompt_whose_logprobs_are_wanted_is_computed_in_full() -> None:
    simulation = Simulation(block_size=4)
    simulation.add(range(12), max_tokens=1)
    simulation.run()
    request = simulation.add(range(12), max_tokens=1)
    request.sampling = SamplingParams(max_tokens=1, prompt_logprobs=0)

    plan = simulation.step()

    assert plan is not None
    assert plan.chunks[0].start == 0


def test_the_cached_kv_of_a_dropped_adapter_is_found_no_more() -> None:
    simulation = Simulation(block_size=4)
    simulation.load(ONE_PAGE)
    simulation.add(range(12), ONE_PAGE, max_tokens=1)
    simulation.run()
    simulation.engine.drop_adapter("a")

    again = simulation.add(range(12), ONE_PAGE, max_tokens=1)
    simulation.run()

    assert again.num_cached_tokens == 0


def test_a_step_of_before_a_readmission_vouches_for_no_block_that_it_did_not_compute() -> None:
    simulation = Simulation(block_size=4, max_step_tokens=8)
    request = simulation.add(range(16), max_tokens=1)
    plan = simulation.step()
    assert plan is not None
    simulation.blocks.forget(request.prefix_root)
    request.num_computed_tokens = 4  # as if readmitted, and no farther yet than one block

    simulation.scheduler.remember_blocks(plan.chunks[0])

    hashes = request.block_hashes
    assert [simulation.blocks.find([block_hash]) for block_hash in hashes[:2]] == [1, 0]


def test_while_one_adapter_loads_all_others_run() -> None:
    simulation = Simulation()
    simulation.load(ALSO_ONE)
    waiting = simulation.add([1], ONE_PAGE, max_tokens=3)
    base = simulation.add([1], max_tokens=3)
    other = simulation.add([1], ALSO_ONE, max_tokens=3)

    for _ in range(3):
        simulation.step()

    assert base.is_finished
    assert other.is_finished
    assert (waiting.output_ids, waiting.is_finished) == ([], False)
    simulation.run()
    assert waiting.output_ids == simulation.expected(waiting)


def test_a_request_whose_adapter_cannot_be_loaded_ends_with_an_error_and_others_go_on() -> None:
    simulation = Simulation()
    simulation.bank.damaged["x"] = ValueError("torn object")
    bad = simulation.add([1], DAMAGED)
    good = simulation.add([1], max_tokens=3)

    simulation.run()

    [output] = simulation.outputs[bad.request_id]
    assert output.error == "The adapter could not be loaded: torn object"
    assert good.output_ids == simulation.expected(good)


def test_the_tier_that_is_told_is_the_one_at_arrival() -> None:
    simulation = Simulation()
    cold = simulation.add([1], ONE_PAGE, max_tokens=1)
    simulation.run()
    warm = simulation.add([1], ONE_PAGE, max_tokens=1)
    simulation.run()

    assert (cold.tier, warm.tier) == ("disk", "gpu")


def test_aborting_a_request_frees_what_it_holds_at_once_wherever_it_is() -> None:
    simulation = Simulation(overlap=True, max_running=1)
    running, waiting = simulation.add(range(9)), simulation.add(range(9))
    simulation.step()

    for request in (running, waiting):
        simulation.engine.abort(request.request_id)
        simulation.check()

    assert simulation.blocks.num_free == simulation.blocks.num_blocks
    assert simulation.run() <= 2  # the step in flight is collected and its token dropped
    assert simulation.outputs == {}


def test_an_adapter_that_trickles_is_served_beside_one_that_floods() -> None:
    simulation = Simulation(max_running=2, max_wait_s=1000.0)
    simulation.load(ONE_PAGE, ALSO_ONE)
    for _ in range(40):
        simulation.add([1], ONE_PAGE, max_tokens=5)
    waits = []
    for _ in range(5):
        cold = simulation.add([1], ALSO_ONE, max_tokens=5)
        num_steps = 0
        while not cold.is_finished:
            simulation.step()
            num_steps += 1
        waits.append(num_steps)

    assert max(waits) <= 12  # its own five, and a flooding request that had begun


def test_a_flood_that_has_waited_for_ages_still_takes_turns() -> None:
    """In overload every request of the hot adapter is old; its age buys it nothing."""
    simulation = Simulation(max_running=1, max_wait_s=5.0)
    simulation.load(ONE_PAGE, ALSO_ONE)
    hot = [simulation.add([1], ONE_PAGE, max_tokens=4, age_s=100) for _ in range(20)]
    cold = [simulation.add([1], ALSO_ONE, max_tokens=4) for _ in range(4)]

    while not all(request.is_finished for request in cold):
        simulation.step()
        simulation.now += 0.1

    assert sum(request.is_finished for request in hot) <= 5


def test_a_newcomer_takes_no_more_than_its_turn_from_an_adapter_served_for_long() -> None:
    simulation = Simulation(max_running=1, max_wait_s=1000.0)
    simulation.load(ONE_PAGE, ALSO_ONE)
    simulation.add([1], ONE_PAGE, max_tokens=200)
    simulation.run()
    new = [simulation.add([1], ALSO_ONE, max_tokens=4) for _ in range(10)]
    old = [simulation.add([1], ONE_PAGE, max_tokens=4) for _ in range(3)]

    while not all(request.is_finished for request in old):
        simulation.step()

    assert sum(request.is_finished for request in new) <= 4


def test_tokens_of_a_request_that_gives_way_in_the_same_step_are_not_charged() -> None:
    simulation = Simulation(max_running=1, max_wait_s=5.0)
    simulation.load(ONE_PAGE)
    simulation.add([1, 2, 3], ONE_PAGE, max_tokens=50)
    simulation.step()
    simulation.now += 6
    simulation.add([1], age_s=6)

    simulation.step()

    assert simulation.scheduler.num_preemptions == 1
    assert simulation.scheduler.waiting.served("a") == 3


def test_when_more_adapters_are_wanted_than_fit_each_has_its_turn_in_bounded_time() -> None:
    simulation = Simulation(num_pages=1, num_blocks=100, max_wait_s=5.0)
    adapters = [AdapterRef(digest, 8) for digest in "pqrst"]
    requests = [simulation.add([1], adapter, max_tokens=300) for adapter in adapters]

    for _ in range(300):
        if simulation.executor.waiting:
            simulation.executor.finish()
        simulation.step()
        simulation.now += 0.2  # 60 s in all, 12 turns

    lengths = [len(request.output_ids) for request in requests]
    assert min(lengths) >= 20
    assert max(lengths) <= 120
    simulation.run(5000, seconds=0.2)
    for request in requests:
        assert request.output_ids == simulation.expected(request)


def test_waiting_requests_that_hold_the_whole_bank_do_not_lock_out_an_overdue_one() -> None:
    simulation = Simulation(num_pages=1, num_blocks=4, block_size=4, max_wait_s=5.0)
    simulation.load(ONE_PAGE)
    simulation.add([1] * 8, max_tokens=8)
    simulation.step()
    simulation.add([1] * 12, ONE_PAGE, max_tokens=1)  # leases the bank, and finds no blocks
    simulation.step()
    overdue = simulation.add([1], ALSO_ONE, max_tokens=1, age_s=100)

    simulation.run(200)

    assert overdue.output_ids == simulation.expected(overdue)


def test_an_overdue_request_preempts_only_those_that_had_a_turn() -> None:
    simulation = Simulation(max_running=2, max_wait_s=5.0)
    simulation.load(ONE_PAGE, ALSO_ONE)
    veteran = simulation.add([1], ONE_PAGE, max_tokens=90)
    simulation.step()
    simulation.now += 6
    fresh = simulation.add([1], max_tokens=90)
    simulation.step()

    overdue = simulation.add([1], ALSO_ONE, max_tokens=90, age_s=5.5)
    simulation.step()

    assert simulation.scheduler.running == [fresh, overdue]
    assert list(simulation.scheduler.waiting) == [veteran]


def test_an_overdue_request_waits_where_nobody_has_had_a_turn() -> None:
    simulation = Simulation(max_running=1, max_wait_s=5.0)
    fresh = simulation.add([1], max_tokens=90)
    simulation.step()
    simulation.load(ALSO_ONE)
    simulation.add([1], ALSO_ONE, max_tokens=90, age_s=100)

    simulation.now += 4
    simulation.step()

    assert simulation.scheduler.running == [fresh]


@pytest.mark.parametrize("length", [40, 41])  # the last step computes a full chunk, or one token
def test_nobody_gives_way_before_its_prompt_is_computed(length: int) -> None:
    """A prompt that takes longer than a turn would otherwise never come to its end."""
    simulation = Simulation(max_running=1, max_step_tokens=4, max_wait_s=5.0)
    simulation.load(ALSO_ONE)
    long = simulation.add(range(length), max_tokens=5)
    simulation.step()
    simulation.add([1], ALSO_ONE, max_tokens=5)

    while not long.output_ids:
        simulation.now += 6
        simulation.step()
        assert simulation.scheduler.running == [long]
    simulation.step()

    assert list(simulation.scheduler.waiting) == [long]


def test_an_overdue_request_takes_nobodys_place_where_the_step_is_only_full_of_prompts() -> None:
    simulation = Simulation(max_running=3, max_step_tokens=3, max_wait_s=5.0)
    simulation.load(ONE_PAGE)
    veteran = simulation.add([1], max_tokens=50)
    simulation.step()
    simulation.now += 6
    long = simulation.add(range(40), max_tokens=5)
    simulation.step()
    simulation.add([1], ONE_PAGE, max_tokens=5, age_s=6)

    simulation.step()

    assert simulation.scheduler.running == [veteran, long]


def test_an_overdue_request_preempts_none_of_its_own_adapter() -> None:
    simulation = Simulation(max_running=1, max_wait_s=5.0)
    first = simulation.add([1], max_tokens=30)
    simulation.step()
    simulation.add([1], max_tokens=30)
    simulation.now += 100

    simulation.step()

    assert simulation.scheduler.running == [first]
    assert simulation.scheduler.num_preemptions == 0


def test_making_room_in_the_bank_preempts_no_request_of_the_base() -> None:
    simulation = Simulation(num_pages=1, max_wait_s=5.0)
    simulation.load(ONE_PAGE)
    base = [simulation.add([1], max_tokens=200) for _ in range(3)]
    holder = simulation.add([1], ONE_PAGE, max_tokens=200)
    simulation.step()
    simulation.now += 6
    overdue = simulation.add([1], ALSO_ONE, max_tokens=2, age_s=6)

    simulation.step()

    assert simulation.scheduler.running == base
    assert simulation.scheduler.num_preemptions == 1
    assert holder in list(simulation.scheduler.waiting)
    assert overdue.holds_adapter


def test_an_adapter_is_vacated_only_when_all_who_run_on_it_had_their_turn() -> None:
    simulation = Simulation(num_pages=1, max_wait_s=5.0)
    simulation.load(ONE_PAGE)
    simulation.add([1], ONE_PAGE, max_tokens=200)
    simulation.step()
    simulation.now += 3
    simulation.add([1], ONE_PAGE, max_tokens=200)
    simulation.step()
    simulation.now += 3
    overdue = simulation.add([1], ALSO_ONE, max_tokens=2, age_s=6)

    simulation.step()
    assert simulation.scheduler.num_preemptions == 0  # one alone would free no page
    simulation.now += 3
    simulation.step()

    assert simulation.scheduler.num_preemptions == 2
    assert overdue.holds_adapter


def test_while_an_overdue_request_waits_for_the_bank_the_base_goes_on_and_adapters_do_not() -> None:
    simulation = Simulation(num_pages=1, max_wait_s=5.0)
    simulation.load(ONE_PAGE)
    simulation.add([1], ONE_PAGE, max_tokens=200)
    simulation.step()
    simulation.add([1], ALSO_ONE, max_tokens=2, age_s=6)

    base = simulation.add([1], max_tokens=200)
    same = simulation.add([1], ONE_PAGE, max_tokens=200)
    simulation.step()

    assert base in simulation.scheduler.running
    assert same in list(simulation.scheduler.waiting)


def test_while_an_overdue_request_waits_for_blocks_nobody_takes_them_first() -> None:
    simulation = Simulation(num_blocks=8, block_size=4, max_wait_s=5.0)
    simulation.load(ONE_PAGE)
    simulation.add([1] * 17, ONE_PAGE, max_tokens=8)
    simulation.step()
    large = simulation.add([2] * 17, max_tokens=4, age_s=6)
    small = simulation.add([1], ONE_PAGE, max_tokens=1)

    simulation.step()

    assert simulation.blocks.num_free > 1
    assert {large, small} <= set(simulation.scheduler.waiting)


def test_a_young_request_may_pass_one_that_waits_for_blocks() -> None:
    simulation = Simulation(num_blocks=8, block_size=4, max_wait_s=5.0)
    simulation.load(ONE_PAGE)
    simulation.add([1] * 17, ONE_PAGE, max_tokens=8)
    simulation.step()
    simulation.add([2] * 17, max_tokens=4)
    small = simulation.add([1], ONE_PAGE, max_tokens=9)

    simulation.step()

    assert small in simulation.scheduler.running


def test_the_newest_request_gives_way_to_itself_where_its_own_growth_finds_no_block() -> None:
    simulation = Simulation(num_blocks=4, block_size=4, prefix_caching=False)
    old = simulation.add([1] * 9, max_tokens=4)
    new = simulation.add([2] * 4, max_tokens=4)
    simulation.step()

    simulation.step()

    assert simulation.scheduler.running == [old]
    assert list(simulation.scheduler.waiting) == [new]
    simulation.run()
    assert new.output_ids == simulation.expected(new)


def test_a_request_that_gave_way_waits_from_then_on_before_it_counts_as_overdue() -> None:
    simulation = Simulation(num_blocks=6, block_size=4, max_wait_s=5.0)
    simulation.load(ONE_PAGE)
    old = simulation.add([1, 2, 3, 4, 5, 6, 7], max_tokens=12)
    simulation.add([7, 6, 5, 4, 3, 2, 1], ONE_PAGE, max_tokens=12)
    simulation.step()
    simulation.now += 6
    while not simulation.scheduler.num_preemptions:
        simulation.step()

    simulation.step()

    assert simulation.scheduler.running == [old]
    assert simulation.scheduler.num_preemptions == 1


def test_a_preempted_request_does_not_return_in_the_same_step_without_its_pending_token() -> None:
    simulation = Simulation(overlap=True, num_blocks=11, block_size=4, max_wait_s=5.0)
    simulation.load(ONE_PAGE, ALSO_ONE)
    large = simulation.add([2] * 29, ALSO_ONE, max_tokens=12)
    small = simulation.add([1], ONE_PAGE, max_tokens=12)
    simulation.step()
    simulation.step()
    simulation.scheduler.waiting.charge("a", 1000, is_decode=False)  # so that it is preempted first
    simulation.now += 6
    overdue = simulation.add([3] * 20, max_tokens=3, age_s=6)

    simulation.step()

    assert overdue in simulation.scheduler.running
    assert small in list(simulation.scheduler.waiting)
    simulation.run()
    for request in (large, small, overdue):
        assert request.output_ids == simulation.expected(request)


def test_aborting_a_request_whose_chunk_is_in_flight_leaves_nothing_to_remember() -> None:
    simulation = Simulation(overlap=True, max_step_tokens=8, block_size=4)
    request = simulation.add(range(30))
    simulation.step()

    simulation.engine.abort(request.request_id)
    simulation.run()

    again = simulation.add(range(30))
    simulation.run()
    assert again.num_cached_tokens == 0


def test_a_prompt_of_one_token_is_a_chunk_and_not_a_decode_row() -> None:
    simulation = Simulation()
    simulation.add([5], max_tokens=1)

    plan = simulation.step()

    assert plan is not None
    assert (len(plan.decodes), len(plan.chunks)) == (0, 1)


def test_of_those_that_had_a_turn_the_adapter_served_most_gives_way() -> None:
    simulation = Simulation(max_running=2, max_wait_s=5.0)
    simulation.load(ONE_PAGE, ALSO_ONE)
    served_less = simulation.add([1], ONE_PAGE, max_tokens=50)
    served_more = simulation.add([1] * 9, ALSO_ONE, max_tokens=50)
    simulation.step()
    simulation.now += 6
    overdue = simulation.add([1], max_tokens=50, age_s=6)

    simulation.step()

    assert simulation.scheduler.running == [served_less, overdue]
    assert list(simulation.scheduler.waiting) == [served_more]


def test_an_overdue_request_gets_in_where_decodes_alone_fill_every_step() -> None:
    simulation = Simulation(max_running=2, max_step_tokens=2, max_wait_s=5.0)
    simulation.load(ONE_PAGE)
    for _ in range(2):
        simulation.add([1], max_tokens=200)
    simulation.step()
    simulation.now += 6
    overdue = simulation.add([1], ONE_PAGE, max_tokens=2, age_s=6)

    simulation.step()

    assert overdue in simulation.scheduler.running


def test_an_overdue_request_leaves_a_load_that_is_under_way_to_those_who_wait_for_it() -> None:
    simulation = Simulation(num_pages=1, max_wait_s=5.0)
    loading = simulation.add([1], ONE_PAGE)
    simulation.step()
    simulation.add([1], ALSO_ONE, age_s=6)

    simulation.step()

    assert loading.holds_adapter


def test_while_an_overdue_request_waits_for_blocks_the_base_takes_none_either() -> None:
    simulation = Simulation(num_blocks=8, block_size=4, max_wait_s=5.0)
    simulation.load(ONE_PAGE)
    simulation.add([1] * 17, max_tokens=8)
    simulation.step()
    overdue = simulation.add([2] * 17, ONE_PAGE, max_tokens=4, age_s=6)
    small = simulation.add([1], max_tokens=1)

    simulation.step()

    assert overdue.holds_adapter
    assert {overdue, small} <= set(simulation.scheduler.waiting)
