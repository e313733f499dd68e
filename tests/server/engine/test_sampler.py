"""Each sampling parameter against its definition, and the same draw whatever the batch."""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from server.engine.request import Request, SamplingParams
from server.engine.sampler import Sampler, token_logprobs
from server.engine.sampler_reference import uniform
from tests.interpreter import INTERPRETED

EOS = 3
MAX_RUNNING = 16
Floats = npt.NDArray[np.float64]
many_draws = pytest.mark.skipif(INTERPRETED, reason="takes the interpreter minutes")
_times = itertools.count(1)


def make_request(
    *,
    prompt: Sequence[int] = (1,),
    output: Sequence[int] = (),
    state_row: int = 0,
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
    return Sampler(vocab, MAX_RUNNING, (EOS,), torch.device("cpu"), is_fused=INTERPRETED)


def sample(logits: torch.Tensor, *requests: Request) -> list[int]:
    """One step of a fresh sampler."""
    return make_sampler(logits.shape[-1]).sample(logits, list(requests)).tolist()


def as_defined(logits: Floats, request: Request) -> Floats:
    """The distribution that a request's parameters ask for, said as plainly as can be."""
    params, x = request.sampling, logits.copy()
    for token, bias in params.logit_bias.items():
        x[token] += bias
    if len(request.output_ids) < params.min_tokens:
        x[list(params.stop_token_ids)] = -math.inf
        if not params.ignore_eos:
            x[EOS] = -math.inf
    for token in {*request.prompt_ids, *request.output_ids}:
        factor = params.repetition_penalty
        x[token] = x[token] / factor if x[token] > 0 else x[token] * factor
    for token in set(request.output_ids):
        x[token] -= request.output_ids.count(token) * params.frequency_penalty
        x[token] -= params.presence_penalty
    if params.temperature == 0:
        return np.asarray(np.arange(len(x)) == x.argmax(), dtype=np.float64)
    probs = np.exp((x - x.max()) / params.temperature)
    probs[probs < params.min_p * probs.max()] = 0
    probs /= probs.sum()
    descending = np.sort(probs)[::-1][: params.top_k or None]
    descending = descending / descending.sum()
    num_kept = len(descending)
    if params.top_p < 1:  # the smallest head that holds top_p
        num_kept = min(int((descending.cumsum() < params.top_p - 1e-9).sum()) + 1, num_kept)
    probs[probs < np.sort(probs)[::-1][num_kept - 1]] = 0
    return np.asarray(probs / probs.sum())


def assert_as_defined(logits: Floats, request: Request) -> None:
    """The sampled token is the one that the definition's distribution gives to the same number."""
    probs = as_defined(logits, request)
    draw = uniform(request.seed, len(request.output_ids) + 1)
    cumulative = probs.cumsum()
    [token] = sample(torch.tensor(logits[None], dtype=torch.float32), request)
    low, high = cumulative[token] - probs[token], cumulative[token]
    assert low - 1e-5 <= draw <= high + 1e-5


PARAMS = st.fixed_dictionaries(
    {},
    optional={
        "temperature": st.sampled_from([0.0, 0.3, 1.0, 1.7]),
        "top_k": st.integers(1, 25),
        "top_p": st.floats(0.05, 0.999),
        "min_p": st.floats(0.001, 0.9),
        "presence_penalty": st.sampled_from([-2.0, 0.5, 2.0]),
        "frequency_penalty": st.sampled_from([-1.0, 0.7, 2.0]),
        "repetition_penalty": st.sampled_from([0.5, 1.3, 3.0]),
        "logit_bias": st.dictionaries(st.integers(0, 19), st.sampled_from([-100.0, -1.0, 5.0])),
        "min_tokens": st.integers(0, 6),
        "stop_token_ids": st.sampled_from([(), (5,), (6, 7)]),
        "ignore_eos": st.booleans(),
    },
)
TOKENS = st.lists(st.integers(0, 19), min_size=1, max_size=6)


@settings(max_examples=25 if INTERPRETED else 300, deadline=None)
@given(
    params=PARAMS, prompt=TOKENS, output=TOKENS, seed=st.integers(0, 2**63), numbers=st.integers(0)
)
def test_any_parameters_give_what_their_definitions_say(
    params: dict[str, Any], prompt: list[int], output: list[int], seed: int, numbers: int
) -> None:
    logits = np.random.default_rng(numbers % 2**32).normal(0, 3, size=20).round(1)
    request = make_request(prompt=prompt, output=output[:-1], seed=seed, **params)

    assert_as_defined(logits, request)


@many_draws
def test_many_draws_are_distributed_as_the_model_says() -> None:
    """Pearson's chi-square over 20,000 seeds; 99.9 % of fair samplers stay below 24.3 at df 7."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, 0.0, -0.5, -1.0, -3.0]])
    sampler, num_draws = make_sampler(8), 20_000
    expected = logits[0].double().softmax(-1) * num_draws
    drawn = torch.cat(
        [
            sampler.sample(
                logits.expand(MAX_RUNNING, -1),
                [make_request(state_row=row, seed=seed + row) for row in range(MAX_RUNNING)],
            )
            for seed in range(0, num_draws, MAX_RUNNING)
        ]
    )

    observed = torch.bincount(drawn, minlength=8).double()

    assert float(((observed - expected) ** 2 / expected).sum()) < 24.3


def test_one_seeds_draws_at_successive_places_are_evenly_spread() -> None:
    draws = torch.tensor([uniform(5, position) for position in range(10_000)])

    counts = torch.histc(draws, bins=10, min=0, max=1)

    assert float(((counts - 1000) ** 2 / 1000).sum()) < 27.9  # chi-square, df 9, 99.9 %
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1


def rows_of_every_kind(vocab: int) -> list[Request]:
    """Requests whose filters need few, many and all of the sorted candidates."""
    kinds: list[dict[str, Any]] = [
        {"temperature": 0.0},
        {"temperature": 1.0},
        {"temperature": 0.7, "top_k": 40},
        {"temperature": 1.0, "top_p": 0.9},
        {"temperature": 2.0, "top_p": 0.999},
        {"temperature": 1.0, "top_k": min(vocab, 1500), "top_p": 0.95},
        {"temperature": 1.0, "min_p": 0.02, "top_p": 0.8},
        {"temperature": 1.0, "repetition_penalty": 1.2, "frequency_penalty": 0.3},
        {"temperature": 0.0, "presence_penalty": 1.0},
        {"temperature": 1.0, "logit_bias": {4: 5.0}, "top_k": 3},
        {"temperature": 1.0, "min_tokens": 9},
    ]
    return [
        make_request(prompt=[1, 2], output=[4, 5, 4], state_row=row, seed=row, **params)
        for row, params in enumerate(kinds)
    ]


@many_draws
@pytest.mark.parametrize("vocab", [50, 1024, 5000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_request_draws_the_same_alone_and_in_any_batch(vocab: int, dtype: torch.dtype) -> None:
    """bf16 logits are full of ties, and a tie at a filter's edge must fall one way."""
    generator = torch.Generator().manual_seed(vocab)
    for _ in range(15):
        requests = rows_of_every_kind(vocab)
        for request in requests:
            request.seed = int(torch.randint(2**60, (1,), generator=generator))
        logits = torch.randn(len(requests), vocab, generator=generator).to(dtype)

        together = sample(logits, *requests)
        backwards = sample(logits.flip(0), *reversed(requests))
        alone = [sample(logits[row : row + 1], r)[0] for row, r in enumerate(requests)]

        assert together == alone
        assert backwards == alone[::-1]


@many_draws
def test_a_filters_edge_falls_the_same_way_whatever_else_is_sorted() -> None:
    """Hundreds of tokens tie at the edge of top-k; a neighbour that sorts more changes nothing."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randint(0, 4, (2, 4000), generator=generator).float()
    neighbour = make_request(state_row=1, top_k=3500)

    for seed in range(40):
        request = make_request(seed=seed, top_k=1100, top_p=0.9)
        assert sample(logits[:1], request)[0] == sample(logits, request, neighbour)[0]


def test_a_seed_gives_the_same_token_at_the_same_place_after_a_preemption() -> None:
    logits = torch.zeros(1, 1000)
    before = make_request(output=[5, 6], seed=11, state_row=0)
    after = make_request(output=[5, 6], seed=11, state_row=9)
    later = make_request(output=[5, 6, 7], seed=11, state_row=0)

    assert sample(logits, before) == sample(logits, after)
    assert sample(logits, before) != sample(logits, later)


def test_a_token_still_pending_counts_as_a_place() -> None:
    """Overlapped, the earlier token is on the device only; the draw must not be repeated."""
    logits = torch.zeros(1, 1000)
    overlapped = make_request(output=[5], seed=11)
    overlapped.num_pending = 2
    plain = make_request(output=[5, 6], seed=11)

    assert sample(logits, overlapped) == sample(logits, plain)


def test_greedy_takes_the_likeliest_token_beside_rows_that_are_drawn() -> None:
    logits = torch.tensor([[0.0, 5.0, 1.0], [9.0, 0.0, 0.0], [0.0, 0.0, 4.0]]).bfloat16()
    greedy = [make_request(temperature=0.0, state_row=row) for row in (0, 2)]

    tokens = sample(logits, greedy[0], make_request(state_row=1, temperature=1.0), greedy[1])

    assert (tokens[0], tokens[2]) == (1, 2)


@pytest.mark.parametrize("temperature", [1e-300, 1e-45, 1e-38, 1e-30, 1e-6])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_as_the_temperature_falls_towards_nothing_sampling_becomes_greedy(
    temperature: float, scale: float
) -> None:
    logits = torch.tensor([[1.0, 3.0, -2.0, 2.9]]) * scale
    for params in ({}, {"top_p": 0.5}, {"top_k": 3}, {"min_p": 0.1}):
        request = make_request(temperature=temperature, **params)
        assert sample(logits, request) == [1]


@many_draws
def test_at_a_huge_temperature_every_token_is_equally_likely() -> None:
    logits = torch.tensor([[50.0, 0.0, -50.0, 10.0]])

    drawn = {sample(logits, make_request(temperature=1e30, seed=seed))[0] for seed in range(60)}

    assert drawn == {0, 1, 2, 3}


def test_logits_gone_wrong_still_give_a_token_of_the_vocabulary() -> None:
    """One outside it would fail the next step, and every other request in it."""
    logits = torch.full((2, 50), math.nan)

    tokens = sample(logits, make_request(), make_request(state_row=1, top_p=0.5, top_k=9))

    assert all(0 <= token < 50 for token in tokens)


@many_draws
def test_top_k_beyond_the_vocabulary_is_no_limit() -> None:
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(1))

    for seed in range(30):
        limited = make_request(top_k=2**31 - 1, seed=seed)
        assert sample(logits, limited) == sample(logits, make_request(seed=seed))


@many_draws
def test_top_p_keeps_the_smallest_head_that_holds_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()

    def drawn(top_p: float) -> set[int]:
        seeds = range(200)
        return {sample(logits, make_request(top_p=top_p, seed=seed))[0] for seed in seeds}

    assert drawn(0.45) == {0}
    assert drawn(0.55) == {0, 1}
    assert drawn(0.9) == {0, 1, 2}
    assert drawn(0.0) == {0}


@many_draws
def test_top_p_is_taken_of_what_top_k_leaves() -> None:
    logits = torch.tensor([[0.4, 0.3, 0.2, 0.1]]).log()  # of the first two: 0.57, 0.43

    seeds = range(100)
    drawn = {sample(logits, make_request(top_k=2, top_p=0.55, seed=seed))[0] for seed in seeds}

    assert drawn == {0}


@many_draws
def test_top_p_that_needs_more_than_the_first_candidates_gets_them() -> None:
    logits = np.zeros(6000)
    logits[:10] = 1.0
    top_p = 0.9
    flat = torch.tensor(logits[None], dtype=torch.float32) + torch.linspace(0, 1e-3, 6000)

    drawn = [sample(flat, make_request(top_p=top_p, seed=seed))[0] for seed in range(300)]

    # The lowest tenth is out, and the rest is in, far beyond the 1024 sorted first.
    assert min(token for token in drawn if token >= 10) > 550
    assert len(set(drawn)) > 200
    assert min(token for token in drawn if token >= 10) < 900


def test_penalties_count_generated_tokens_and_repetition_counts_the_prompt_too() -> None:
    logits = np.array([1.0, 1.1, 1.2, 0.0])
    only_prompt = make_request(prompt=[2], temperature=0.0, presence_penalty=2.0)
    generated = make_request(prompt=[0], output=[2], temperature=0.0, presence_penalty=2.0)
    repeated = make_request(prompt=[2], temperature=0.0, repetition_penalty=2.0)

    assert as_defined(logits, only_prompt).argmax() == 2
    as_tensor = torch.tensor(logits[None], dtype=torch.float32)
    assert sample(as_tensor, only_prompt) == [2]
    assert sample(as_tensor, generated) == [1]
    assert sample(as_tensor, repeated) == [1]


def test_a_frequency_penalty_grows_with_each_use_and_a_presence_penalty_does_not() -> None:
    logits = torch.tensor([[5.0, 3.4, 0.0]])

    def greedy(output: list[int], **params: Any) -> list[int]:
        return sample(logits, make_request(output=output, temperature=0.0, **params))

    assert greedy([0], frequency_penalty=1.0) == [0]
    assert greedy([0, 0], frequency_penalty=1.0) == [1]
    assert greedy([0, 0, 0, 0], presence_penalty=1.0) == [0]


@pytest.mark.parametrize("overlap", [False, True])
def test_penalties_follow_a_request_token_by_token_and_through_a_preemption(overlap: bool) -> None:
    vocab = 12
    sampler = make_sampler(vocab)
    generator = np.random.default_rng(3)
    request = make_request(
        prompt=[1, 2, 2],
        temperature=0.0,
        frequency_penalty=0.6,
        presence_penalty=0.3,
        repetition_penalty=1.4,
    )
    other = make_request(prompt=[5, 6], state_row=4, temperature=0.0, frequency_penalty=2.0)
    on_device: list[int] = []
    for step in range(24):
        if step == 12:  # preempted: its tokens are known, and another's old row is its own now
            request.output_ids, on_device = request.output_ids + on_device, []
            request.state_row, other.state_row = other.state_row, request.state_row
            request.admitted_time = other.admitted_time = float(next(_times))
        request.num_pending = len(on_device) + 1
        logits = generator.normal(0, 1, size=vocab).round(2)
        truth = dataclasses.replace(request, output_ids=request.output_ids + on_device)
        expected = int(as_defined(logits, truth).argmax())

        as_tensor = torch.tensor(np.stack([logits, logits]), dtype=torch.float32)
        token, others = sampler.sample(as_tensor, [request, other]).tolist()

        assert token == expected, f"step {step}"
        other.output_ids.append(others)
        on_device.append(token)
        if not overlap or len(on_device) == 2:
            request.output_ids.append(on_device.pop(0))


def test_a_state_row_given_to_another_request_forgets_the_one_before() -> None:
    sampler = make_sampler(4)
    logits = torch.tensor([[1.0, 0.9, 0.0, 0.0]])
    first = make_request(prompt=[0], output=[0], temperature=0.0, frequency_penalty=1.0)
    second = make_request(prompt=[2], temperature=0.0, frequency_penalty=1.0)

    assert sampler.sample(logits, [first]).tolist() == [1]
    assert sampler.sample(logits, [second]).tolist() == [0]


def test_a_state_row_forgets_the_prompt_of_the_request_before() -> None:
    sampler = make_sampler(4)
    logits = torch.tensor([[1.0, 0.9, 0.0, 0.0]])
    first = make_request(prompt=[0], temperature=0.0, repetition_penalty=2.0)
    second = make_request(prompt=[2], temperature=0.0, repetition_penalty=2.0)

    assert sampler.sample(logits, [first]).tolist() == [1]
    assert sampler.sample(logits, [second]).tolist() == [0]


def test_a_request_that_returns_to_its_first_state_row_counts_what_it_generated_elsewhere() -> None:
    sampler = make_sampler(4)
    logits = torch.tensor([[1.0, 0.6, 0.2, -9.0]])
    request = make_request(prompt=[3], temperature=0.0, presence_penalty=1.0)
    tokens = []
    for row in (0, 4, 0):
        request.state_row, request.admitted_time = row, float(next(_times))
        tokens += sampler.sample(logits, [request]).tolist()
        request.output_ids = list(tokens)

    assert tokens == [0, 1, 2]


def test_a_token_out_of_the_models_favour_is_pushed_down_by_a_repetition_penalty_too() -> None:
    logits = torch.tensor([[-1.0, -1.5, -9.0, -9.0]])
    request = make_request(prompt=[0], temperature=0.0, repetition_penalty=2.0)

    assert sample(logits, request) == [1]


def test_until_min_tokens_are_out_neither_the_end_nor_a_stop_id_can_come() -> None:
    logits = torch.tensor([[0.0, 0.5, 2.0, 4.0, 3.0]])  # EOS first, then 4

    def token(output: list[int], **params: Any) -> list[int]:
        return sample(logits, make_request(output=output, temperature=0.0, **params))

    assert token([1], min_tokens=2) == [4]
    assert token([1], min_tokens=2, stop_token_ids=(4,)) == [2]
    assert token([1, 1], min_tokens=2, stop_token_ids=(4,)) == [EOS]
    assert token([1], min_tokens=2, ignore_eos=True) == [EOS]  # it ends nothing then
    assert token([1], min_tokens=2, logit_bias={EOS: 100.0}) == [4]


def test_min_tokens_count_a_token_that_is_pending() -> None:
    logits = torch.tensor([[0.0, 0.0, 1.0, 4.0]])
    overlapped = make_request(output=[1], temperature=0.0, min_tokens=2)
    overlapped.num_pending = 2

    assert sample(logits, overlapped) == [EOS]


def test_a_bias_is_added_to_its_own_rows_logits_alone() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0]])
    biased = make_request(temperature=0.0, logit_bias={0: 1.5, 1: -100.0})

    assert sample(logits, biased, make_request(temperature=0.0, state_row=1)) == [0, 1]


def test_the_models_logits_are_left_as_they_were() -> None:
    """Logprobs are read from them afterwards."""
    logits = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
    before = logits.clone()

    sample(
        logits,
        make_request(logit_bias={1: 5.0}, frequency_penalty=1.0, min_tokens=2, top_k=4, min_p=0.1),
        make_request(state_row=1, top_p=0.5, temperature=0.3),
    )

    assert torch.equal(logits, before)


def test_the_newest_token_of_each_state_row_is_kept_on_the_device() -> None:
    sampler = make_sampler(4)
    logits = torch.eye(4)[:2] * 9
    requests = [make_request(temperature=0.0, state_row=row) for row in (5, 2)]

    sampler.sample(logits, requests)

    assert sampler.last_tokens.tolist()[:6] == [0, 0, 1, 0, 0, 0]


def test_a_step_that_samples_nothing_is_no_trouble() -> None:
    assert make_sampler(4).sample(torch.empty(0, 4), []).tolist() == []


def test_logprobs_are_the_models_own_with_the_likeliest_first() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]]).bfloat16()
    expected = logits.double().log_softmax(-1)

    found = token_logprobs(logits, torch.tensor([2, 2]), num_top=2)

    torch.testing.assert_close(found.chosen.double(), expected[[0, 1], [2, 2]])
    assert found.top_ids.tolist()[0] == [1, 2]
    torch.testing.assert_close(found.top_logprobs[0].double(), expected[0, [1, 2]])
    assert found.top_logprobs.dtype == torch.float32
    assert token_logprobs(logits, torch.tensor([0, 0]), num_top=0).top_ids.shape == (2, 0)


def test_the_parameters_that_change_nothing_are_the_defaults() -> None:
    defaults = msgspec.structs.asdict(SamplingParams(max_tokens=1))
    neutral = {
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "min_tokens": 0,
    }

    assert {name: defaults[name] for name in neutral} == neutral
