"""Sampling parameters in the GPU kernel's terms: made once an admission, gathered once a step."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from server.engine.request import Request, SamplingParams
from server.kernels.sampling_step import BIAS, ROW, SamplerGpuStep

COLDEST = 1e-30  # a lower temperature would be 0 in fp32, or divide into infinities

_MASK = 0xFFFFFFFFFFFFFFFF


class SamplerRows:
    """What the request in each state row asked for."""

    def __init__(self, max_running: int, vocab_size: int, eos_token_ids: tuple[int, ...]) -> None:
        self._vocab_size = vocab_size
        self._eos_token_ids = eos_token_ids
        self._rows = np.zeros(max_running, ROW)
        self._seeds = np.zeros(max_running, np.uint64)
        # For the rows that have any: biases, and the same with the end banned until min_tokens.
        self._biases: dict[int, tuple[npt.NDArray[np.void], npt.NDArray[np.void]]] = {}

    def admit(self, request: Request) -> None:
        """Take over a state row for the request that has just been given it."""
        row, params = request.state_row, request.sampling
        self._rows[row] = _record(row, params, self._vocab_size)
        self._seeds[row] = request.seed & _MASK
        self._biases.pop(row, None)
        if params.logit_bias or params.min_tokens > 0:
            banned = dict.fromkeys(stop_ids(params, self._eos_token_ids), -math.inf)
            self._biases[row] = (_pairs(params.logit_bias), _pairs(params.logit_bias | banned))

    def fill(self, step: SamplerGpuStep, requests: Sequence[Request], num_rows: int) -> None:
        """Describe a step of these requests, all admitted, and of padding up to `num_rows`."""
        state_rows = [request.state_row for request in requests]
        rows = self._rows[state_rows]
        drawn = np.flatnonzero(rows["temperature"])
        if len(drawn):
            places = [num_generated(requests[index]) for index in drawn.tolist()]
            seeds = self._seeds[rows["state_row"][drawn]]
            rows["draw"][drawn] = uniform_bits(seeds, np.array(places, np.uint64))
        biases = {}
        if self._biases:
            for index, row in enumerate(state_rows):
                if row in self._biases:
                    plain, banned = self._biases[row]
                    is_too_early = must_go_on(requests[index])
                    biases[index] = banned if is_too_early else plain
        step.fill(rows, {index: own for index, own in biases.items() if len(own)}, num_rows)


def stop_ids(params: SamplingParams, eos_token_ids: tuple[int, ...]) -> set[int]:
    """The tokens that end the answer."""
    return set(params.stop_token_ids) | (set() if params.ignore_eos else set(eos_token_ids))


def num_generated(request: Request) -> int:
    """The place of the token that a launched step samples, the first being 1."""
    return len(request.output_ids) + request.num_pending


def must_go_on(request: Request) -> bool:
    """Whether the next token must not end the answer."""
    return num_generated(request) <= request.sampling.min_tokens


def has_penalty(params: SamplingParams) -> bool:
    """Whether the sampler has to know what was generated, or prompted."""
    return (
        params.repetition_penalty != 1
        or params.frequency_penalty != 0
        or params.presence_penalty != 0
    )


def uniform_bits(
    seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]
) -> npt.NDArray[np.uint64]:
    """32 random bits that depend on the seed and the token's place alone (splitmix64)."""
    z = seeds + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    bits: npt.NDArray[np.uint64] = (z ^ (z >> np.uint64(31))) >> np.uint64(32)
    return bits


def _record(row: int, params: SamplingParams, vocab_size: int) -> npt.NDArray[np.void]:
    record = np.zeros((), ROW)
    record["state_row"] = row
    record["temperature"] = max(params.temperature, COLDEST) if params.temperature > 0 else 0
    record["log_min_p"] = math.log(params.min_p) if params.min_p > 0 else -math.inf
    record["top_k"] = params.top_k if params.top_k < vocab_size else 0
    record["top_p"] = params.top_p
    record["is_penalized"] = has_penalty(params)
    record["repetition_penalty"] = params.repetition_penalty
    record["frequency_penalty"] = params.frequency_penalty
    record["presence_penalty"] = params.presence_penalty
    return record


def _pairs(biases: dict[int, float]) -> npt.NDArray[np.void]:
    return np.array(list(biases.items()), BIAS)
