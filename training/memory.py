"""How much memory a run will take, line by line, before it takes any."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from training.config import TrainConfig
from training.fast.head import CHUNK_TOKENS as FAST_CHUNK_TOKENS
from training.fast.linears import WIDTH_STEP
from training.fast.model import Options
from training.loss import CHUNK_TOKENS
from training.qlora import Linears, trained_ranks

MIB = 1 << 20
_RUN_TIME_BYTES = 600 * MIB  # python, torch and its libraries
_STATE_BYTES = {"adamw": 8, "paged_adamw": 8, "paged_adamw_8bit": 2}  # a trained number
_NF4_BYTES = 4.127 / 8  # a weight, with its share of the doubly quantized absmax
_LIBRARY_BYTES = 150 * MIB  # cuBLAS, cuDNN, and what the allocator rounds up: measured

Lines = list[tuple[str, int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What of a run decides its memory, beside the config."""

    num_trainable: int
    num_tokens: int  # of the largest pass
    is_packed: bool  # 4 bits in memory; else NF4's values, as elements
    element_bytes: int
    checkpointing: bool
    options: Options | None  # of the fast step; None: the reference


def estimate(config: TrainConfig, model: Any, linears: Linears, setting: Setting) -> Lines:
    """What, and bytes; `model` is the base's configuration."""
    num_weights = sum(out * in_ for out, in_ in linears.values())
    weight_bytes = num_weights * (_NF4_BYTES if setting.is_packed else setting.element_bytes)
    num_embeddings = model.vocab_size * model.hidden_size
    num_rest = num_embeddings * (1 if model.tie_word_embeddings else 2)
    count = setting.num_trainable
    parts = [
        (f"{num_weights:,} weights of linears", int(weight_bytes)),
        (f"{num_rest:,} of embeddings and head", num_rest * setting.element_bytes),
        ("adapter, fp32", count * 4),
        ("its gradients", count * 4),
        (f"{config.optimizer}'s state", count * _STATE_BYTES[config.optimizer]),
    ]
    if setting.options is None:
        parts += _reference(model, linears, setting)
    else:
        ranks = trained_ranks(config, linears)
        parts += _fast(model, linears, ranks, setting, setting.options)
    return [*parts, ("run time", _RUN_TIME_BYTES)]


def _reference(model: Any, linears: Linears, setting: Setting) -> Lines:
    """What passes through PyTorch's modules hold."""
    layer = setting.num_tokens * (
        (2 * model.hidden_size + 3 * model.intermediate_size) * setting.element_bytes
        + 4 * model.hidden_size * 4  # what LoRA casts to fp32
    )
    kept = setting.num_tokens * model.hidden_size * setting.element_bytes
    if setting.checkpointing:
        activations = model.num_hidden_layers * kept + layer
    else:
        activations = model.num_hidden_layers * (layer + 6 * kept)
    parts = [
        (f"activations of {setting.num_tokens:,} tokens", activations),
        ("logits of a chunk and their gradient", 2 * CHUNK_TOKENS * model.vocab_size * 4),
    ]
    if setting.is_packed:
        largest = max(out * in_ for out, in_ in linears.values())
        parts.append(("one dequantized matrix", largest * setting.element_bytes))
    return parts


def _fast(
    model: Any,
    linears: Linears,
    ranks: Mapping[str, int],
    setting: Setting,
    options: Options,
) -> Lines:
    """What `fast.layer` holds: two matrices, what is kept, and the widest moment of a layer.

    That moment is the gated MLP's backward pass (gate and up, h, and four of hidden size), or the
    head's, while the last layers' tensors are still on the device.
    """
    hidden, inner, size = model.hidden_size, model.intermediate_size, setting.element_bytes
    shapes = {name.rpartition(".")[2]: shape for name, shape in linears.items()}
    q, k = shapes["q_proj"][0], shapes["k_proj"][0]

    def width(*leaves: str) -> int:
        most = (
            max((r for name, r in ranks.items() if name.endswith(leaf)), default=0)
            for leaf in leaves
        )
        return -(-sum(most) // WIDTH_STEP) * WIDTH_STEP

    wide, other = width("gate_proj", "up_proj"), width("down_proj")
    matrices = (2 * inner + wide) * (hidden + wide) + (hidden + other) * (inner + other)
    kept = {"attended": q, "middle": hidden, "qkv": q + 2 * k, "gate_up": 2 * inner + wide}
    a_layer = hidden + sum(kept[name] for name in options.keep)
    num_layers = 1 if options.on_host else model.num_hidden_layers  # see `fast.keeper`
    moment = setting.num_tokens * (2 * inner + wide + inner + other + 4 * hidden) * size
    chunk = min(FAST_CHUNK_TOKENS, setting.num_tokens) * model.vocab_size
    head = chunk * (size + 3 * 4) + setting.num_tokens * 2 * hidden * size
    if options.on_host:
        head += setting.num_tokens * a_layer * size
    return [
        ("two dequantized matrices", matrices * size),
        (
            f"kept for the backward pass, {setting.num_tokens:,} tokens",
            setting.num_tokens * a_layer * num_layers * size,
        ),
        ("a layer's own, or the logits of a chunk", max(moment, head)),
        ("workspaces of libraries", _LIBRARY_BYTES),
    ]
