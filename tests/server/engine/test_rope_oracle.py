"""Adapters with RoPE scaling against transformers + PEFT that have it too, on both runners."""

import json
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from server.engine.request import AdapterRef, Request, SamplingParams
from server.model.rotary import RotaryTables
from server.model.spec import FUSED
from server.quant import nf4
from tests.server.engine.conftest import Harness, MakeHarness
from tests.server.engine.test_oracle import ALL, LOGPROB_TOLERANCE, TIE, prompts

THETA = 10000.0
LINEAR = {"rope_type": "linear", "rope_theta": THETA, "factor": 4.0}
OTHER_LINEAR = {"rope_type": "linear", "rope_theta": THETA, "factor": 2.5}
YARN = {
    "rope_type": "yarn",
    "rope_theta": THETA,
    "factor": 8.0,
    "original_max_position_embeddings": 64,
}
SCALINGS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "linear": LINEAR,
    "yarn": YARN,
    "yarn, dora": YARN,
    "other linear": OTHER_LINEAR,
}
LORA: dict[str, dict[str, Any]] = {
    "yarn": {"target_modules": ALL},
    "yarn, dora": {"target_modules": ALL, "use_dora": True, "r": 5},
}
GREEDY = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True)
Logits = Callable[[list[int], str | None], torch.Tensor]


@pytest.fixture(scope="module")
def scaled(make_adapter: Callable[..., Path]) -> dict[str, Path]:
    """PEFT folders, with turnout.json where their RoPE is not the base's."""
    folders = {}
    for seed, (name, rope) in enumerate(SCALINGS.items()):
        folder = make_adapter(seed=seed, **LORA.get(name, {}))
        if rope is not None:
            (folder / "turnout.json").write_text(json.dumps({"format": 1, "rope": rope}))
        folders[name] = folder
    return folders


def oracle_of(base: Path, folders: dict[str, Path], *, is_nf4: bool) -> Logits:
    """transformers + PEFT, a model for each adapter, its config saying the same of RoPE."""
    models: dict[str | None, Any] = {}
    for name in (None, *folders):
        config = transformers.AutoConfig.from_pretrained(base)
        rope = SCALINGS[name] if name else None
        if rope is not None:
            config.rope_parameters = dict(rope)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(
            base, config=config, dtype=torch.float32
        )
        if is_nf4:
            linears = {linear for group in FUSED.values() for linear in group}
            for path, module in model.named_modules():
                if path.split("layers.")[-1].split(".", 1)[-1] in linears:
                    module.weight.data = nf4.quantize(module.weight.data).dequantize(torch.float32)
        if name is not None:
            with warnings.catch_warnings(action="ignore"):
                model = peft.PeftModel.from_pretrained(model, str(folders[name]))
        models[name] = model.eval()

    def logits(token_ids: list[int], name: str | None) -> torch.Tensor:
        with torch.inference_mode():
            found: torch.Tensor = models[name](torch.tensor([token_ids])).logits[0]
        return found

    return logits


@pytest.fixture(scope="module", params=["cpu", "gpu runner"])
def runner(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def oracle(runner: str, tiny_base: Path, scaled: dict[str, Path]) -> Logits:
    return oracle_of(tiny_base, scaled, is_nf4=runner == "gpu runner")


@pytest.fixture
def make(
    runner: str, make_harness: MakeHarness, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Harness]]:
    """Harnesses whose steps run through the CPU's decoder, or the GPU's over plain kernels."""
    if runner == "cpu":
        yield make_harness
        return
    pytest.importorskip("triton")
    from tests.server.engine import gpu_reference

    gpu_reference.install(monkeypatch)
    yield lambda **options: make_harness(quantization="nf4", **options)


def wrong_tokens(logits: Logits, request: Request, name: str | None) -> list[int]:
    """Places where the oracle would clearly have chosen another token."""
    rows = logits(request.prompt_ids + request.output_ids, name)[len(request.prompt_ids) - 1 : -1]
    gaps = [float(r.max() - r[t]) for r, t in zip(rows, request.output_ids, strict=True)]
    return [place for place, gap in enumerate(gaps) if gap >= TIE]


def push_all(harness: Harness, folders: dict[str, Path]) -> dict[str | None, AdapterRef | None]:
    return {None: None} | {name: harness.push(folder) for name, folder in folders.items()}


def test_each_scaling_alone_gives_the_oracles_logprobs(
    make: Callable[..., Harness], scaled: dict[str, Path], oracle: Logits
) -> None:
    harness = make()
    prompt = prompts(3)[2] + [9, 8, 7]
    sampling = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=256)
    for name, adapter in push_all(harness, scaled).items():
        request = harness.add(prompt, adapter, sampling)
        outputs = harness.run()[request.request_id]
        expected = oracle(prompt + request.output_ids, name).log_softmax(dim=-1)
        for place, output in enumerate(outputs):
            assert output.logprobs is not None
            row = torch.zeros(256)
            row[output.logprobs[0].top_ids] = torch.tensor(output.logprobs[0].top_logprobs)
            difference = (row - expected[len(prompt) - 1 + place]).abs().max()
            assert difference < LOGPROB_TOLERANCE, name


def test_scaled_and_plain_rows_share_batches_and_chunks(
    make: Callable[..., Harness], scaled: dict[str, Path], oracle: Logits
) -> None:
    harness = make(scheduler={"max_step_tokens": 40, "max_running": 20})
    adapters = push_all(harness, scaled)
    added = [
        (name, harness.add(prompt, adapter, GREEDY))
        for prompt in prompts(3, longest=90)
        for name, adapter in adapters.items()
    ]
    harness.run()
    for name, request in added:
        assert len(request.output_ids) == 24
        assert wrong_tokens(oracle, request, name) == [], name
    name, request = added[2]
    assert name == "linear"
    assert wrong_tokens(oracle, request, None) != [], "the scaling is too slight to matter here"


def test_one_table_serves_all_scalings_in_turn_and_each_is_loaded_again_into_it(
    make: Callable[..., Harness],
    scaled: dict[str, Path],
    oracle: Logits,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    written = []
    write = RotaryTables.write

    def noted(self: RotaryTables, table: int, scaling: Any) -> None:
        written.append((table, scaling.factor))
        write(self, table, scaling)

    monkeypatch.setattr(RotaryTables, "write", noted)
    harness = make(adapters={"rotary_tables": 1}, scheduler={"max_wait_s": 0.05})
    adapters = push_all(harness, scaled)
    added = [
        (name, harness.add(prompt, adapter, GREEDY))
        for prompt in prompts(2)
        for name, adapter in adapters.items()
    ]
    harness.run()
    for again in ("linear", "yarn", "yarn, dora", "linear"):
        added.append((again, harness.add([5, 6, 7], adapters[again], GREEDY)))
        harness.run()
    for name, request in added:
        assert wrong_tokens(oracle, request, name) == [], name
    assert {table for table, _ in written} == {1}
    assert {factor for _, factor in written} == {4.0, 2.5, 8.0}
    assert all(before != after for before, after in pairwise(written))


def test_a_scaling_comes_back_into_another_table(
    make: Callable[..., Harness], scaled: dict[str, Path], oracle: Logits
) -> None:
    harness = make(adapters={"rotary_tables": 2})
    adapters = push_all(harness, scaled)
    tables: dict[str, list[int]] = {}
    for name in ("linear", "yarn", "other linear", "linear", "yarn, dora"):
        adapter = adapters[name]
        assert adapter is not None
        request = harness.add(prompts(2)[1], adapter, GREEDY)
        harness.run()
        assert wrong_tokens(oracle, request, name) == [], name
        tables.setdefault(name, []).append(harness.engine.adapters.table(adapter.digest))
    assert tables == {"linear": [1, 2], "yarn": [2], "other linear": [1], "yarn, dora": [1]}


def test_equal_tensors_with_another_scaling_share_neither_digest_nor_cached_keys(
    make: Callable[..., Harness], make_adapter: Callable[..., Path], tiny_base: Path
) -> None:
    harness = make()
    folders = [make_adapter(seed=3) for _ in range(2)]
    (folders[1] / "turnout.json").write_text(json.dumps({"format": 1, "rope": YARN}))
    plain, yarn = (harness.push(folder) for folder in folders)
    assert plain.digest != yarn.digest
    prompt = prompts(9, longest=90)[-1] * 2
    for adapter, cached in ((plain, 0), (yarn, 0), (None, 0), (yarn, (len(prompt) - 1) // 16 * 16)):
        request = harness.add(prompt, adapter, GREEDY)
        harness.run()
        assert request.num_cached_tokens == cached


def test_a_scaled_adapter_answers_past_the_length_that_the_base_was_trained_on(
    make: Callable[..., Harness], tiny_base: Path, scaled: dict[str, Path], oracle: Logits
) -> None:
    harness = make(model={"max_model_len": 900})
    assert (harness.info.max_model_len, harness.info.max_scaled_len) == (512, 900)
    linear, yarn = harness.push(scaled["linear"]), harness.push(scaled["yarn"])
    assert harness.info.longest(linear.rope) == 900  # 4 x 512, had the server so many
    assert harness.info.longest(yarn.rope) == 512  # 8 x 64
    assert harness.info.longest(None) == 512
    prompt = [3 + number * 7 % 250 for number in range(880)]
    request = harness.add(prompt, linear, SamplingParams(max_tokens=20, temperature=0))
    harness.run()
    assert request.output_ids
    assert wrong_tokens(oracle, request, "linear") == []


def test_an_object_that_scales_otherwise_than_its_revision_is_refused(
    make: Callable[..., Harness], scaled: dict[str, Path]
) -> None:
    harness = make()
    adapter = harness.push(scaled["linear"])
    forged = AdapterRef(adapter.digest, adapter.num_rank_rows)
    request = harness.add([4, 5], forged, GREEDY)
    (output,) = harness.run()[request.request_id]
    assert output.error_code == "adapter_load_failed"
    assert output.error is not None
    assert "has RoPE" in output.error
