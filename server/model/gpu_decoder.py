"""The decoder on a GPU: the same blocks as decoder.py, their small ops inside the linears.

A layer of a short step is 9 launches, with LoRA or without: one makes a linear's split-K sums and
shrinks x for LoRA, and one finishes the sums, adds LoRA and does what comes next, be it rotary
embedding and KV write, residual and the norm's first half, or the activation. Longer steps
dequantize each matrix and use cuBLAS.
"""

from dataclasses import dataclass

import torch

from server.kernels.fused import silu_mul
from server.kernels.fused_gpu import embed_gpu, rms_norm_gpu, rotate_and_write_gpu
from server.kernels.lora_gpu import (
    InputNorm,
    expand,
    expand_silu,
    finish,
    finish_norm,
    finish_rotary,
    shrink,
)
from server.kernels.lora_step import LoraGpuStep
from server.kernels.nf4_linear import (
    dequantize,
    is_fused,
    partial_sums,
    partial_sums_and_shrink,
    split_of,
)
from server.kernels.nf4_pack import PackedWeight, SplitK
from server.kernels.paged_attention_gpu import paged_attention_gpu
from server.model.adapter_bank import AdapterBank
from server.model.gpu_step import GpuStep, StepShape
from server.model.kv_cache import KVCache
from server.model.linear import PackedLinear
from server.model.rotary import RotaryTables
from server.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class GpuLayer:
    """One block's weights; `linears` by fused group."""

    input_norm: torch.Tensor
    post_attention_norm: torch.Tensor
    linears: dict[str, PackedLinear]


class GpuDecoder:
    """A Mistral-family decoder over 4-bit weights, a paged KV cache and an adapter bank."""

    def __init__(
        self,
        spec: ModelSpec,
        embedding: torch.Tensor,  # [vocab, hidden] bf16
        layers: list[GpuLayer],
        final_norm: torch.Tensor,
        lm_head: torch.Tensor,  # [vocab, hidden] bf16
        rotary: RotaryTables,
        scratch: torch.Tensor | None = None,  # another decoder's of the same shape, to share
    ) -> None:
        self.spec = spec
        self.layers = layers
        self.embedding = embedding
        self.rotary = rotary
        self.final_norm = final_norm
        self.lm_head = lm_head
        shapes = [linear.weight.shape for linear in layers[0].linears.values()]
        numbers = max(out_features * in_features for out_features, in_features in shapes)
        if scratch is None:
            scratch = torch.empty(numbers, dtype=self.dtype, device=self.device)
        assert scratch.numel() >= numbers, "any one matrix fits"
        self.scratch = scratch

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of activations, and of keys and values."""
        return self.embedding.dtype

    def linear(self, layer: int, group: str) -> PackedLinear:
        """One of the fused linears."""
        return self.layers[layer].linears[group]

    def forward(
        self,
        step: GpuStep,
        shape: StepShape,
        last_tokens: torch.Tensor,  # [max_running] int64: newest token of each state row
        kv: KVCache,
        bank: AdapterBank,
    ) -> torch.Tensor:
        """Run the step that the buffers hold: returns logits [num_logits, vocab]."""
        sources = step.sources[: shape.num_tokens]
        known = step.token_ids[: shape.num_tokens]
        token_ids = torch.where(sources >= 0, last_tokens[sources.clamp_min(0)], known)
        forward = _Forward(self, step, shape, kv, bank)
        is_short = is_fused(shape.num_tokens, self.device)
        x = forward.short(token_ids) if is_short else forward.long(token_ids)
        x = x.index_select(0, step.logits_rows[: shape.num_logits])
        return rms_norm_gpu(x, self.final_norm, self.spec.rms_norm_eps) @ self.lm_head.T


# A linear whose split-K sums are still apart, and all that finishes it:
# sums, split, LoRA's h, B, widths of the stacked outputs, the step's adapters.
_Unfinished = tuple[
    torch.Tensor,
    SplitK,
    torch.Tensor | None,
    torch.Tensor | None,
    tuple[int, ...],
    LoraGpuStep | None,
]


class _Forward:
    """One step through the blocks."""

    def __init__(
        self,
        decoder: GpuDecoder,
        step: GpuStep,
        shape: StepShape,
        kv: KVCache,
        bank: AdapterBank,
    ) -> None:
        self._decoder, self._layers = decoder, decoder.layers
        self._shape, self._kv, self._bank = shape, kv, bank
        self._attention = step.attention
        self._lora = step.lora if shape.with_lora else None
        self._rotary_step = step.rotary(decoder.rotary.rows)
        self._eps, self._hidden = decoder.spec.rms_norm_eps, decoder.spec.hidden_size

    def short(self, token_ids: torch.Tensor) -> torch.Tensor:
        """[num_tokens] -> the last block's output [num_tokens, hidden]; few tokens."""
        first = self._layers[0]
        x, scaled, squares = embed_gpu(token_ids, self._decoder.embedding, first.input_norm)
        for index, layer in enumerate(self._layers):
            linears = layer.linears
            is_last = index + 1 == len(self._layers)
            following = first if is_last else self._layers[index + 1]
            q = finish_rotary(
                *self._start(index, "qkv", scaled, linears["o"].weight),
                rotary_step=self._rotary_step,
                k_cache=self._kv.k[index],
                v_cache=self._kv.v[index],
                input_norm=InputNorm(squares, self._hidden, self._eps),
            )
            x, scaled, squares = finish_norm(
                *self._start(index, "o", self._attend(index, q), linears["gate_up"].weight),
                norm_weight=layer.post_attention_norm,
                residual=x,
            )
            activated = finish(
                *self._start(index, "gate_up", scaled, linears["down"].weight),
                input_norm=InputNorm(squares, self._hidden, self._eps),
                with_silu=True,
            )
            down = self._start(index, "down", activated, following.linears["qkv"].weight)
            if is_last:
                x = finish(*down, residual=x)
            else:
                x, scaled, squares = finish_norm(
                    *down, norm_weight=following.input_norm, residual=x
                )
        return x

    def long(self, token_ids: torch.Tensor) -> torch.Tensor:
        """The same for many tokens: each matrix is dequantized once."""
        x = self._decoder.embedding[token_ids]
        for index, layer in enumerate(self._layers):
            scaled = rms_norm_gpu(x, layer.input_norm, self._eps)
            q = rotate_and_write_gpu(
                self._linear(index, "qkv", scaled),
                self._rotary_step.rotary,
                self._rotary_step.positions,
                self._rotary_step.tables,
                self._kv.k[index],
                self._kv.v[index],
                self._rotary_step.slot_mapping,
            )
            x = self._linear(index, "o", self._attend(index, q), residual=x)
            scaled = rms_norm_gpu(x, layer.post_attention_norm, self._eps)
            x = self._linear(index, "down", self._gate_up(index, scaled), residual=x)
        return x

    def _attend(self, index: int, q: torch.Tensor) -> torch.Tensor:
        heads = paged_attention_gpu(
            q,
            self._kv.k[index],
            self._kv.v[index],
            self._attention,
            self._decoder.spec.sliding_window,
            with_decodes=self._shape.with_decodes,
            with_chunks=self._shape.with_chunks,
        )
        return heads.flatten(1)

    def _start(
        self, index: int, group: str, x: torch.Tensor, next_weight: PackedWeight
    ) -> _Unfinished:
        linear = self._layers[index].linears[group]
        split = split_of(linear.weight)
        if self._lora is None:
            sums = partial_sums(x, linear.weight, next_weight)
            return sums, split, None, None, linear.out_splits, None
        lora_a, lora_b = self._lora_a(index, group), self._bank.lora_b[index, group]
        sums, h = partial_sums_and_shrink(x, linear.weight, lora_a, self._lora, next_weight)
        return sums, split, h, lora_b, linear.out_splits, self._lora

    def _lora_a(self, index: int, group: str) -> torch.Tensor:
        """[num_bank_rows, sublinears, in], as the kernels read it."""
        return self._bank.lora_a[index, group].transpose(0, 1)

    def _linear(
        self, index: int, group: str, x: torch.Tensor, residual: torch.Tensor | None = None
    ) -> torch.Tensor:
        weight = self._dequantized(index, group)
        if self._lora is None:
            return x @ weight.T if residual is None else residual.addmm_(x, weight.T)
        y = x @ weight.T
        out_splits = self._layers[index].linears[group].out_splits
        h = shrink(x, self._lora_a(index, group), self._lora)
        lora_b = self._bank.lora_b[index, group]
        expand(y, h, lora_b, out_splits, self._lora, residual=residual)
        return y

    def _gate_up(self, index: int, x: torch.Tensor) -> torch.Tensor:
        y = x @ self._dequantized(index, "gate_up").T
        if self._lora is None:
            return silu_mul(y)
        h = shrink(x, self._lora_a(index, "gate_up"), self._lora)
        return expand_silu(y, h, self._bank.lora_b[index, "gate_up"], self._lora)

    def _dequantized(self, index: int, group: str) -> torch.Tensor:
        """One matrix in bf16, in a buffer that the next one takes over."""
        weight = self._layers[index].linears[group].weight
        out_features, in_features = weight.shape
        scratch = self._decoder.scratch[: out_features * in_features]
        return dequantize(weight, scratch.view(out_features, in_features))
