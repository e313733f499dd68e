"""The sampling kernel against the reference sampler: on a GPU, or in Triton's interpreter.

The interpreter is chosen before Triton is imported, for a whole process. So where there is no GPU
one test here runs the others in a process of their own, and the sampler's tests with this kernel.
"""

import importlib.util
import itertools
import math
import random
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from server.engine import sampler_reference
from server.engine.request import Request, SamplingParams
from server.engine.sampler import Sampler
from server.engine.sampler_reference import uniform
from server.kernels.sampling_step import ROW, SamplerGpuStep
from tests.interpreter import INTERPRETED, run_interpreted

HAS_GPU = torch.cuda.is_available()
HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:
    import triton  # type: ignore[import-untyped]  # it ships no types

    from server.kernels import sampling_gpu

DEVICE = torch.device("cuda" if HAS_GPU and not INTERPRETED else "cpu")
needs_device = pytest.mark.skipif(not (INTERPRETED or HAS_GPU), reason="needs an NVIDIA GPU")
needs_gpu = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs an NVIDIA GPU")
needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="needs Triton")
interpreter_only = pytest.mark.skipif(not INTERPRETED, reason="one compilation a size on a GPU")

EOS, MAX_RUNNING = 3, 64
FULL_VOCAB = 32000
VOCAB = 37 if INTERPRETED else FULL_VOCAB  # no multiple of the interpreted tile
TILE = 16  # interpreted
ROUNDING = 2e-6  # of sums of up to 131,072 weights, relative to the sum
_times = itertools.count(1)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> Any:
    if INTERPRETED:
        monkeypatch.setattr(sampling_gpu, "_TILE", TILE)
    with np.errstate(all="ignore"):  # the interpreter's infinities are meant
        yield


@pytest.mark.skipif(INTERPRETED or HAS_GPU, reason="the tests below run here")
@needs_triton
@pytest.mark.slow
def test_the_kernel_is_right_in_tritons_interpreter() -> None:
    run_interpreted(__file__, "tests/server/engine/test_sampler.py")


@pytest.mark.skipif(INTERPRETED, reason="it compiles")
@needs_triton
def test_the_kernel_compiles_without_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    pointers = {
        "logits": "*bf16",
        "rows": "*i32",
        "biases": "*i32",
        "last_tokens": "*i64",
        "output_counts": "*i32",
        "is_prompt": "*u8",
        "weights": "*fp32",
        "tokens_out": "*i64",
    }
    signature = {**pointers, "weights_stride": "i32", "VOCAB": "constexpr", "TILE": "constexpr"}
    source = triton.compiler.ASTSource(
        fn=sampling_gpu._sample,
        signature=signature,
        constexprs={"VOCAB": FULL_VOCAB, "TILE": 4096},
        attrs={(index,): [["tt.divisibility", 16]] for index in range(len(pointers) + 1)},
    )
    target = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    options = {"num_warps": 16, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=target, options=options)
    assert len(compiled.asm["cubin"]) > 1000


def make_request(
    state_row: int = 0,
    *,
    prompt: tuple[int, ...] = (1,),
    output: tuple[int, ...] = (),
    seed: int = 7,
    **params: Any,
) -> Request:
    """A request that has just been admitted to `state_row` and samples its next token."""
    return Request(
        request_id="r",
        prompt_ids=list(prompt),
        output_ids=list(output),
        num_pending=1,
        sampling=SamplingParams(max_tokens=1000, **params),
        adapter=None,
        tenant="",
        arrival_time=0.0,
        seed=seed,
        state_row=state_row,
        admitted_time=float(next(_times)),
    )


def make_sampler(vocab: int) -> Sampler:
    return Sampler(vocab, MAX_RUNNING, (EOS,), DEVICE, is_fused=True)


def sample(logits: torch.Tensor, *requests: Request) -> list[int]:
    """One step of a fresh sampler."""
    sampler = make_sampler(logits.shape[-1])
    return sampler.sample(logits.to(DEVICE), list(requests)).tolist()


def reference(logits: torch.Tensor, requests: list[Request], shift: float) -> list[int]:
    """One step of the sampler in plain PyTorch, its random numbers moved by `shift`."""

    def shifted(seed: int, position: int) -> float:
        return min(max(uniform(seed, position) + shift, 0.0), 1 - 2**-32)

    sampler = Sampler(logits.shape[-1], MAX_RUNNING, (EOS,), torch.device("cpu"), is_fused=False)
    with mock.patch.object(sampler_reference, "uniform", shifted):
        return sampler.sample(logits.float(), requests).tolist()


def assert_follows_reference(
    found: list[int], logits: torch.Tensor, requests: list[Request]
) -> None:
    """Equal, but for draws within fp32's rounding of the edge between two tokens.

    Draws go through the tokens in the order of their ids.
    """
    lowest = reference(logits, requests, -ROUNDING)
    highest = reference(logits, requests, ROUNDING)
    wrong = [
        (low, token, high)
        for low, token, high in zip(lowest, found, highest, strict=True)
        if not low <= token <= high
    ]
    assert not wrong


def random_params(rng: random.Random, vocab: int) -> dict[str, Any]:
    """Each parameter off as often as on."""
    choices: dict[str, Any] = {
        "temperature": rng.choice([0.0, 0.3, 1.7]),
        "top_k": rng.choice([1, 2, rng.randint(3, vocab - 1), 2**31 - 1]),
        "top_p": rng.choice([1e-6, rng.random(), 0.999]),
        "min_p": rng.choice([rng.random(), 0.01, 1.0]),
        "presence_penalty": rng.choice([-2.0, 0.5, 2.0]),
        "frequency_penalty": rng.choice([-1.0, 0.7]),
        "repetition_penalty": rng.choice([0.5, 1.3, 3.0]),
        "logit_bias": {rng.randrange(vocab): rng.choice([-100.0, 5.0]) for _ in range(20)},
        "min_tokens": rng.randint(0, 6),
        "stop_token_ids": (5, 6),
    }
    return {name: value for name, value in choices.items() if rng.random() < 0.5}


def random_requests(rng: random.Random, vocab: int, num_rows: int) -> list[Request]:
    """Requests in state rows of any order, with tokens that penalties know."""
    return [
        make_request(
            state_row,
            prompt=tuple(rng.choices(range(vocab), k=4)),
            output=tuple(rng.choices(range(vocab), k=rng.randint(0, 8))),
            seed=rng.getrandbits(64) - 2**63,
            **random_params(rng, vocab),
        )
        for state_row in rng.sample(range(MAX_RUNNING), num_rows)
    ]


def random_logits(rng: random.Random, num_rows: int, vocab: int, scale: float = 3) -> torch.Tensor:
    """bf16 values, so that many of them tie."""
    generator = torch.Generator().manual_seed(rng.getrandbits(32))
    logits = (torch.randn(num_rows, vocab, generator=generator) * scale).bfloat16()
    return logits.float() if INTERPRETED else logits  # interpreted bf16 arithmetic is wrong


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("seed", range(8))
def test_any_parameters_choose_what_the_reference_chooses(seed: int) -> None:
    rng = random.Random(seed)
    requests = random_requests(rng, VOCAB, 16)
    logits = random_logits(rng, 16, VOCAB)

    assert_follows_reference(sample(logits, *requests), logits, requests)


@interpreter_only
@pytest.mark.parametrize("vocab", [1, 15, 16, 17, 32])
def test_any_vocabulary_fits_any_tile(vocab: int) -> None:
    rng = random.Random(vocab)
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"top_k": 3},
        {"top_p": 0.6},
        {"top_k": 5, "top_p": 0.8, "min_p": 0.05},
        {"frequency_penalty": 1.0, "top_p": 0.9},
    ]
    for _ in range(2):
        logits = random_logits(rng, 6, vocab)
        requests = [
            make_request(row, prompt=(0,), seed=rng.getrandbits(60), **params)
            for row, params in enumerate(kinds)
        ]
        assert_follows_reference(sample(logits, *requests), logits, requests)


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("levels", [1, 2, 3])
def test_among_equals_a_filters_edge_falls_as_in_the_reference(levels: int) -> None:
    rng = random.Random(levels)
    generator = torch.Generator().manual_seed(levels)
    logits = torch.randint(0, levels, (16, VOCAB), generator=generator).float()
    requests = [
        make_request(row, seed=rng.getrandbits(60), top_k=rng.randint(1, 30), top_p=rng.random())
        for row in range(16)
    ]
    assert_follows_reference(sample(logits, *requests), logits, requests)


@pytest.mark.gpu
@needs_device
def test_greedy_takes_the_lowest_of_the_ids_that_tie() -> None:
    logits = torch.full((3, VOCAB), -1.0)
    logits[0, [9, 17, 33]] = 2.0
    logits[1, [11, 20]] = torch.tensor([-0.0, 0.0])  # equal, though their bits are not
    logits[2] = -math.inf
    requests = [make_request(row, temperature=0.0) for row in range(3)]
    assert sample(logits, *requests) == [9, 11, 0]


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_p": 0.5, "top_k": 9}])
@pytest.mark.parametrize("is_edited", [False, True])
def test_where_the_largest_logit_is_no_number_its_id_is_the_token(
    params: dict[str, Any], is_edited: bool
) -> None:
    """Any id of the vocabulary would do; one outside it would fail every request of the step."""
    logits = torch.zeros(5, VOCAB)
    logits[0] = math.nan
    logits[1, [12, 30]] = -math.nan
    logits[1, 4] = math.inf
    logits[2, [13, 14]] = math.inf
    logits[3] = -math.inf
    logits[4, 20:] = -math.nan
    params = params | ({"logit_bias": {5: 1.0}} if is_edited else {})
    requests = [make_request(row, **params) for row in range(5)]
    assert sample(logits, *requests) == [0, 12, 13, 0, 20]


@pytest.mark.gpu
@needs_device
def test_an_infinitely_unlikely_token_is_never_drawn() -> None:
    logits = torch.full((8, VOCAB), -math.inf)
    logits[:, [5, 30]] = torch.tensor([1.0, 2.0])
    kinds: list[dict[str, Any]] = [{}, {"top_k": 20}, {"top_p": 0.99}, {"top_k": 2}]
    for params in kinds:
        requests = [make_request(row, seed=row, **params) for row in range(8)]
        assert set(sample(logits, *requests)) == {5, 30}


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("draw", [0, 2**31, 2**32 - 1])
def test_the_ends_of_the_random_numbers_range_fall_on_kept_tokens(draw: int) -> None:
    """Of 10 equally likely tokens amid others that top-k rules out, 0 is the first."""
    kept = list(range(11, 31, 2))
    logits = torch.zeros(1, VOCAB)
    logits[0, kept] = 4.0
    step = SamplerGpuStep(max_rows=1, max_biases=1, device=DEVICE)
    rows = np.zeros(1, ROW)
    rows["temperature"], rows["log_min_p"], rows["top_p"] = 1, -math.inf, 1
    rows["top_k"], rows["draw"] = 10, draw
    step.fill(rows, {}, 1)
    state = sampling_gpu.SamplerGpuState(
        torch.zeros(1, dtype=torch.int64, device=DEVICE),
        torch.zeros(1, VOCAB, dtype=torch.int32, device=DEVICE),
        torch.zeros(1, VOCAB, dtype=torch.bool, device=DEVICE),
        torch.zeros(1, VOCAB, device=DEVICE),
    )
    tokens = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    sampling_gpu.sample_gpu(logits.to(DEVICE), step, state, tokens)

    assert tokens.tolist() == [kept[draw * 10 >> 32]]


@pytest.mark.gpu
@needs_device
def test_a_row_is_sampled_the_same_alone_and_in_any_batch() -> None:
    rng = random.Random(5)
    requests = random_requests(rng, VOCAB, 12)
    logits = random_logits(rng, 12, VOCAB)

    together = sample(logits, *requests)
    backwards = sample(logits.flip(0), *reversed(requests))

    assert backwards == together[::-1]
    for row, request in enumerate(requests):
        assert sample(logits[row : row + 1], request) == [together[row]]


@pytest.mark.gpu
@needs_device
def test_padding_rows_do_nothing() -> None:
    sampler = make_sampler(VOCAB)
    first = make_request(0, temperature=0.0, presence_penalty=1.0)
    second = make_request(1, temperature=0.0)
    logits = torch.zeros(4, VOCAB)
    logits[0, 9], logits[1, 10], logits[2, 11], logits[3, 12] = 1, 1, 1, 1
    sampler.sample(logits[:2].to(DEVICE), [first, second])
    first.num_pending = 2

    sampler.prepare([first], 4)
    tokens = sampler.launch(logits.flip(0).to(DEVICE))

    assert tokens[0] == 12
    assert sampler.last_tokens.tolist() == [12, 10, *[0] * (MAX_RUNNING - 2)]
    assert sampler._output_counts.nonzero().tolist() == [[0, 9], [0, 12]]


@pytest.mark.gpu
@needs_device
def test_a_step_may_hold_more_padding_than_requests_can_run() -> None:
    sampler = Sampler(VOCAB, 2, (EOS,), DEVICE, max_rows=5, is_fused=True)
    sampler.prepare([], 5)
    logits = torch.zeros(5, VOCAB, device=DEVICE)
    logits[:, 9] = 1
    sampler.launch(logits)
    assert sampler.last_tokens.tolist() == [0, 0]
    sampler.prepare([make_request(1, temperature=0.0)], 5)
    sampler.launch(logits)
    assert sampler.last_tokens.tolist() == [0, 9]


@pytest.mark.gpu
@needs_device
def test_more_rows_than_were_prepared_are_refused() -> None:
    sampler = make_sampler(VOCAB)
    sampler.prepare([make_request()])
    with pytest.raises(AssertionError, match="fewer rows"):
        sampler.launch(torch.zeros(2, VOCAB, device=DEVICE))


@pytest.mark.gpu
@needs_device
def test_penalties_follow_tokens_that_only_the_device_knows() -> None:
    """Three steps ahead of the host, which learns of the tokens at the end."""
    rng = random.Random(8)
    sampler = make_sampler(VOCAB)
    plain = Sampler(VOCAB, MAX_RUNNING, (EOS,), torch.device("cpu"), is_fused=False)
    params: dict[str, Any] = {
        "frequency_penalty": 1.5,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.2,
    }
    ahead = [
        make_request(2, temperature=0.0, **params),
        make_request(0, seed=4, top_k=20, **params),
    ]
    behind = [
        make_request(2, temperature=0.0, **params),
        make_request(0, seed=4, top_k=20, **params),
    ]
    one_row = random_logits(rng, 1, VOCAB, scale=1)
    found, expected = [], []
    for _ in range(3):
        logits = one_row.expand(2, -1).contiguous()
        found.append(sampler.sample(logits.to(DEVICE), ahead).clone())
        expected.append(plain.sample(logits.float(), behind).tolist())
        for request, token in zip(behind, expected[-1], strict=True):
            request.output_ids.append(token)
        for request in ahead:
            request.num_pending += 1
    assert [tokens.tolist() for tokens in found] == expected
    assert len({tokens[0] for tokens in expected}) == 3


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("params", [{}, {"top_k": 8}, {"top_p": 0.9999999}])
def test_many_draws_are_distributed_as_the_model_says(params: dict[str, Any]) -> None:
    """Pearson's chi-square; 99.9 % of fair samplers stay below 24.3 at 7 degrees of freedom."""
    likely = torch.tensor([2.0, 1.0, 0.5, 0.0, 0.0, -0.5, -1.0, -1.5])
    places = [1, 6, 9, 15, 16, 20, 30, 36]
    logits = torch.full((MAX_RUNNING, VOCAB), -60.0)
    logits[:, places] = likely
    logits = logits.to(DEVICE)
    sampler = make_sampler(VOCAB)
    observed = torch.zeros(VOCAB)
    for first in range(0, 20_000, MAX_RUNNING):
        requests = [make_request(row, seed=first + row, **params) for row in range(MAX_RUNNING)]
        tokens = sampler.sample(logits, requests)
        observed += torch.bincount(tokens.cpu(), minlength=VOCAB)
    expected = likely.softmax(-1) * observed.sum()

    assert float(((observed[places] - expected) ** 2 / expected).sum()) < 24.3
    assert observed[places].sum() == observed.sum()


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("vocab", [FULL_VOCAB, 131_072])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_at_full_size_the_reference_is_followed(vocab: int, dtype: torch.dtype) -> None:
    for seed in range(4):
        rng = random.Random(seed)
        requests = random_requests(rng, vocab, 16)
        logits = random_logits(rng, 16, vocab, scale=5).to(dtype)
        assert_follows_reference(sample(logits, *requests), logits, requests)


@pytest.mark.gpu
@needs_gpu
def test_a_replayed_graph_samples_for_the_requests_prepared_before_it() -> None:
    rng = random.Random(3)
    sampler, num_rows = make_sampler(VOCAB), 16
    logits = torch.zeros(num_rows, VOCAB, dtype=torch.bfloat16, device=DEVICE)
    sampler.prepare([], num_rows)
    sampler.launch(logits)  # compiled outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tokens = sampler.launch(logits)
    for num_requests in (16, 3, 16, 1, 9):
        requests = random_requests(rng, VOCAB, num_requests)
        values = random_logits(rng, num_rows, VOCAB)
        logits.copy_(values)
        sampler.prepare(requests, num_rows)
        graph.replay()

        chosen = tokens[:num_requests].tolist()

        assert_follows_reference(chosen, values[:num_requests], requests)
        state_rows = [request.state_row for request in requests]
        assert sampler.last_tokens[state_rows].tolist() == chosen


@pytest.mark.gpu
@needs_gpu
def test_nothing_waits_for_the_device() -> None:
    """Not even when penalised requests are new."""
    sampler = make_sampler(VOCAB)
    logits = torch.randn(3, VOCAB, device=DEVICE)
    sampler.sample(logits, [make_request(row) for row in range(3)])
    requests = [make_request(row, output=(1, 2), frequency_penalty=1.0) for row in range(3)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        sampler.sample(logits, requests)
        sampler.prepare(requests, 3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
