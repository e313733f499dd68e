"""The GPU's runner of one weight set: its static buffers, and graphs of every shape of step."""

import torch

from server.config import SchedulerConfig
from server.engine.cuda_graphs import CudaGraphs
from server.engine.gpu_runner import GpuRunner
from server.engine.model_runner import RunnerParts
from server.kernels import lora_launch, nf4_linear
from server.kernels.nf4_pack import INT4, NF4
from server.kernels.nvrtc import shared_memory_limit
from server.model.gpu_decoder import GpuDecoder
from server.model.gpu_step import GpuStep, padded_rows


def compile_kernels(device: torch.device, group_size: int | None) -> None:
    """Fill the cache of compiled kernels, in any thread.

    group_size  of GPTQ's codes; None: the weights are put on the NF4 grid
    """
    nf4_linear.compile_ahead(device, NF4 if group_size is None else INT4[group_size])
    lora_launch.compile_ahead(device)


def gpu_runner(
    decoder: GpuDecoder,
    parts: RunnerParts,
    scheduling: SchedulerConfig,
    max_model_len: int,
    max_rank: int,
    *,
    with_lora: bool,
) -> GpuRunner:
    """Make it; its graphs are still to be captured. ValueError for ranks that the GPU cannot."""
    max_running, device = scheduling.max_running, decoder.device
    shared_limit = shared_memory_limit(device) if with_lora and device.type == "cuda" else None
    step = GpuStep(
        decoder.spec,
        max_tokens=padded_rows(  # each token of a prompt may want logits
            max(scheduling.max_step_tokens, scheduling.max_prefill_tokens, max_running)
        ),
        max_requests=max_running,
        max_blocks=-(-max_model_len // parts.block_size),
        max_pages=lora_launch.pages_of_rank(max_rank, shared_limit),
        block_size=parts.block_size,
        device=device,
    )
    graphs = CudaGraphs(max_running, step.max_tokens, with_lora=with_lora)
    return GpuRunner(decoder, parts, step, graphs)
