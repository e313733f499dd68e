"""Puts an engine together from the operator's choices and what the machine has."""

import hashlib
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from server.base_digest import base_digest
from server.config import Config, SchedulerConfig
from server.engine.adapter_cache import AdapterCache, HostAdapter, rows_of_pages
from server.engine.adapter_loader import AdapterLoader, ResidentBase
from server.engine.block_manager import BlockManager
from server.engine.engine import Engine
from server.engine.messages import EngineInfo
from server.engine.model_runner import ModelRunner, RunnerParts
from server.engine.sampler import Sampler
from server.engine.scheduler import Scheduler
from server.engine.threads import use_one_thread
from server.engine.weight_sets import WeightSets
from server.kernels.dense_linear import can_pack
from server.kernels.lora_step import PAGE_ROWS
from server.model.adapter_bank import AdapterBank, PackedAdapter
from server.model.decoder import Decoder
from server.model.gpu_step import padded_rows, step_bytes
from server.model.kv_cache import KVCache, block_bytes
from server.model.linear import activation_dtype
from server.model.loader import Checkpoint, OnProgress, load_decoder, load_weight_set
from server.model.rotary import RotaryTables
from server.model.spec import ModelSpec, read_spec

if TYPE_CHECKING:
    from collections.abc import Callable

    from server.model.gpu_decoder import GpuDecoder

HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON:  # it comes with torch's builds for a GPU
    from server.engine.gpu_build import compile_kernels, gpu_runner
    from server.model.gpu_loader import load_gpu_decoder, load_gpu_weight_set


def build_engine(config: Config, on_progress: OnProgress) -> tuple[Engine, EngineInfo]:
    """Load the base and set up everything around it. ValueError says what cannot be had."""
    spec = read_spec(config.model.path)
    device = select_device(config.model.device)
    dtype = select_dtype(config.model.dtype, device)
    is_fused = has_gpu_kernels(config, spec, dtype, device)
    scheduling = _scheduling(config, device)
    checkpoint = Checkpoint(config.model.path)
    beside = ThreadPoolExecutor(max_workers=2)  # the loading: each takes seconds too
    hashed = beside.submit(_digest, config.model.path, config.model.quantization)
    max_positions = config.model.max_model_len or spec.max_positions
    num_scaled = config.adapters.rotary_tables
    rotary = RotaryTables(spec.head_dim, spec.rope_theta, max_positions, num_scaled, device)
    decoder: Decoder | GpuDecoder
    if is_fused:
        compiled = beside.submit(compile_kernels, device, checkpoint.group_size)
        decoder = load_gpu_decoder(
            checkpoint, spec, config.model.quantization, device, rotary, on_progress
        )
        compiled.result()
    else:
        decoder = load_decoder(
            checkpoint, spec, config.model.quantization, dtype, device, rotary, on_progress
        )
    digest = hashed.result()
    beside.shutdown()
    bank_dtype = activation_dtype(dtype, device)
    bank = AdapterBank(spec, config.adapters.bank_rows, bank_dtype, device)
    block_size = config.cache.block_size
    activations = step_bytes(spec, scheduling.max_prefill_tokens) if is_fused else 0
    num_blocks = _num_blocks(config, spec, dtype, device, activations)
    max_scaled_len = min(max_positions, num_blocks * block_size)
    blocks = BlockManager(num_blocks, block_size)
    adapters = _adapter_cache(config, decoder, bank, bank_dtype, rotary)
    scheduler = Scheduler(
        scheduling, blocks, adapters, digest, prefix_caching=config.cache.prefix_caching
    )
    sampler = Sampler(
        spec.vocab_size,
        scheduling.max_running,
        spec.eos_token_ids,
        device,
        max_rows=padded_rows(scheduling.max_running),
    )
    kv = KVCache(spec, num_blocks, block_size, dtype, device)
    parts = RunnerParts(kv, bank, sampler, adapters, block_size)

    def runner(decoder: "Decoder | GpuDecoder", *, with_lora: bool) -> ModelRunner:
        if isinstance(decoder, Decoder):
            return ModelRunner(decoder, parts)
        max_rank = config.adapters.max_rank
        return gpu_runner(decoder, parts, scheduling, max_scaled_len, max_rank, with_lora=with_lora)

    base = runner(decoder, with_lora=True)
    for fraction in base.captures():
        on_progress("capturing CUDA graphs", fraction)
    merged = weight_set_reader(decoder)
    weight_sets = WeightSets(
        base,
        lambda folder: runner(merged(folder), with_lora=False),
        _max_set_bytes(config, device),
    )
    overlap = scheduling.overlap
    if overlap is None:
        overlap = device.type == "cuda"
    engine = Engine(scheduler, weight_sets, blocks, adapters, spec.eos_token_ids, overlap=overlap)
    info = EngineInfo(
        base_digest=digest,
        device=str(device),
        dtype=str(dtype).removeprefix("torch."),
        quantization=config.model.quantization,
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=min(max_scaled_len, spec.max_positions),
        trained_len=spec.max_positions,
        max_scaled_len=max_scaled_len,
        bank_rows=config.adapters.bank_rows,
        page_rows=config.adapters.page_rows,
        vocab_size=spec.vocab_size,
        eos_token_ids=list(spec.eos_token_ids),
        kernels=active_kernels(
            dtype, device, is_fused=is_fused, quantization=config.model.quantization
        ),
    )
    return engine, info


def has_gpu_kernels(
    config: Config, spec: ModelSpec, dtype: torch.dtype, device: torch.device
) -> bool:
    """Whether steps run through the GPU's own kernels: 4 bits in bf16, from Ampere on."""
    return (
        device.type == "cuda"
        and HAS_TRITON
        and config.model.quantization in ("nf4", "gptq")
        and dtype == torch.bfloat16
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and spec.head_dim in (64, 128)
        and config.adapters.page_rows == PAGE_ROWS
    )


def weight_set_reader(base: "Decoder | GpuDecoder") -> "Callable[[Path], Decoder | GpuDecoder]":
    """What reads a GPTQ checkpoint of the base's shape, in any thread, beside a running base."""
    if isinstance(base, Decoder):
        decoder = base
        return lambda folder: load_weight_set(Checkpoint(folder), read_spec(folder), decoder)
    gpu_decoder = base

    def read(folder: Path) -> "GpuDecoder":
        is_cuda = gpu_decoder.device.type == "cuda"
        stream = torch.cuda.Stream(gpu_decoder.device) if is_cuda else None
        checkpoint = Checkpoint(folder)
        compile_kernels(gpu_decoder.device, checkpoint.group_size)
        with torch.cuda.stream(stream):  # beside the steps
            return load_gpu_weight_set(checkpoint, read_spec(folder), gpu_decoder)

    return read


def _max_set_bytes(config: Config, device: torch.device) -> int | None:
    """What merged models may take: on a GPU what is set aside for them, on a CPU anything."""
    set_aside = config.promotion.memory_bytes
    return set_aside if set_aside or device.type == "cuda" else None


def _scheduling(config: Config, device: torch.device) -> SchedulerConfig:
    """The operator's choices, the rest as suits the device."""
    chosen = config.scheduler
    # On a GPU: what keeps streams waiting no more than 15 ms for a prompt, and what fills cuBLAS.
    step_tokens, prefill_tokens = (256, 8192) if device.type == "cuda" else (512, 512)
    return replace(
        chosen,
        max_step_tokens=chosen.max_step_tokens or max(step_tokens, chosen.max_running),
        max_prefill_tokens=chosen.max_prefill_tokens
        or chosen.max_step_tokens
        or max(prefill_tokens, chosen.max_running),
    )


def _adapter_cache(
    config: Config,
    base: ResidentBase,
    bank: AdapterBank,
    dtype: torch.dtype,
    rotary: RotaryTables,
) -> AdapterCache:
    page_rows = config.adapters.page_rows
    objects = config.adapters.store / "objects"
    loader = AdapterLoader(objects, base, dtype, config.adapters.max_rank)

    def write(pages: list[int], adapter: HostAdapter) -> None:
        assert isinstance(adapter, PackedAdapter), "what the loader reads"
        bank.write(rows_of_pages(pages, page_rows), adapter)

    return AdapterCache(
        num_pages=config.adapters.bank_rows // page_rows,
        page_rows=page_rows,
        max_host_bytes=config.adapters.host_bytes,
        read=loader.read,
        write=write,
        executor=ThreadPoolExecutor(
            max_workers=1, thread_name_prefix="adapter-loader", initializer=use_one_thread
        ),
        num_tables=config.adapters.rotary_tables,
        write_table=rotary.write,
    )


def select_device(name: str) -> torch.device:
    """The device asked for; ValueError where this machine has none such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"model.device is {name!r}, but torch finds no GPU on this machine")
    return device


def select_dtype(name: str, device: torch.device) -> torch.dtype:
    """bf16 where the machine multiplies it, unless the operator says otherwise."""
    if name != "auto":
        found: torch.dtype = getattr(torch, name)
        return found
    if device.type == "cuda" or can_pack(torch.bfloat16, device):
        return torch.bfloat16
    return torch.float32


def _digest(folder: Path, quantization: str) -> str:
    """What the base's answers depend on: config, weights and the grid they are put on."""
    return hashlib.sha256(f"{base_digest(folder)} {quantization}".encode()).hexdigest()


def _num_blocks(
    config: Config, spec: ModelSpec, dtype: torch.dtype, device: torch.device, activations: int
) -> int:
    """As many KV blocks as the operator asked for, or as memory holds beside activations."""
    if config.cache.num_blocks:
        return config.cache.num_blocks
    per_block = block_bytes(spec, config.cache.block_size, dtype)
    if device.type == "cpu":
        num_bytes = config.cache.cpu_bytes
    else:
        free, _ = torch.cuda.mem_get_info(device)
        free -= activations + config.promotion.memory_bytes
        num_bytes = int(free * config.cache.memory_fraction)
    if num_bytes < per_block:
        raise ValueError(
            f"{num_bytes} bytes of KV cache do not hold one block of {per_block} bytes"
        )
    return num_bytes // per_block


def active_kernels(
    dtype: torch.dtype, device: torch.device, *, is_fused: bool, quantization: str = "nf4"
) -> dict[str, str]:
    """Which implementation runs each op."""
    if is_fused:
        return {
            "linear": "int4 (GPTQ), CUDA" if quantization == "gptq" else "NF4, CUDA",
            "lora": "CUDA, true rank",
            "attention": "paged, Triton",
            "sampler": "Triton",
        }
    linear = "oneDNN packed bf16" if can_pack(dtype, device) else "torch"
    return {
        "linear": linear,
        "lora": "torch (fp32)" if device.type == "cpu" else "torch",
        "attention": "torch sdpa over gathered blocks",
        "sampler": "torch" if device.type == "cpu" else "Triton",
    }
