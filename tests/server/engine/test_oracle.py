"""Our engine against transformers + PEFT, driven by PEFT's own set_adapter: the same answers.

Greedy tokens are compared teacher-forced: the oracle reads prompt and answer in one pass and must
choose the same token at every place. Equal everywhere, they are equal one by one too.
"""

import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from server.engine.request import AdapterRef, Request, SamplingParams
from tests.server.engine.conftest import GREEDY, Harness, MakeHarness

TIE = 1e-4  # where the oracle's own two best logits are closer, either token is right
LOGPROB_TOLERANCE = 2e-4  # fp32, sums in another order over 2 layers
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all-linear": {"target_modules": "all-linear", "r": 16, "lora_alpha": 16},
    "subset": {"target_modules": ["k_proj", "o_proj", "down_proj"], "r": 4},
    "regex": {"target_modules": r".*\.(up_proj|q_proj)"},
    "rank_pattern": {"target_modules": ALL, "r": 4, "rank_pattern": {"q_proj": 12, "up_proj": 2}},
    "alpha_pattern": {"target_modules": ALL, "alpha_pattern": {"v_proj": 40, "down_proj": 4}},
    "rslora": {"target_modules": ALL, "use_rslora": True},
    "dora": {"target_modules": ALL, "use_dora": True, "r": 5},
    "layers_to_transform": {"target_modules": ALL, "layers_to_transform": [1]},
    "half precision": {"target_modules": ALL, "dtype": torch.bfloat16},
}


class Oracle:
    """transformers + PEFT over the same base, one adapter at a time."""

    def __init__(self, base: Path, folders: dict[str, Path]) -> None:
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        self.plain = model.eval()
        self.model: Any = None
        for name, folder in folders.items():
            with warnings.catch_warnings(action="ignore"):
                if self.model is None:
                    self.model = peft.PeftModel.from_pretrained(model, str(folder), "first")
                self.model.load_adapter(str(folder), adapter_name=name.replace(" ", "_"))

    @torch.inference_mode()
    def logits(self, token_ids: list[int], name: str | None) -> torch.Tensor:
        """Logits after each token: [num_tokens, vocab]."""
        ids = torch.tensor([token_ids])
        found: torch.Tensor
        if self.model is None:
            found = self.plain(ids).logits[0]
        elif name is None:
            with self.model.disable_adapter():
                found = self.model(ids).logits[0]
        else:
            self.model.set_adapter(name.replace(" ", "_"))
            found = self.model(ids).logits[0]
        return found


def disagreements(oracle: Oracle, request: Request, name: str | None) -> list[str]:
    """Places where the oracle would clearly have chosen another token."""
    logits = oracle.logits(request.prompt_ids + request.output_ids, name)
    chosen_from = logits[len(request.prompt_ids) - 1 : -1]
    found = []
    for place, (row, token) in enumerate(zip(chosen_from, request.output_ids, strict=True)):
        gap = float(row.max() - row[token])
        if gap >= TIE:
            found.append(f"{name} place {place}: token {token} is {gap:.6f} below the best")
    return found


def prompts(count: int, vocab: int = 256, longest: int = 60) -> list[list[int]]:
    """Random prompts of odd lengths."""
    random_ = random.Random(7)
    return [
        [random_.randrange(3, vocab) for _ in range(random_.randint(1, longest))]
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def kinds(make_adapter: Callable[..., Path]) -> dict[str, Path]:
    return {name: make_adapter(seed=i, **config) for i, (name, config) in enumerate(KINDS.items())}


@pytest.fixture(scope="module")
def oracle(tiny_base: Path, kinds: dict[str, Path]) -> Oracle:
    return Oracle(tiny_base, kinds)


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_every_kind_of_adapter_alone_agrees_with_peft(
    kind: str | None, make_harness: MakeHarness, kinds: dict[str, Path], oracle: Oracle
) -> None:
    harness = make_harness()
    adapter = harness.push(kinds[kind]) if kind else None
    for prompt in prompts(8):
        request = harness.add(prompt, adapter)
        harness.run()
        assert disagreements(oracle, request, kind) == []


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_logprobs_of_the_whole_vocabulary_agree_with_peft(
    kind: str | None, make_harness: MakeHarness, kinds: dict[str, Path], oracle: Oracle
) -> None:
    harness = make_harness()
    adapter = harness.push(kinds[kind]) if kind else None
    prompt = prompts(3)[2]
    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True, logprobs=256)

    request = harness.add(prompt, adapter, sampling)
    outputs = harness.run()[request.request_id]

    expected = oracle.logits(prompt + request.output_ids, kind).log_softmax(dim=-1)
    for place, output in enumerate(outputs):
        assert output.logprobs is not None
        row = torch.zeros(256)
        row[output.logprobs[0].top_ids] = torch.tensor(output.logprobs[0].top_logprobs)
        difference = (row - expected[len(prompt) - 1 + place]).abs().max()
        assert difference < LOGPROB_TOLERANCE


@pytest.mark.parametrize("kind", ["all-linear", "dora"])
def test_in_bf16_a_choice_is_never_far_below_the_oracles(
    kind: str, make_harness: MakeHarness, kinds: dict[str, Path], oracle: Oracle
) -> None:
    harness = make_harness(dtype="bfloat16")
    adapter = harness.push(kinds[kind])
    for prompt in prompts(4):
        request = harness.add(prompt, adapter)
        harness.run()
        logits = oracle.logits(request.prompt_ids + request.output_ids, kind)
        chosen_from = logits[len(prompt) - 1 : -1]
        chosen = chosen_from.gather(1, torch.tensor(request.output_ids)[:, None])[:, 0]
        assert (chosen_from.amax(dim=1) - chosen).max() < 0.3  # bf16 rounds logits of about 10


def run_mixed(harness: Harness, kinds: dict[str, Path]) -> list[tuple[str | None, Request]]:
    """Every kind and the base, several prompts each, all in flight together."""
    adapters: dict[str | None, AdapterRef | None] = {None: None}
    adapters.update({name: harness.push(folder) for name, folder in kinds.items()})
    added = [
        (name, harness.add(prompt, adapter))
        for prompt in prompts(3)
        for name, adapter in adapters.items()
    ]
    harness.run()
    return added


@pytest.mark.parametrize("overlap", [False, True])
def test_a_mixed_batch_agrees_with_peft_row_by_row(
    overlap: bool, make_harness: MakeHarness, kinds: dict[str, Path], oracle: Oracle
) -> None:
    harness = make_harness(scheduler={"overlap": overlap})
    for name, request in run_mixed(harness, kinds):
        assert len(request.output_ids) == 64
        assert disagreements(oracle, request, name) == []


def test_a_bank_smaller_than_the_demand_changes_no_token(
    make_harness: MakeHarness, kinds: dict[str, Path], oracle: Oracle
) -> None:
    harness = make_harness(adapters={"bank_rows": 24}, scheduler={"max_wait_s": 0.05})
    for name, request in run_mixed(harness, kinds):
        assert disagreements(oracle, request, name) == []


@pytest.mark.parametrize("overlap", [False, True])
def test_chunks_preemption_and_reused_prefixes_change_no_token(
    overlap: bool, make_harness: MakeHarness, kinds: dict[str, Path], oracle: Oracle
) -> None:
    tight = make_harness(
        cache={"num_blocks": 24, "block_size": 8},
        scheduler={"max_step_tokens": 12, "max_running": 12, "overlap": overlap},
    )
    for name, request in run_mixed(tight, kinds):
        assert disagreements(oracle, request, name) == []
        assert len(request.output_ids) == 64
    for expected_hit in (0, 32):
        again = tight.add(list(range(100, 135)), request.adapter)
        tight.run()
        assert again.num_cached_tokens == expected_hit
        assert disagreements(oracle, again, name) == []
    stats = tight.engine.stats()
    assert stats.num_preemptions > 0
    assert stats.num_free_blocks == 24
    assert stats.num_running == stats.num_waiting == 0


def test_a_prefix_hit_changes_no_token_and_is_never_taken_across_adapters(
    make_harness: MakeHarness, kinds: dict[str, Path], oracle: Oracle
) -> None:
    harness = make_harness()
    adapter, other = harness.push(kinds["plain"]), harness.push(kinds["dora"])
    prompt = prompts(20, longest=200)[-1]
    first = harness.generate(prompt, adapter)

    hits_before = harness.engine.stats().prefix_hits
    again = harness.add(prompt, adapter)
    harness.run()
    assert again.output_ids == first
    assert again.num_cached_tokens == (len(prompt) - 1) // 16 * 16
    hits_after = harness.engine.stats().prefix_hits
    assert hits_after - hits_before == again.num_cached_tokens

    for name, ref in (("dora", other), (None, None)):
        request = harness.add(prompt, ref)
        harness.run()
        assert request.num_cached_tokens == 0
        assert disagreements(oracle, request, name) == []


def test_tenants_never_share_cached_prefixes(make_harness: MakeHarness) -> None:
    harness = make_harness()
    prompt = list(range(3, 60))
    for tenant, expected in (("a", 0), ("b", 0), ("a", 48)):
        request = harness.add(prompt, tenant=tenant)
        harness.run()
        assert request.num_cached_tokens == expected


def test_an_abort_in_the_middle_changes_nothing_for_the_others(
    make_harness: MakeHarness, kinds: dict[str, Path], oracle: Oracle
) -> None:
    harness = make_harness()
    names = list(kinds)
    requests = [(name, harness.add(prompts(1)[0], harness.push(kinds[name]))) for name in names]
    while any(len(request.output_ids) < 5 for _, request in requests):
        harness.engine.step()
    for _, request in requests[::2]:
        harness.engine.abort(request.request_id)
    harness.run()
    for name, request in requests[1::2]:
        assert disagreements(oracle, request, name) == []
    assert harness.engine.stats().num_free_blocks == harness.info.num_blocks


def test_a_sliding_window_is_honoured(
    make_harness: MakeHarness, tiny_base: Path, tmp_path: Path
) -> None:
    model = transformers.MistralForCausalLM.from_pretrained(tiny_base)
    model.config.sliding_window = 20
    model.save_pretrained(tmp_path / "windowed")
    windowed = Oracle(tmp_path / "windowed", {})
    harness = make_harness(base=tmp_path / "windowed", scheduler={"max_step_tokens": 64})
    changed = 0
    for prompt in prompts(8, longest=100):
        request = harness.add(prompt)
        harness.run()
        assert disagreements(windowed, request, None) == []
        changed += bool(disagreements(Oracle(tiny_base, {}), request, None))
    assert changed, "the window is too wide to matter here"


@pytest.mark.parametrize("max_tokens", [2, 0])
def test_prompt_logprobs_agree_with_the_oracle_in_chunks_too(
    max_tokens: int, make_harness: MakeHarness, kinds: dict[str, Path], oracle: Oracle
) -> None:
    harness = make_harness(scheduler={"max_step_tokens": 8, "max_running": 8})
    prompt = prompts(4, longest=40)[3]
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=0, logprobs=3, prompt_logprobs=3, ignore_eos=True
    )

    request = harness.add(prompt, harness.push(kinds["plain"]), sampling)
    outputs = harness.run()[request.request_id]
    first = outputs[0]

    assert sum(len(output.token_ids) for output in outputs) == max_tokens
    assert sum(len(output.logprobs or ()) for output in outputs) == max_tokens

    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    assert len(first.prompt_logprobs) == len(prompt)
    expected = oracle.logits(prompt, "plain").log_softmax(dim=-1)
    for place, found in enumerate(first.prompt_logprobs[1:]):
        assert found is not None
        assert found.logprob == pytest.approx(
            float(expected[place, prompt[place + 1]]), abs=LOGPROB_TOLERANCE
        )
        assert found.top_ids == expected[place].topk(3).indices.tolist()


def test_a_seeded_request_draws_the_same_tokens_alone_and_in_any_batch(
    make_harness: MakeHarness, kinds: dict[str, Path]
) -> None:
    harness = make_harness()
    adapter = harness.push(kinds["rslora"])
    sampling = SamplingParams(
        max_tokens=32, temperature=0.9, top_p=0.9, top_k=50, seed=1234, ignore_eos=True
    )
    alone = harness.generate([5, 6, 7], adapter, sampling)
    for prompt in prompts(9):
        harness.add(prompt, harness.push(kinds["dora"]), GREEDY)
    among = harness.add([5, 6, 7], adapter, sampling)
    harness.run()
    assert among.output_ids == alone
    other_seed = harness.generate(
        [5, 6, 7],
        adapter,
        SamplingParams(
            max_tokens=32, temperature=0.9, top_p=0.9, top_k=50, seed=99, ignore_eos=True
        ),
    )
    assert other_seed != alone


def test_an_adapter_that_overflows_harms_nobody_else(
    make_harness: MakeHarness, make_adapter: Callable[..., Path], oracle: Oracle, tmp_path: Path
) -> None:
    harness = make_harness(cache={"num_blocks": 12})
    folder = make_adapter(seed=5, target_modules=ALL)
    weights = load_file(folder / "adapter_model.safetensors")
    save_file(
        {name: value * 1e18 for name, value in weights.items()},
        folder / "adapter_model.safetensors",
    )
    poison = harness.push(folder)
    neighbours = [harness.add(prompt) for prompt in prompts(2)]
    harness.add([9, 9, 9], poison, SamplingParams(max_tokens=100, temperature=0, ignore_eos=True))
    harness.run()
    reusing = [harness.add(prompt) for prompt in prompts(6)[2:]]
    harness.run()
    for request in neighbours + reusing:
        assert disagreements(oracle, request, None) == []


@pytest.mark.parametrize("damage", [b"", b"not safetensors", None])
def test_a_damaged_object_fails_its_requests_and_nobody_falls_back_to_the_base(
    damage: bytes | None, make_harness: MakeHarness, kinds: dict[str, Path]
) -> None:
    harness = make_harness()
    adapter = harness.push(kinds["plain"])
    path = harness.config.adapters.store / "objects" / f"{adapter.digest}.safetensors"
    path.unlink()
    if damage is not None:
        path.write_bytes(damage)
    bad, good = harness.add([4, 5], adapter), harness.add([4, 5])
    outputs = harness.run()
    assert [output.error_code for output in outputs[bad.request_id]] == ["adapter_load_failed"]
    assert outputs[good.request_id][-1].finish_reason == "length"
