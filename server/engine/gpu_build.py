"""The GPU's runner: its static buffers, and graphs of every shape of step."""

from server.config import SchedulerConfig
from server.engine.cuda_graphs import CudaGraphs
from server.engine.gpu_runner import GpuRunner
from server.engine.model_runner import RunnerParts
from server.kernels.lora_step import PAGE_ROWS
from server.model.gpu_decoder import GpuDecoder
from server.model.gpu_step import GpuStep, padded_rows
from server.model.loader import OnProgress


def gpu_runner(
    decoder: GpuDecoder,
    parts: RunnerParts,
    scheduling: SchedulerConfig,
    max_model_len: int,
    max_rank: int,
    on_progress: OnProgress,
) -> GpuRunner:
    """Make it, compile what its steps need, and capture the graphs."""
    max_running = scheduling.max_running
    step = GpuStep(
        decoder.spec,
        max_tokens=max(
            scheduling.max_step_tokens, scheduling.max_prefill_tokens, padded_rows(max_running)
        ),
        max_requests=max_running,
        max_blocks=-(-max_model_len // parts.block_size),
        max_pages=-(-(max_rank + 1) // PAGE_ROWS),  # DoRA's gain takes a row too
        block_size=parts.block_size,
        device=decoder.device,
    )
    runner = GpuRunner(decoder, parts, step, CudaGraphs(max_running, step.max_tokens))
    runner.capture(lambda fraction: on_progress("capturing CUDA graphs", fraction))
    return runner
