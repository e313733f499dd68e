"""What a request asks for as the kernel's records, token after token."""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from server.engine.request import Request, SamplingParams
from server.engine.sampler_reference import uniform
from server.engine.sampler_rows import SamplerRows, uniform_bits
from server.kernels.sampling_step import BIAS, NO_STATE_ROW, ROW, SamplerGpuStep

VOCAB, MAX_RUNNING, EOS = 100, 8, 2


def make_request(state_row: int = 0, seed: int = 7, **params: Any) -> Request:
    return Request(
        request_id="r",
        prompt_ids=[1],
        num_pending=1,
        sampling=SamplingParams(max_tokens=50, **params),
        adapter=None,
        tenant="",
        arrival_time=0.0,
        seed=seed,
        state_row=state_row,
    )


class Filled:
    """Records of one step of requests that have just been admitted."""

    def __init__(self, *requests: Request, num_rows: int | None = None) -> None:
        self.sampler_rows = SamplerRows(MAX_RUNNING, VOCAB, (EOS,))
        self.step = SamplerGpuStep(max_rows=MAX_RUNNING, max_biases=50, device=torch.device("cpu"))
        for request in requests:
            self.sampler_rows.admit(request)
        self.again(*requests, num_rows=num_rows)

    def again(self, *requests: Request, num_rows: int | None = None) -> None:
        self.sampler_rows.fill(self.step, requests, num_rows or len(requests))

    @property
    def rows(self) -> npt.NDArray[np.void]:
        return self.step.rows.numpy().ravel().view(ROW)[: self.step.num_rows]

    def biases(self, index: int) -> dict[int, float]:
        row = self.rows[index]
        found = self.step.biases.numpy().ravel().view(BIAS)
        return dict(found[row["first_bias"] :][: row["num_biases"]].tolist())


@pytest.mark.parametrize("seed", [0, 1, 7, 2**63, 2**64 - 1, -1, -(2**63), 123456789012345])
def test_the_kernels_random_numbers_are_the_references(seed: int) -> None:
    positions = np.arange(200, dtype=np.uint64)
    seeds = np.full(200, seed & (2**64 - 1), np.uint64)
    assert (uniform_bits(seeds, positions) / 2**32).tolist() == [
        uniform(seed, position) for position in range(200)
    ]


def test_records_hold_what_was_asked_for() -> None:
    rows = Filled(
        make_request(
            3,
            temperature=0.5,
            min_p=0.25,
            top_k=40,
            top_p=0.75,
            repetition_penalty=1.5,
            frequency_penalty=-0.5,
            presence_penalty=2.0,
        )
    ).rows
    assert rows["state_row"].tolist() == [3]
    assert rows["temperature"].tolist() == [0.5]
    assert rows["log_min_p"].tolist() == pytest.approx([math.log(0.25)])
    assert rows["top_k"].tolist() == [40]
    assert rows["top_p"].tolist() == [0.75]
    assert rows["is_penalized"].tolist() == [1]
    assert rows["repetition_penalty"].tolist() == [1.5]
    assert rows["frequency_penalty"].tolist() == [-0.5]
    assert rows["presence_penalty"].tolist() == [2.0]


def test_what_is_off_is_off_in_the_record_too() -> None:
    rows = Filled(make_request(0, temperature=0.0), make_request(1, top_k=VOCAB)).rows
    assert rows["temperature"].tolist() == [0, 1]
    assert rows["log_min_p"].tolist() == [-math.inf, -math.inf]
    assert rows["top_k"].tolist() == [0, 0]  # as many as there are: no limit
    assert rows["is_penalized"].tolist() == [0, 0]
    assert rows["num_biases"].tolist() == [0, 0]


def test_a_temperature_of_next_to_nothing_is_not_greedy_nor_a_division_by_zero() -> None:
    rows = Filled(make_request(temperature=1e-300)).rows
    assert 0 < rows["temperature"][0] < 1e-20


@pytest.mark.parametrize(
    "penalty", [{"repetition_penalty": 0.5}, {"frequency_penalty": 1.0}, {"presence_penalty": -1.0}]
)
def test_any_penalty_alone_marks_the_row(penalty: dict[str, Any]) -> None:
    assert Filled(make_request(**penalty)).rows["is_penalized"].tolist() == [1]


def test_draws_are_of_the_rows_own_seed_and_of_the_place_that_is_sampled() -> None:
    requests = [make_request(5, seed=-3), make_request(1, seed=2**62, temperature=0.7)]
    requests[0].output_ids, requests[0].num_pending = [4, 4, 4], 2

    rows = Filled(make_request(0, temperature=0.0), *requests).rows

    draws = (rows["draw"] / 2**32).tolist()
    assert draws == [0.0, uniform(-3, 5), uniform(2**62, 1)]


def test_a_greedy_batch_that_goes_on_is_not_copied_again_and_one_that_draws_is() -> None:
    greedy, drawn = make_request(0, temperature=0.0), make_request(1)
    filled = Filled(greedy)
    filled.step.rows.zero_()
    greedy.output_ids.append(9)
    filled.again(greedy)
    assert filled.step.rows.count_nonzero() == 0

    filled.sampler_rows.admit(drawn)
    filled.again(greedy, drawn)
    before = filled.rows["draw"].tolist()
    drawn.num_pending += 1
    filled.again(greedy, drawn)
    assert filled.rows["draw"][0] == before[0]
    assert filled.rows["draw"][1] != before[1]


def test_the_end_is_banned_until_min_tokens_are_out() -> None:
    request = make_request(min_tokens=2, stop_token_ids=(9,), logit_bias={EOS: 5.0, 4: 1.0})
    filled = Filled(request)
    banned = {4: 1.0, EOS: -math.inf, 9: -math.inf}
    assert filled.biases(0) == banned
    request.num_pending = 2  # the first one is still on the device
    filled.again(request)
    assert filled.biases(0) == banned
    request.output_ids, request.num_pending = [7], 2
    filled.again(request)
    assert filled.biases(0) == {4: 1.0, EOS: 5.0}


def test_an_ignored_end_is_not_banned() -> None:
    assert Filled(make_request(min_tokens=2, ignore_eos=True)).biases(0) == {}


def test_biases_belong_to_their_request_and_leave_with_it() -> None:
    first, other = make_request(0, logit_bias={1: 1.0}), make_request(1, logit_bias={2: 2.0})
    filled = Filled(first, other)
    assert (filled.biases(0), filled.biases(1)) == ({1: 1.0}, {2: 2.0})
    filled.again(other, first)
    assert (filled.biases(0), filled.biases(1)) == ({2: 2.0}, {1: 1.0})
    filled.sampler_rows.admit(make_request(0))
    filled.again(make_request(0), other)
    assert (filled.biases(0), filled.biases(1)) == ({}, {2: 2.0})


def test_rows_past_the_requests_are_padding() -> None:
    rows = Filled(make_request(4), num_rows=3).rows
    assert rows["state_row"].tolist() == [4, NO_STATE_ROW, NO_STATE_ROW]
    assert Filled(num_rows=2).rows["state_row"].tolist() == [NO_STATE_ROW] * 2
