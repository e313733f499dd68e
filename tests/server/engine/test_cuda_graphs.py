"""Which graph a step is padded to."""

from typing import Any

import pytest

from server.engine.cuda_graphs import CudaGraphs
from server.engine.request import Request, SamplingParams
from server.engine.scheduler import Plan, Scheduled
from server.model.gpu_step import StepShape


def part(num_tokens: int) -> Scheduled:
    request = Request(
        request_id="r",
        prompt_ids=[1] * num_tokens,
        sampling=SamplingParams(max_tokens=1),
        adapter=None,
        tenant="",
        arrival_time=0.0,
        seed=0,
    )
    return Scheduled(request, 0, num_tokens, samples=True)


def plan(num_decodes: int, *chunks: int) -> Plan:
    return Plan(tuple(part(1) for _ in range(num_decodes)), tuple(part(count) for count in chunks))


def shape(graphs: CudaGraphs, step: Plan, num_logits: int, **flags: Any) -> StepShape:
    return graphs.shape_of(step, num_logits, with_lora=flags.get("with_lora", False))


@pytest.mark.parametrize(("num_decodes", "padded"), [(1, 1), (3, 4), (9, 12), (33, 40), (64, 64)])
def test_decode_rows_are_padded_to_the_next_graph(num_decodes: int, padded: int) -> None:
    graphs = CudaGraphs(max_running=64, max_tokens=8192)
    found = shape(graphs, plan(num_decodes), num_decodes)
    assert found == StepShape(padded, 64, False, with_decodes=True, with_chunks=False)


def test_a_step_with_prompts_has_graphs_of_its_own_that_take_decode_rows_too() -> None:
    graphs = CudaGraphs(max_running=64, max_tokens=8192)
    expected = StepShape(128, 64, True, with_decodes=True, with_chunks=True)
    for step in (plan(5, 60), plan(0, 100), plan(0, 30, 40)):
        assert shape(graphs, step, 6, with_lora=True) == expected


def test_a_step_that_no_graph_holds_runs_as_long_as_it_is() -> None:
    graphs = CudaGraphs(max_running=64, max_tokens=8192)
    assert shape(graphs, plan(2, 900), 3) == StepShape(902, 64, False, True, True)
    assert shape(graphs, plan(0, 900), 0) == StepShape(900, 0, False, False, True)
    # Logprobs of a prompt's own tokens: more rows of logits than a graph has.
    assert shape(graphs, plan(0, 200), 200) == StepShape(200, 256, False, False, True)


def test_the_last_decode_graph_is_as_large_as_a_step_may_be() -> None:
    graphs = CudaGraphs(max_running=100, max_tokens=256)
    assert shape(graphs, plan(97), 97).num_tokens == 100
    assert shape(graphs, plan(97), 97).num_logits == 128
    assert shape(graphs, plan(60), 60).num_logits == 64


def test_only_captured_shapes_are_found() -> None:
    graphs = CudaGraphs(max_running=64, max_tokens=8192)
    assert graphs.find(shape(graphs, plan(1), 1)) is None
