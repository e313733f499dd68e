"""The GPU path without a GPU: its decoder, buffers and runner over plain PyTorch kernels.

Everything but the kernels is the real thing. What they would read on the device, these read from
the last `fill`; each kernel has tests of its own against the same reference.
"""

from typing import Any

import pytest
import torch

from server.engine import build
from server.kernels import fused
from server.kernels.attention_step import AttentionGpuStep
from server.kernels.lora_gpu import InputNorm, add_lora_reference
from server.kernels.lora_step import LoraGpuStep
from server.kernels.nf4_pack import PackedWeight, dequantize_reference
from server.kernels.paged_attention import AttentionStep, DecodeRows, PrefillChunk, paged_attention
from server.model import gpu_decoder, gpu_loader

LONGEST_SHORT_STEP = 16  # tokens; longer ones take the other path


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make `build_engine` set up the GPU's runner on a CPU, in fp32, without graphs."""
    for name in ("embed_gpu", "finish", "finish_norm", "finish_rotary", "partial_sums"):
        monkeypatch.setattr(gpu_decoder, name, globals()[name])
    for name in (
        "partial_sums_and_shrink",
        "shrink",
        "expand",
        "expand_silu",
        "rotate_and_write_gpu",
        "paged_attention_gpu",
    ):
        monkeypatch.setattr(gpu_decoder, name, globals()[name])
    monkeypatch.setattr(gpu_decoder, "rms_norm_gpu", fused.rms_norm)
    monkeypatch.setattr(gpu_decoder, "split_of", lambda weight: None)
    monkeypatch.setattr(gpu_decoder, "is_fused", lambda count, device: count <= LONGEST_SHORT_STEP)
    monkeypatch.setattr(gpu_decoder, "dequantize", dequantize)
    monkeypatch.setattr(gpu_loader, "DTYPE", torch.float32)
    monkeypatch.setattr(AttentionGpuStep, "fill", remember(AttentionGpuStep.fill))
    monkeypatch.setattr(LoraGpuStep, "fill", remember(LoraGpuStep.fill))
    monkeypatch.setattr(build, "has_gpu_kernels", lambda *_: True)
    monkeypatch.setattr("server.engine.build.compile_kernels", lambda *_: None)
    monkeypatch.setattr("server.engine.cuda_graphs.CudaGraphs.captures", lambda *_: iter(()))


_filled: dict[int, tuple[Any, ...]] = {}  # id of a step's part -> what it was last filled with


def remember(fill: Any) -> Any:
    def remembering(self: Any, *args: Any) -> None:
        fill(self, *args)
        _filled[id(self)] = args

    return remembering


def dequantize(weight: PackedWeight, out: torch.Tensor) -> torch.Tensor:
    return out.copy_(dequantize_reference(weight))


def embed_gpu(token_ids: torch.Tensor, embedding: torch.Tensor, weight: torch.Tensor) -> Any:
    x = embedding[token_ids.long()]
    return x, x * weight, x.square().sum(dim=1, keepdim=True)


def partial_sums(x: torch.Tensor, weight: PackedWeight, following: PackedWeight) -> Any:
    assert following.in_features > 0
    return (x @ dequantize_reference(weight).T)[None]


def partial_sums_and_shrink(
    x: torch.Tensor,
    weight: PackedWeight,
    a_bank: torch.Tensor,
    step: LoraGpuStep,
    following: PackedWeight,
) -> Any:
    return partial_sums(x, weight, following), shrink(x, a_bank, step)


def shrink(x: torch.Tensor, a_bank: torch.Tensor, step: LoraGpuStep) -> Any:
    return x, a_bank  # what `with_lora` needs


def with_lora(
    y: torch.Tensor, h: Any, b_bank: Any, out_splits: tuple[int, ...], step: LoraGpuStep | None
) -> torch.Tensor:
    if step is None:
        assert h is None
        assert b_bank is None
        return y
    x, a_bank = h
    adapter_of_token, pages, gain_rows = _filled[id(step)]
    assert len(adapter_of_token) == y.shape[0], "each token has an adapter or none, padding too"
    return add_lora_reference(y, x, a_bank, b_bank, out_splits, adapter_of_token, pages, gain_rows)


def finish(
    workspace: torch.Tensor,
    split: None,
    h: Any,
    b_bank: Any,
    out_splits: tuple[int, ...],
    step: LoraGpuStep | None,
    *,
    input_norm: InputNorm | None = None,
    residual: torch.Tensor | None = None,
    with_silu: bool = False,
) -> torch.Tensor:
    y = with_lora(workspace.sum(dim=0), h, b_bank, out_splits, step)
    if input_norm is not None:
        mean_square = input_norm.squares.sum(dim=1, keepdim=True) / input_norm.hidden
        y = y * torch.rsqrt(mean_square + input_norm.eps)
    if residual is not None:
        y = y + residual
    return fused.silu_mul(y) if with_silu else y


def finish_norm(*args: Any, norm_weight: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
    y = finish(*args, residual=residual)
    return y, y * norm_weight, y.square().sum(dim=1, keepdim=True)


def finish_rotary(
    *args: Any, rotary_step: Any, k_cache: torch.Tensor, v_cache: torch.Tensor, input_norm: Any
) -> torch.Tensor:
    qkv = finish(*args, input_norm=input_norm)
    where = (rotary_step.positions, rotary_step.tables)
    return rotate_and_write_gpu(
        qkv, rotary_step.rotary, *where, k_cache, v_cache, rotary_step.slot_mapping
    )


def rotate_and_write_gpu(
    qkv: torch.Tensor,
    rotary: torch.Tensor,
    positions: torch.Tensor,
    tables: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
) -> torch.Tensor:
    num_tokens = qkv.shape[0]
    slots = slot_mapping[:num_tokens].long()
    rows = rotary[tables[:num_tokens].long(), positions[:num_tokens].long()]
    cos = torch.cat((rows[:, :1], rows[:, :1]), dim=-1)
    sin = torch.cat((-rows[:, 1:], rows[:, 1:]), dim=-1)
    real = slots >= 0
    head_dim = k_cache.shape[3]
    q = torch.zeros(num_tokens, qkv.shape[1] // head_dim - 2 * k_cache.shape[2], head_dim)
    q[real] = fused.rotate_and_write(qkv[real], cos[real], sin[real], k_cache, v_cache, slots[real])
    return q


def paged_attention_gpu(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    step: AttentionGpuStep,
    window: int | None,
    *,
    with_decodes: bool,
    with_chunks: bool,
) -> torch.Tensor:
    lengths, tables, chunks = _filled[id(step)]
    assert with_decodes or not lengths
    assert with_chunks or not chunks
    decode = None
    if lengths:
        width = max(map(len, tables))
        padded = [table + [0] * (width - len(table)) for table in tables]
        decode = DecodeRows(torch.tensor(padded), torch.tensor(lengths))
    parts = tuple(
        PrefillChunk(first, count, context, torch.tensor(table))
        for first, count, context, table in chunks
    )
    num_tokens = len(lengths) + sum(chunk[1] for chunk in chunks)
    out = torch.zeros_like(q)
    if num_tokens:
        out[:num_tokens] = paged_attention(
            q[:num_tokens], k_cache, v_cache, AttentionStep(decode, parts), window
        )
    return out


def expand(
    y: torch.Tensor,
    h: Any,
    b_bank: torch.Tensor,
    out_splits: tuple[int, ...],
    step: LoraGpuStep,
    *,
    residual: torch.Tensor | None = None,
) -> None:
    y.copy_(finish(y[None], None, h, b_bank, out_splits, step, residual=residual))


def expand_silu(
    gate_up: torch.Tensor, h: Any, b_bank: torch.Tensor, step: LoraGpuStep
) -> torch.Tensor:
    half = gate_up.shape[1] // 2
    return fused.silu_mul(with_lora(gate_up, h, b_bank, (half, half), step))
