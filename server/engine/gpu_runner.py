"""Runs a plan on a GPU: copy what the step is about, replay its graph, never wait."""

from collections.abc import Iterator

import torch

from server.engine.batch import num_logits
from server.engine.cuda_graphs import CapturedStep, CudaGraphs
from server.engine.gpu_batch import fill_step, has_lora
from server.engine.model_runner import ModelRunner, PromptLogprobs, RunnerParts
from server.engine.request import Request
from server.engine.scheduler import Plan
from server.model.gpu_decoder import GpuDecoder
from server.model.gpu_step import GpuStep, StepShape


class GpuRunner(ModelRunner):
    """Owns the device, and the static buffers and graphs that steps run through."""

    def __init__(
        self, decoder: GpuDecoder, parts: RunnerParts, step: GpuStep, graphs: CudaGraphs
    ) -> None:
        self._decoder = decoder
        self._parts = parts
        self._step = step
        self._graphs = graphs
        self._last: CapturedStep | None = None

    def replay_ms(self, times: int = 50) -> float:
        """What the last captured step takes on the GPU, in milliseconds; for measurements only."""
        assert self._last is not None, "no step was captured"
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(times):
            self._last.graph.replay()
        end.record()
        end.synchronize()
        milliseconds: float = start.elapsed_time(end) / times
        return milliseconds

    @torch.inference_mode()
    def captures(self) -> Iterator[float]:
        """Compile what a step needs and capture its graph, shape by shape."""
        nothing = Plan((), ())

        def prepare(shape: StepShape) -> None:
            self._fill(nothing, shape)
            self._parts.sampler.prepare([], shape.num_logits)

        yield from self._graphs.captures(prepare, self._forward)

    def _run(
        self, plan: Plan, sampling: list[Request]
    ) -> tuple[torch.Tensor, torch.Tensor, PromptLogprobs]:
        num_rows = sum(num_logits(part) for part in plan.parts)
        shape = self._graphs.shape_of(plan, num_rows, with_lora=has_lora(plan))
        self._fill(plan, shape)
        if num_rows > len(sampling):  # a prompt's own tokens have logits too
            logits = self._logits(shape)
            prompt_logprobs = self._prompt_logprobs(plan, logits)
            logits = logits[self._sampled_rows(plan)]
            return logits, self._parts.sampler.sample(logits, sampling), prompt_logprobs
        self._parts.sampler.prepare(sampling, shape.num_logits)
        captured = self._graphs.find(shape)
        if captured is None:
            logits, tokens = self._forward(shape)
        else:
            self._last = captured
            captured.graph.replay()
            logits, tokens = captured.logits, captured.tokens
        return logits[: len(sampling)], tokens[: len(sampling)], []

    def _fill(self, plan: Plan, shape: StepShape) -> None:
        fill_step(self._step, plan, shape, self._parts.adapters, self._parts.block_size)

    def _logits(self, shape: StepShape) -> torch.Tensor:
        return self._decoder.forward(
            self._step,
            shape,
            self._parts.sampler.last_tokens,
            self._parts.kv,
            self._parts.bank,
        )

    def _forward(self, shape: StepShape) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self._logits(shape)
        return logits, self._parts.sampler.launch(logits)
