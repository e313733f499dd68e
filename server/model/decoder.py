"""The resident base: embeddings, blocks, head; each linear with its token's own LoRA."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from server.kernels.dense_linear import DenseWeight, dense_linear
from server.kernels.fused import cos_and_sin, rms_norm, rotate_and_write, silu_mul
from server.kernels.lora import LoraStep, add_lora
from server.kernels.paged_attention import AttentionStep, paged_attention
from server.model.adapter_bank import AdapterBank
from server.model.kv_cache import KVCache
from server.model.linear import Linear
from server.model.rotary import RotaryTables
from server.model.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class ModelInput:
    """One step's tokens, of all its requests, end to end.

    token_ids, positions, slot_mapping  [num_tokens] int64
    tables                              likewise: which rotary table; None: the base's for all
    logits_rows                         [num_logits] int64: tokens whose next token is wanted
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    tables: torch.Tensor | None
    slot_mapping: torch.Tensor
    attention: AttentionStep
    lora: LoraStep | None
    logits_rows: torch.Tensor


@dataclass(frozen=True, slots=True)
class Layer:
    """One block's weights; `linears` by fused group."""

    input_norm: torch.Tensor
    post_attention_norm: torch.Tensor
    linears: dict[str, Linear]


class Decoder:
    """A Mistral-family decoder over a paged KV cache and an adapter bank."""

    def __init__(
        self,
        spec: ModelSpec,
        embedding: torch.Tensor,  # [vocab, hidden]
        layers: list[Layer],
        final_norm: torch.Tensor,
        lm_head: DenseWeight,  # [vocab, hidden]
        rotary: RotaryTables,
    ) -> None:
        self.spec = spec
        self.layers = layers
        self.embedding = embedding
        self.final_norm = final_norm
        self.lm_head = lm_head
        self.rotary = rotary

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.embedding.device

    @property
    def dtype(self) -> torch.dtype:
        """Of weights, and of keys and values."""
        return self.embedding.dtype

    def linear(self, layer: int, group: str) -> Linear:
        """One of the fused linears."""
        return self.layers[layer].linears[group]

    def forward(self, step: ModelInput, kv: KVCache, bank: AdapterBank) -> torch.Tensor:
        """Run one step, writing its keys and values: returns logits [num_logits, vocab]."""
        eps, window = self.spec.rms_norm_eps, self.spec.sliding_window
        x = F.embedding(step.token_ids, self.embedding).to(self.final_norm.dtype)
        cos, sin = cos_and_sin(self.rotary.look_up(step.positions, step.tables), x.dtype)
        for index, layer in enumerate(self.layers):
            h = rms_norm(x, layer.input_norm, eps)
            qkv = self._linear(index, "qkv", h, step.lora, bank)
            k_cache, v_cache = kv.k[index], kv.v[index]
            q = rotate_and_write(qkv, cos, sin, k_cache, v_cache, step.slot_mapping)
            heads = paged_attention(q, k_cache, v_cache, step.attention, window)
            x = x + self._linear(index, "o", heads.flatten(1), step.lora, bank)
            h = rms_norm(x, layer.post_attention_norm, eps)
            activated = silu_mul(self._linear(index, "gate_up", h, step.lora, bank))
            x = x + self._linear(index, "down", activated, step.lora, bank)
        if step.logits_rows.numel() == 0:  # prompt chunks only, none of them the last
            return x.new_empty(0, self.spec.vocab_size)
        x = rms_norm(x[step.logits_rows], self.final_norm, eps)
        return dense_linear(x.to(self.dtype), self.lm_head)

    def _linear(
        self, index: int, group: str, x: torch.Tensor, lora: LoraStep | None, bank: AdapterBank
    ) -> torch.Tensor:
        y = self.layers[index].linears[group](x)
        if lora is not None:
            key = (index, group)
            add_lora(y, x, bank.rows(key, lora.rows), bank.lora_b[key], lora)
        return y
