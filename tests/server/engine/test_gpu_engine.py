"""The engine on the GPU's own kernels and graphs, against exact arithmetic over the same base."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from server.engine.request import AdapterRef, Request, SamplingParams
from tests.random_mistral import random_mistral
from tests.server.engine.conftest import Harness, MakeHarness
from tests.server.engine.test_oracle import KINDS
from tests.server.gptq_folder import quantize_folder

pytestmark = pytest.mark.gpu

VOCAB = 512
SAMPLING = SamplingParams(max_tokens=24, temperature=0, ignore_eos=True, logprobs=1)
ROPES: dict[str, dict[str, Any]] = {
    "linear rope": {"rope_type": "linear", "factor": 4.0},
    "yarn rope": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 256,
    },
}
MORE_KINDS = KINDS | {
    "rank 100": {"target_modules": "all-linear", "r": 100, "lora_alpha": 100},
    "linear rope": {"r": 4},
    "yarn rope": {"target_modules": "all-linear", "use_dora": True},
}


@pytest.fixture(scope="session")
def gpu_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mistral that the kernels can run: head size 64, grouped heads, a sliding window."""
    return random_mistral(
        tmp_path_factory.mktemp("gpu-base"),
        std=0.08,
        has_random_norms=True,
        dtype=torch.bfloat16,
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=3,
        head_dim=64,
        max_position_embeddings=2048,
        sliding_window=100,
    )


@pytest.fixture(scope="session")
def gpu_kinds(gpu_base: Path, make_adapter: Callable[..., Path]) -> dict[str, Path]:
    folders = {
        name: make_adapter(base=gpu_base, seed=i, **config)
        for i, (name, config) in enumerate(MORE_KINDS.items())
    }
    for name, rope in ROPES.items():
        (folders[name] / "turnout.json").write_text(json.dumps({"format": 1, "rope": rope}))
    return folders


def prompts(count: int, longest: int) -> list[list[int]]:
    """Random prompts of odd lengths."""
    random_ = random.Random(longest)
    return [
        [random_.randrange(3, VOCAB) for _ in range(random_.randint(1, longest))]
        for _ in range(count)
    ]


def logprobs_of(outputs: dict[str, list[Any]], request: Request) -> list[float]:
    """The engine's logprob of each token that it chose."""
    return [output.logprobs[0].logprob for output in outputs[request.request_id]]


def forced_logprobs(harness: Harness, adapter: AdapterRef | None, request: Request) -> torch.Tensor:
    """Another engine's logprob of each token of an answer, read in one pass."""
    forced = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    again = harness.add(request.prompt_ids + request.output_ids, adapter, forced)
    first = harness.run()[again.request_id][0]
    assert first.prompt_logprobs is not None
    found = first.prompt_logprobs[len(request.prompt_ids) :]
    return torch.tensor([one.logprob for one in found if one is not None])


@pytest.fixture(scope="session")
def gptq_base(gpu_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same base in GPTQ's layout; its groups are of 64."""
    return quantize_folder(gpu_base, tmp_path_factory.mktemp("gptq"), group_size=64)[0]


@pytest.mark.parametrize(
    ("quantization", "linear"), [("nf4", "NF4, CUDA"), ("gptq", "int4 (GPTQ), CUDA")]
)
@pytest.mark.parametrize("longest", [1, 60, 700])
def test_every_kind_in_one_batch_is_as_near_to_exact_arithmetic_as_torch_is(
    longest: int,
    quantization: str,
    linear: str,
    make_harness: MakeHarness,
    gpu_base: Path,
    gptq_base: Path,
    gpu_kinds: dict[str, Path],
) -> None:
    def harness_of(dtype: str, page_rows: int) -> Harness:
        return make_harness(
            base=gptq_base if quantization == "gptq" else gpu_base,
            quantization=quantization,
            dtype=dtype,
            adapters={"bank_rows": 512, "page_rows": page_rows},
            cache={"num_blocks": 4096},
        )

    fused, exact = harness_of("bfloat16", 8), harness_of("float32", 8)
    torchs = harness_of("bfloat16", 16)  # pages that the kernels do not know: torch's ops run
    assert fused.info.kernels["linear"] == linear
    assert torchs.info.kernels["linear"] == "torch"
    names = [None, *gpu_kinds]
    refs = {
        harness: {name: harness.push(gpu_kinds[name]) if name else None for name in names}
        for harness in (fused, exact, torchs)
    }
    added = [
        (name, fused.add(prompt, refs[fused][name], SAMPLING))
        for prompt in prompts(4, longest)
        for name in names
    ]
    outputs = fused.run()
    for name in names:
        ours, theirs = [], []
        for request in (request for own, request in added if own == name):
            right = forced_logprobs(exact, refs[exact][name], request)
            ours.append(torch.tensor(logprobs_of(outputs, request)) - right)
            theirs.append(forced_logprobs(torchs, refs[torchs][name], request) - right)
        our_error, their_error = (torch.cat(e).square().mean().sqrt() for e in (ours, theirs))
        assert our_error < 1.5 * their_error + 0.01, f"{name}: {our_error} against {their_error}"


def test_64_requests_answer_bit_by_bit_as_each_does_alone(
    make_harness: MakeHarness, gpu_base: Path, gpu_kinds: dict[str, Path]
) -> None:
    harness = make_harness(
        base=gpu_base,
        quantization="nf4",
        dtype="bfloat16",
        adapters={"bank_rows": 512},
        cache={"prefix_caching": False},
    )
    refs: list[AdapterRef | None] = [None, *(harness.push(f) for f in gpu_kinds.values())]
    cases = [([3 + index], refs[index % len(refs)]) for index in range(64)]
    alone = []
    for prompt, adapter in cases:
        request = harness.add(prompt, adapter, SAMPLING)
        alone.append((logprobs_of(harness.run(), request), request.output_ids))
    mixed = [harness.add(prompt, adapter, SAMPLING) for prompt, adapter in cases]
    outputs = harness.run()
    for (logprobs, token_ids), request in zip(alone, mixed, strict=True):
        assert request.output_ids == token_ids
        assert logprobs_of(outputs, request) == logprobs


def test_steps_longer_than_any_graph_agree_with_short_ones(
    make_harness: MakeHarness, gpu_base: Path, gpu_kinds: dict[str, Path]
) -> None:
    found = []
    for num_tokens in (128, 2048):
        harness = make_harness(
            base=gpu_base,
            quantization="nf4",
            dtype="bfloat16",
            adapters={"bank_rows": 512},
            scheduler={"max_step_tokens": num_tokens},
            cache={"num_blocks": 4096},
        )
        adapter = harness.push(gpu_kinds["dora"])
        request = harness.add(prompts(1, 1)[0] * 900, adapter, SAMPLING)
        found.append(logprobs_of(harness.run(), request))
    assert max(abs(a - b) for a, b in zip(*found, strict=True)) < 0.3  # bf16, through DoRA


def test_sampled_penalized_and_greedy_rows_share_a_batch(
    make_harness: MakeHarness, gpu_base: Path
) -> None:
    harness = make_harness(base=gpu_base, quantization="nf4", dtype="bfloat16")
    kinds = [
        SamplingParams(max_tokens=40, temperature=0.8, top_p=0.9, ignore_eos=True),
        SamplingParams(max_tokens=40, temperature=1.2, top_k=20, ignore_eos=True),
        SamplingParams(max_tokens=40, temperature=0, repetition_penalty=1.5, ignore_eos=True),
        SamplingParams(max_tokens=40, temperature=0, ignore_eos=True, logit_bias={7: 100.0}),
        SamplingParams(max_tokens=40, temperature=0, ignore_eos=True),
    ]
    alone = [harness.generate([9, 8, 7], None, sampling) for sampling in kinds]
    together = [harness.add([9, 8, 7], None, sampling) for sampling in kinds]
    harness.run()
    assert [request.output_ids for request in together] == alone
    assert set(alone[3]) == {7}
