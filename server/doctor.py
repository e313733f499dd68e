"""`turnout doctor`: what this machine is, which kernels would run, and what fits into its memory.

Reads the base's config.json and loads no weights.
"""

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil  # type: ignore[import-untyped]  # it ships no types
import torch
from rich.console import Console
from rich.table import Table

from server.config import Config
from server.engine.build import active_kernels, has_gpu_kernels, select_device, select_dtype
from server.kernels.dense_linear import can_pack
from server.model.adapter_bank import bank_row_bytes
from server.model.kv_cache import block_bytes
from server.model.loader import check_quantization
from server.model.spec import FUSED, ModelSpec, read_spec
from server.versions import version_of

NF4_BITS = 4.127  # a weight, its block's absmax (8 bits per 64) and that one's (32 per 256 * 64)
USUAL_RANK = 16
CPU_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
PACKAGES = ("torch", "transformers", "bitsandbytes", "triton")


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a base and its adapters take on one device, in bytes."""

    weights: int
    weights_note: str
    bank_row: int  # one rank row of the adapter bank
    kv_token: int  # K and V of one token


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """How the memory of that device would be spent, in bytes."""

    free: int
    weights: int
    bank: int
    kv: int

    @property
    def total(self) -> int:
        """All of it together."""
        return self.weights + self.bank + self.kv

    @property
    def fits(self) -> bool:
        """Whether it all goes in."""
        return self.kv > 0 and self.total <= self.free


def needs(
    spec: ModelSpec,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    group_size: int = 128,
) -> Needs:
    """Work out sizes from a base's shape; `group_size` is a GPTQ checkpoint's."""
    is_cpu = device.type == "cpu"
    shapes = [spec.linear_shape(name) for names in FUSED.values() for name in names]
    num_linear = spec.num_layers * sum(out * width for out, width in shapes)
    num_embedding = spec.vocab_size * spec.hidden_size
    has_own_head = not spec.tie_word_embeddings or can_pack(dtype, device)  # packing copies it
    num_other = num_embedding * (1 + has_own_head) + (2 * spec.num_layers + 1) * spec.hidden_size
    name = str(dtype).removeprefix("torch.")
    bits, note = 8.0 * dtype.itemsize, name
    if quantization == "nf4" and is_cpu:
        note = f"NF4 values, expanded to {name} at load"
    elif quantization == "nf4":
        bits, note = NF4_BITS, f"NF4; embeddings and norms {name}"
    elif quantization == "gptq" and is_cpu:
        note = f"int4 values, expanded to {name} at load"
    elif quantization == "gptq":
        bits, note = 4 + 32 / group_size, f"int4, groups of {group_size}; the rest {name}"
    return Needs(
        weights=int(num_linear * bits / 8) + num_other * dtype.itemsize,
        weights_note=note,
        bank_row=bank_row_bytes(spec, torch.float32 if is_cpu else dtype),
        kv_token=block_bytes(spec, 1, dtype),
    )


def budget(need: Needs, config: Config, *, free: int, is_gpu: bool) -> Budget:
    """Spend `free` bytes as the engine would: weights, adapter bank, then KV."""
    bank = need.bank_row * config.adapters.bank_rows
    if config.cache.num_blocks:
        kv = config.cache.num_blocks * config.cache.block_size * need.kv_token
    elif is_gpu:
        kv = max(0, int((free - need.weights - bank) * config.cache.memory_fraction))
    else:
        kv = config.cache.cpu_bytes
    return Budget(free=free, weights=need.weights, bank=bank, kv=kv)


def machine_rows() -> list[tuple[str, str]]:
    """Versions, CPU, memory and GPUs."""
    threads = f"{psutil.cpu_count()} CPUs"
    memory = psutil.virtual_memory()
    rows = [
        ("Python", platform.python_version()),
        *((name, version_of(name)) for name in PACKAGES),
        ("CPU", f"{threads}, {', '.join(sorted(cpu_flags())) or 'no vector flags known'}"),
        ("memory", f"{size_text(memory.total)}, {size_text(memory.available)} free"),
    ]
    rows += [(f"GPU {index}", gpu_text(index)) for index in range(torch.cuda.device_count())]
    return rows if torch.cuda.is_available() else [*rows, ("GPU", "none that torch can use")]


def cpu_flags(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Which of CPU_FLAGS this machine has."""
    if not cpuinfo.exists():
        return set()
    lines = cpuinfo.read_text(encoding="utf-8").splitlines()
    flags = next((line for line in lines if line.startswith("flags")), "")
    return set(flags.split()) & set(CPU_FLAGS)


def gpu_text(index: int) -> str:
    """Name, capability and memory of one GPU."""
    free, total = torch.cuda.mem_get_info(index)
    major, minor = torch.cuda.get_device_capability(index)
    name = torch.cuda.get_device_name(index)
    return f"{name}, sm_{major}{minor}, {size_text(total)}, {size_text(free)} free"


def memory_rows(need: Needs, spent: Budget, config: Config) -> list[tuple[str, str, str]]:
    """What each part takes, and what that amounts to."""
    usual = need.bank_row * USUAL_RANK
    num_adapters = config.adapters.bank_rows // USUAL_RANK
    return [
        ("base", size_text(spent.weights), need.weights_note),
        (
            "adapter bank",
            size_text(spent.bank),
            f"{num_adapters} adapters of rank {USUAL_RANK}, {size_text(usual)} each",
        ),
        (
            "KV cache",
            size_text(spent.kv),
            f"{spent.kv // need.kv_token:,} tokens, {size_text(need.kv_token)} each",
        ),
        (
            "together",
            size_text(spent.total),
            f"of {size_text(spent.free)} free: {'fits' if spent.fits else 'does not fit'}",
        ),
    ]


def report(config: Config, console: Console) -> bool:
    """Print what this machine can run; return whether `config` fits into it."""
    spec = read_spec(config.model.path)
    device = select_device(config.model.device)
    dtype = select_dtype(config.model.dtype, device)
    is_gpu = device.type == "cuda"
    free = torch.cuda.mem_get_info(device)[0] if is_gpu else psutil.virtual_memory().available
    is_fused = has_gpu_kernels(config, spec, dtype, device)
    quantization = config.model.quantization
    gptq = check_quantization(config.model.path, quantization)
    kernels = active_kernels(dtype, device, is_fused=is_fused, quantization=quantization)
    need = needs(spec, quantization, dtype, device, gptq.group_size if gptq else 128)
    spent = budget(need, config, free=free, is_gpu=is_gpu)
    console.print(_table("This machine", machine_rows()))
    console.print(_table(f"Kernels on {device}", list(kernels.items())))
    console.print(_table(f"Memory for {config.model.name}", memory_rows(need, spent, config)))
    return spent.fits


def size_text(num_bytes: int) -> str:
    """Bytes for people: 1.5 GiB."""
    if num_bytes < 1 << 10:
        return f"{num_bytes} B"
    power = min(3, (num_bytes.bit_length() - 1) // 10)
    return f"{num_bytes / 1024**power:.1f} {('KiB', 'MiB', 'GiB')[power - 1]}"


def _table(title: str, rows: Sequence[tuple[str, ...]]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    for index in range(len(rows[0])):
        table.add_column(style="bold" if index == 0 else None, overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table
