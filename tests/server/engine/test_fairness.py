"""Whose turn it is: orders, counters, and what a pause does to them."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine import fairness
from server.engine.fairness import FairQueue
from server.engine.request import AdapterRef, Request, SamplingParams

_ids = itertools.count()


def make_request(key: str = "", arrival: float = 0.0) -> Request:
    return Request(
        request_id=str(next(_ids)),
        prompt_ids=[1],
        sampling=SamplingParams(max_tokens=1),
        adapter=AdapterRef(key, 1) if key else None,
        tenant="",
        arrival_time=arrival,
        seed=0,
        queued_time=arrival,
    )


def filled(*requests: Request, token_fair: bool = True) -> FairQueue:
    queue = FairQueue(token_fair=token_fair)
    for request in requests:
        queue.push(request)
    return queue


def admit_all(queue: FairQueue, tokens_each: int) -> list[str]:
    """Admit every candidate in turn; the adapters in the order of their turns."""
    turns = []
    for request in queue.candidates():
        turns.append(request.fairness_key)
        queue.admit(request, now=0.0)
        queue.charge(request.fairness_key, tokens_each, is_decode=False)
    return turns


def test_adapters_take_turns_however_many_requests_one_of_them_has() -> None:
    hot = [make_request("hot", arrival=index) for index in range(6)]
    cold = [make_request("cold", arrival=10 + index) for index in range(2)]

    turns = admit_all(filled(*hot, *cold), tokens_each=10)

    assert turns == ["hot", "cold", "hot", "cold", "hot", "hot", "hot", "hot"]


def test_the_adapter_served_least_goes_first() -> None:
    queue = filled(make_request("a", arrival=0), make_request("b", arrival=1))
    queue.charge("a", 3, is_decode=False)
    queue.charge("b", 2, is_decode=False)

    assert [request.fairness_key for request in queue.candidates()] == ["b", "a"]


def test_a_generated_token_costs_two_of_a_prompt() -> None:
    queue = filled(make_request("a", arrival=0), make_request("b", arrival=1))
    queue.charge("a", 10, is_decode=True)
    queue.charge("b", 19, is_decode=False)

    assert (queue.served("a"), queue.served("b")) == (20, 19)
    assert next(queue.candidates()).fairness_key == "b"


def test_without_fairness_the_first_to_come_goes_first() -> None:
    first, second = make_request("hot", arrival=0), make_request("cold", arrival=1)
    queue = filled(second, first, token_fair=False)
    queue.charge("hot", 1000, is_decode=True)

    assert list(queue.candidates()) == [first, second]


def test_within_an_adapter_a_preempted_request_is_again_the_first() -> None:
    old, young = make_request("a", arrival=0), make_request("a", arrival=5)
    queue = filled(young)

    queue.push(old)

    assert list(queue) == [old, young]
    assert next(queue.candidates()) is old


def test_behind_a_request_that_stays_queued_its_adapters_others_are_not_offered() -> None:
    requests = [make_request(key, arrival=index) for index, key in enumerate("aab")]

    offered = list(filled(*requests).candidates())

    assert offered == [requests[0], requests[2]]


def test_an_adapter_returning_from_a_pause_has_no_credit_over_those_that_wait() -> None:
    queue = filled(make_request("busy"), make_request("busier"))
    queue.charge("busy", 1000, is_decode=False)
    queue.charge("busier", 3000, is_decode=False)

    queue.push(make_request("back"))

    assert queue.served("back") == 1000


def test_a_newcomer_has_no_credit_over_adapters_that_all_run_and_none_waits() -> None:
    """Else it would go first until it had been served as much as the others since the start."""
    hot = make_request("hot")
    queue = filled(hot)
    queue.admit(hot, now=0.0)
    queue.charge("hot", 1_000_000, is_decode=True)

    queue.push(make_request("new"))

    assert queue.served("new") == queue.served("hot")


def test_an_adapter_keeps_what_it_owes_through_a_pause() -> None:
    greedy = make_request("greedy")
    queue = filled(greedy, make_request("other"))
    queue.charge("greedy", 500, is_decode=False)
    queue.remove(greedy)

    queue.push(make_request("greedy"))

    assert queue.served("greedy") == 500


def test_counters_of_adapters_long_gone_are_forgotten_once_they_say_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(fairness, "_MAX_IDLE_COUNTERS", 3)
    queue = filled(make_request("waits"))
    queue.charge("waits", 50, is_decode=False)
    for key, tokens in [("gone", 10), ("owes", 90), ("last", 10)]:
        request = make_request(key)
        queue.push(request)
        queue.admit(request, now=0.0)
        queue.charge(key, tokens, is_decode=False)

    queue.charge("waits", 50, is_decode=False)

    queue.push(make_request("new"))
    queue.push(make_request("newer"))

    assert queue.served("gone") == 0  # whoever returns starts level with `waits` anyway
    assert (queue.served("owes"), queue.served("waits")) == (140, 100)
    assert queue.served("last") == 60  # the level of a newcomer once nobody waits


def test_the_most_overdue_is_the_one_whose_adapter_had_no_turn_for_longest() -> None:
    """An old request of an adapter that is being served has nothing to complain of."""
    hot = [make_request("hot", arrival=0), make_request("hot", arrival=1)]
    cold = make_request("cold", arrival=5)
    queue = filled(*hot, cold)
    assert queue.most_overdue() is hot[0]

    queue.admit(hot[0], now=8.0)

    assert queue.most_overdue() is cold
    assert queue.waiting_since(hot[1]) == 8.0
    assert queue.waiting_since(cold) == 5.0


def test_a_request_does_not_wait_since_a_turn_from_before_it_came() -> None:
    early, late = make_request("a", arrival=0), make_request("a", arrival=50)
    queue = filled(early)
    queue.admit(early, now=1.0)
    queue.push(late)

    assert queue.waiting_since(late) == 50.0


def test_an_empty_queue_has_nothing_to_offer() -> None:
    queue = filled()

    assert queue.most_overdue() is None
    assert list(queue.candidates()) == []
    assert len(queue) == 0


@settings(max_examples=100, deadline=None)
@given(
    arrivals=st.lists(st.tuples(st.sampled_from("ab"), st.integers(1, 50)), min_size=1, max_size=40)
)
def test_while_two_adapters_wait_neither_gets_more_than_one_request_ahead(
    arrivals: list[tuple[str, int]],
) -> None:
    """The VTC bound: counters of adapters that wait never part by more than one admission."""
    sizes = {}
    queue = FairQueue(token_fair=True)
    for index, (key, tokens) in enumerate(arrivals):
        request = make_request(key, arrival=index)
        sizes[request.request_id] = tokens
        queue.push(request)

    for request in queue.candidates():
        if {other.fairness_key for other in queue} == {"a", "b"}:
            assert abs(queue.served("a") - queue.served("b")) <= 50
        queue.admit(request, now=0.0)
        queue.charge(request.fairness_key, sizes[request.request_id], is_decode=False)


def test_each_adapters_turn_is_worked_out_once_however_many_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue = filled(*(make_request(f"adapter-{index}") for index in range(100)))
    asked: list[str] = []
    turn = FairQueue._turn

    def counted(self: FairQueue, request: Request) -> tuple[float, float]:
        asked.append(request.fairness_key)
        return turn(self, request)

    monkeypatch.setattr(FairQueue, "_turn", counted)
    assert len(list(queue.candidates())) == 100
    assert len(asked) == 100
