"""Logits to token ids, each row by its own request's parameters."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from server.engine.request import Request
from server.engine.sampler_reference import ReferenceSampler
from server.engine.sampler_rows import SamplerRows, has_penalty
from server.kernels.sampling_step import SamplerGpuStep

if importlib.util.find_spec("triton"):  # it comes with torch's builds for a GPU
    from server.kernels.sampling_gpu import SamplerGpuState, sample_gpu

_BIASES_PER_ROW = 1280  # on average: 1024 in logit_bias, and what min_tokens bans


@dataclass(frozen=True, slots=True)
class SampledLogprobs:
    """For each row: the chosen token's logprob and the most likely tokens', most likely first.

    chosen         [num_rows] fp32
    top_logprobs   [num_rows, num_top] fp32
    top_ids        [num_rows, num_top] int64
    """

    chosen: torch.Tensor
    top_logprobs: torch.Tensor
    top_ids: torch.Tensor


class Sampler:
    """Chooses tokens, and keeps on the device what the next choice needs.

    A step is prepared on the host, then launched. On a GPU the launch is one kernel that finds all
    it needs at fixed addresses: captured in a CUDA graph, it serves whatever is prepared before the
    replay. Elsewhere it is the reference, in plain PyTorch.

    last_tokens    [max_running] int64           each state row's newest token
    output_counts  [max_running, vocab] int32    how often a row generated a token (penalties only)
    is_prompt      [max_running, vocab] bool     which tokens its prompt holds (penalties only)
    """

    def __init__(
        self,
        vocab_size: int,
        max_running: int,
        eos_token_ids: tuple[int, ...],
        device: torch.device,
        *,
        max_rows: int | None = None,  # of a launch, padding included; None: max_running
        is_fused: bool | None = None,  # one kernel, not the reference; None: on a GPU
    ) -> None:
        self.last_tokens = torch.zeros(max_running, dtype=torch.int64, device=device)
        self._device = device
        self._requests: list[Request] = []  # of the step that is prepared
        self._admitted: dict[int, tuple[Request, float]] = {}  # state row -> whose it is
        shape = (max_running, vocab_size)
        self._output_counts = torch.zeros(shape, dtype=torch.int32, device=device)
        self._is_prompt = torch.zeros(shape, dtype=torch.bool, device=device)
        self._rows = SamplerRows(max_running, vocab_size, eos_token_ids)
        self._reference = ReferenceSampler(
            self.last_tokens, self._output_counts, self._is_prompt, eos_token_ids
        )
        self._fused: _Fused | None = None
        if is_fused or (is_fused is None and device.type == "cuda"):
            self._fused = _Fused(
                self.last_tokens, self._output_counts, self._is_prompt, max_rows or max_running
            )

    def sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> torch.Tensor:
        """Choose one token for each row: logits [num_rows, vocab] -> [num_rows] int64."""
        self.prepare(requests, logits.shape[0])
        return self.launch(logits)

    def prepare(self, requests: Sequence[Request], num_rows: int | None = None) -> None:
        """Describe the next launch: a row for each request, then padding up to `num_rows`.

        Its work on the device is queued on the current stream; nothing waits. It may come while the
        step before is under way, but a step's tokens must be there before the third one after it is
        prepared.
        """
        self._requests = list(requests)
        for request in self._requests:
            admission = (request, request.admitted_time)
            if self._admitted.get(request.state_row) != admission:
                self._admitted[request.state_row] = admission
                self._admit(request)
        if self._fused is not None:
            num_rows = len(self._requests) if num_rows is None else num_rows
            self._rows.fill(self._fused.step, self._requests, num_rows)

    def launch(self, logits: torch.Tensor) -> torch.Tensor:
        """Choose a token for each prepared row: logits [num_rows, vocab] -> [num_rows] int64.

        On a GPU this can be captured, and the tokens stay where they are until the next launch.
        Those of padding rows mean nothing.
        """
        if self._fused is not None:
            return self._fused.launch(logits)
        tokens = torch.zeros(logits.shape[0], dtype=torch.int64, device=self._device)
        num_requests = len(self._requests)
        tokens[:num_requests] = self._reference.sample(logits[:num_requests], self._requests)
        return tokens

    def _admit(self, request: Request) -> None:
        """Take note of a request that has just been given its state row."""
        self._rows.admit(request)
        if not has_penalty(request.sampling):
            return
        row = request.state_row
        prompt = self._int64(request.prompt_ids)
        output = self._int64(request.output_ids)
        ones = torch.ones(len(output), dtype=torch.int32, device=self._device)
        self._is_prompt[row].zero_().index_fill_(0, prompt, 1)
        self._output_counts[row].zero_().index_add_(0, output, ones)

    def _int64(self, values: list[int]) -> torch.Tensor:
        """On the device, without waiting for it: that takes pinned memory."""
        on_host = torch.tensor(values, dtype=torch.int64, pin_memory=self._device.type == "cuda")
        return on_host.to(self._device, non_blocking=True)


class _Fused:
    """The kernel's side of a sampler: its buffers, none of which ever moves."""

    def __init__(
        self,
        last_tokens: torch.Tensor,
        output_counts: torch.Tensor,
        is_prompt: torch.Tensor,
        max_rows: int,
    ) -> None:
        vocab_size, device = output_counts.shape[1], last_tokens.device
        weights = torch.empty(max_rows, -(-vocab_size // 16) * 16, device=device)
        self._state = SamplerGpuState(last_tokens, output_counts, is_prompt, weights)
        self._tokens = torch.zeros(max_rows, dtype=torch.int64, device=device)
        biases_per_row = min(_BIASES_PER_ROW, vocab_size)
        self.step = SamplerGpuStep(
            max_rows=max_rows, max_biases=max_rows * biases_per_row, device=device
        )

    def launch(self, logits: torch.Tensor) -> torch.Tensor:
        tokens = self._tokens[: logits.shape[0]]
        sample_gpu(logits.contiguous(), self.step, self._state, tokens)
        return tokens


def token_logprobs(logits: torch.Tensor, tokens: torch.Tensor, num_top: int) -> SampledLogprobs:
    """Logprobs of the model itself, before temperature, penalties and bias.

    logits  [num_rows, vocab]
    tokens  [num_rows] int64
    """
    logprobs = logits.float().log_softmax(dim=-1)
    chosen = logprobs.gather(1, tokens[:, None]).squeeze(1)
    top = logprobs.topk(num_top, dim=-1)
    return SampledLogprobs(chosen, top.values, top.indices)
