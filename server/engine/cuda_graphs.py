"""Steps captured once and replayed, one graph for each shape that a step is padded to."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from server.engine.scheduler import Plan
from server.model.gpu_step import StepShape, padded_rows

_DECODE_TOKENS = (1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128)
_MIXED_TOKENS = (16, 32, 64, 128, 192, 256)


@dataclass(frozen=True, slots=True)
class CapturedStep:
    """A graph, and where it leaves logits [num_logits, vocab] and tokens [num_logits]."""

    graph: torch.cuda.CUDAGraph
    logits: torch.Tensor
    tokens: torch.Tensor


class CudaGraphs:
    """Graphs of decode steps and of short ones with prompt chunks, with LoRA and without."""

    def __init__(self, max_running: int, max_tokens: int, *, with_lora: bool = True) -> None:
        """`with_lora` off: for weights that no adapter is over."""
        smaller = (size for size in _DECODE_TOKENS if size < max_running)
        self._decode_tokens = (*smaller, max_running)
        self._mixed_tokens = tuple(size for size in _MIXED_TOKENS if size <= max_tokens)
        self._families = (True, False) if with_lora else (False,)
        self._captured: dict[StepShape, CapturedStep] = {}

    def shape_of(self, plan: Plan, num_logits: int, *, with_lora: bool) -> StepShape:
        """The shape to pad a step to: that of a graph if there is one, else its own."""
        num_tokens = sum(part.num_tokens for part in plan.parts)
        with_chunks = bool(plan.chunks)
        sizes = self._mixed_tokens if with_chunks else self._decode_tokens
        padded = next((size for size in sizes if size >= num_tokens), None)
        if padded is not None:
            shape = _captured_shape(padded, with_lora=with_lora, with_chunks=with_chunks)
            if num_logits <= shape.num_logits:
                return shape
        rows = padded_rows(num_logits)
        return StepShape(num_tokens, rows, with_lora, bool(plan.decodes), with_chunks)

    def find(self, shape: StepShape) -> CapturedStep | None:
        """The graph of a shape."""
        return self._captured.get(shape)

    def captures(
        self,
        prepare: Callable[[StepShape], None],
        run: Callable[[StepShape], tuple[torch.Tensor, torch.Tensor]],
    ) -> Iterator[float]:
        """Run every shape once, so that all is compiled, and capture it; yields the part done."""
        shapes = list(self._shapes())
        pool = torch.cuda.graph_pool_handle()
        for index, shape in enumerate(shapes):
            prepare(shape)
            run(shape)
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                logits, tokens = run(shape)
            self._captured[shape] = CapturedStep(graph, logits, tokens)
            yield (index + 1) / len(shapes)

    def _shapes(self) -> Iterator[StepShape]:
        """Largest first: the smaller ones then fit in the memory that it took."""
        for with_chunks, sizes in ((True, self._mixed_tokens), (False, self._decode_tokens)):
            for size in reversed(sizes):
                for with_lora in self._families:
                    yield _captured_shape(size, with_lora=with_lora, with_chunks=with_chunks)


def _captured_shape(num_tokens: int, *, with_lora: bool, with_chunks: bool) -> StepShape:
    """A graph may be replayed with decode rows or without."""
    num_logits = padded_rows(1) if with_chunks else padded_rows(num_tokens)
    return StepShape(num_tokens, num_logits, with_lora, True, with_chunks)
