"""The step loop when a step fails: every request is answered, once."""

from unittest import mock

import pytest

from server.engine.request import AdapterRef
from server.engine.scheduler import Scheduled
from tests.server.engine.simulated import Simulation

DAMAGED = AdapterRef("x", 3)


def fail_a_step(simulation: Simulation) -> dict[str, list[str | None]]:
    """What each request is told of a step that fails: errors' codes and finish reasons."""
    told: dict[str, list[str | None]] = {}
    with pytest.raises(RuntimeError, match="out of order"):
        simulation.engine.step()
    for output in simulation.engine.fail_all("it failed"):
        told.setdefault(output.request_id, []).append(output.error_code or output.finish_reason)
    assert not simulation.engine.has_work
    assert simulation.engine.fail_all("again") == []
    return told


def test_a_load_that_failed_is_told_although_the_step_after_it_fails() -> None:
    simulation = Simulation()
    simulation.bank.damaged["x"] = ValueError("torn object")
    waiting = simulation.add(adapter=DAMAGED)
    simulation.step()
    simulation.executor.finish()
    other = simulation.add()

    failure = RuntimeError("out of order")
    with mock.patch.object(simulation.runner, "launch", side_effect=failure):
        told = fail_a_step(simulation)

    assert told == {
        waiting.request_id: ["adapter_load_failed"],
        other.request_id: ["engine_failed"],
    }


def test_a_request_that_ended_in_a_step_that_failed_later_is_told_of_its_end() -> None:
    simulation = Simulation(max_step_tokens=8)
    ends = simulation.add([1], max_tokens=1)
    goes_on = simulation.add([2] * 20)
    remember = simulation.scheduler.remember_blocks

    def fail_for_chunks(part: Scheduled) -> None:
        if not part.samples:
            raise RuntimeError("out of order")
        remember(part)

    with mock.patch.object(simulation.scheduler, "remember_blocks", fail_for_chunks):
        told = fail_a_step(simulation)

    assert told == {ends.request_id: ["length"], goes_on.request_id: ["engine_failed"]}
