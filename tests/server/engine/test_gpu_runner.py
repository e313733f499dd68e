"""The GPU's runner on a CPU, over reference kernels: the same answers as PEFT's."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from server.engine.gpu_runner import GpuRunner
from server.engine.request import SamplingParams
from server.model.spec import FUSED
from server.quant import nf4
from tests.server.engine import gpu_reference
from tests.server.engine.conftest import GREEDY, MakeHarness
from tests.server.engine.test_oracle import (
    KINDS,
    LOGPROB_TOLERANCE,
    Oracle,
    disagreements,
    prompts,
    run_mixed,
)

pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu_reference.install(monkeypatch)


@pytest.fixture(scope="module")
def kinds(make_adapter: Callable[..., Path]) -> dict[str, Path]:
    return {name: make_adapter(seed=i, **config) for i, (name, config) in enumerate(KINDS.items())}


@pytest.fixture(scope="module")
def oracle(tiny_base: Path, kinds: dict[str, Path]) -> Oracle:
    """PEFT in fp32 over the values that NF4 holds."""
    found = Oracle(tiny_base, kinds)
    names = {name for group in FUSED.values() for name in group}
    for name, module in found.plain.named_modules():
        linear = name.removesuffix(".base_layer").split("layers.")[-1].split(".", 1)[-1]
        if linear in names and isinstance(module, torch.nn.Linear):
            module.weight.data = nf4.quantize(module.weight.data).dequantize(torch.float32)
    return found


@pytest.mark.parametrize("overlap", [False, True])
def test_a_mixed_batch_agrees_with_peft_row_by_row(
    overlap: bool, make_harness: MakeHarness, kinds: dict[str, Path], oracle: Oracle
) -> None:
    harness = make_harness(quantization="nf4", scheduler={"overlap": overlap})
    assert isinstance(harness.engine.weight_sets.base, GpuRunner)
    for name, request in run_mixed(harness, kinds):
        assert len(request.output_ids) == 64
        assert disagreements(oracle, request, name) == []


def test_chunks_preemption_and_a_small_bank_change_no_token(
    make_harness: MakeHarness, kinds: dict[str, Path], oracle: Oracle
) -> None:
    harness = make_harness(
        quantization="nf4",
        cache={"num_blocks": 24, "block_size": 8},
        scheduler={"max_step_tokens": 12, "max_running": 12, "overlap": True, "max_wait_s": 0.05},
        adapters={"bank_rows": 40},
    )
    for name, request in run_mixed(harness, kinds):
        assert disagreements(oracle, request, name) == []
    stats = harness.engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_free_blocks == 24


def test_prompt_logprobs_agree_with_the_oracle_in_chunks_too(
    make_harness: MakeHarness, kinds: dict[str, Path], oracle: Oracle
) -> None:
    harness = make_harness(quantization="nf4", scheduler={"max_step_tokens": 8, "max_running": 8})
    adapter, prompt = harness.push(kinds["plain"]), prompts(4, longest=40)[3]
    neighbour = harness.add(prompt, None, GREEDY)
    sampling = SamplingParams(max_tokens=2, temperature=0, prompt_logprobs=3)
    request = harness.add(prompt, adapter, sampling)
    first = harness.run()[request.request_id][0]
    assert first.prompt_logprobs is not None
    expected = oracle.logits(prompt, "plain").log_softmax(dim=-1)
    for place, found in enumerate(first.prompt_logprobs[1:]):
        assert found is not None
        right = float(expected[place, prompt[place + 1]])
        assert found.logprob == pytest.approx(right, abs=LOGPROB_TOLERANCE)
    assert disagreements(oracle, request, "plain") == []
    assert disagreements(oracle, neighbour, None) == []


def test_a_step_of_any_length_has_room_for_the_logits_of_all_its_tokens(
    make_harness: MakeHarness,
) -> None:
    harness = make_harness(quantization="nf4", scheduler={"max_step_tokens": 70, "max_running": 8})
    sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    request = harness.add([5] * 70, None, sampling)
    harness.run()
    assert len(request.prompt_logprobs) == 69


def test_nothing_of_a_longer_step_is_left_in_a_shorter_one(
    make_harness: MakeHarness, kinds: dict[str, Path], oracle: Oracle
) -> None:
    harness = make_harness(quantization="nf4")
    adapter = harness.push(kinds["dora"])
    run_mixed(harness, kinds)
    for name, ref in (("dora", adapter), (None, None)):
        request = harness.add([5], ref)
        harness.run()
        assert disagreements(oracle, request, name) == []
