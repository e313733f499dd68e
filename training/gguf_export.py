"""A merged model as one GGUF file for llama.cpp, F16 or Q8_0, then read again and compared.

Tensors are converted and written one at a time. llama.cpp's own name for Mistral is `llama`.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
from gguf.quants import dequantize, quant_shape_to_byte_shape, quantize
from rich.console import Console
from rich.progress import track

from training.folder_lock import scratch
from training.gguf_vocab import add_vocab
from training.merge_checkpoint import Checkpoint, is_buffer

Kind = Literal["f16", "q8_0"]
Array = np.ndarray[Any, Any]

_FILE_TYPES = {"f16": LlamaFileType.MOSTLY_F16, "q8_0": LlamaFileType.MOSTLY_Q8_0}
_QUANT_TYPES = {"f16": GGMLQuantizationType.F16, "q8_0": GGMLQuantizationType.Q8_0}
_Q8_BLOCK = 32  # weights that share one scale
_TOP_NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
BLOCK_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def export(folder: Path, out: Path, kind: str, console: Console) -> None:
    """Write the checkpoint in `folder` to the GGUF file `out`, whole or not at all.

    Raises ValueError for what llama.cpp would run differently, and where `out` exists.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"--kind is {kind!r}; it must be {' or '.join(get_args(Kind))}")
    if out.exists():
        raise ValueError(f"the output {out} exists; name a new file")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    checkpoint = Checkpoint(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        with scratch(out.parent / f".{out.name}-exporting") as work:
            made = work / "made.gguf"
            _write(checkpoint, config, made, kind, console)
            compare(checkpoint, config, made)
            made.rename(out)
    finally:
        checkpoint.close()


def compare(checkpoint: Checkpoint, config: dict[str, Any], file: Path) -> None:
    """Hold every tensor of a GGUF file against the checkpoint's; ValueError names one that differs.

    F32 and F16 must be the rounded values themselves; Q8_0 may be half a step of its grid away.
    """
    found = {tensor.name: tensor for tensor in GGUFReader(file).tensors}
    wanted = dict(_names(checkpoint, config))
    if found.keys() != set(wanted.values()):
        raise ValueError(f"{file} holds other tensors: {sorted(found.keys() ^ wanted.values())}")
    for source, name in wanted.items():
        exact, tensor = _values(checkpoint, config, source), found[name]
        values = dequantize(tensor.data, tensor.tensor_type)
        allowed: Array | float = 0.0
        if tensor.tensor_type == GGMLQuantizationType.F16:
            exact = exact.astype(np.float16).astype(np.float32)
        elif tensor.tensor_type == GGMLQuantizationType.Q8_0:
            blocks = np.abs(exact).reshape(len(exact), -1, _Q8_BLOCK).max(axis=2)
            # half a step, and what the step's own rounding to fp16 moves the largest weight
            allowed = np.repeat(blocks * (0.51 / 127 + 2**-11), _Q8_BLOCK, axis=1) + 2**-18
        if values.shape != exact.shape or not (np.abs(values - exact) <= allowed).all():
            raise ValueError(f"{file}: {name} is not the checkpoint's {source}")


def _write(
    checkpoint: Checkpoint, config: dict[str, Any], made: Path, kind: str, console: Console
) -> None:
    names = list(_names(checkpoint, config))
    writer = GGUFWriter(made, "llama")
    try:
        writer.add_type("model")
        writer.add_name(checkpoint.folder.resolve().name)
        writer.add_file_type(_FILE_TYPES[kind])
        writer.add_quantization_version(2)
        _add_shape(writer, checkpoint.folder, config)
        add_vocab(writer, checkpoint.folder, config["vocab_size"])
        types = {name: _type(checkpoint, source, kind) for source, name in names}
        for source, name in names:
            shape = quant_shape_to_byte_shape(checkpoint.info(source).shape, types[name])
            num_bytes = int(np.prod(shape))
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), num_bytes, types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        bar = track(names, "Writing GGUF", console=console, transient=True, disable=console.quiet)
        for source, name in bar:
            writer.write_tensor_data(
                _converted(_values(checkpoint, config, source), types[name], source)
            )
    finally:
        writer.close()


def _add_shape(writer: GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_kind = rope.get("rope_type", rope.get("type", "default"))
    if rope_kind != "default":
        raise ValueError(f"{folder}: RoPE scaling {rope_kind!r} is not exported")
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or config["hidden_size"] // num_heads
    # llama.cpp's `llama` knows no sliding window: within this many tokens there is none
    context = config["max_position_embeddings"]
    writer.add_context_length(min(context, config.get("sliding_window") or context))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(num_heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or num_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])


def _names(checkpoint: Checkpoint, config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(checkpoint's name, GGUF's name) of each tensor; a head that is tied is left out."""
    for source in checkpoint:
        if source == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        if is_buffer(source):
            continue
        parts = source.removesuffix(".weight").split(".", 3)
        if source in _TOP_NAMES:
            yield source, _TOP_NAMES[source]
        elif source.endswith(".weight") and len(parts) == 4 and parts[3] in BLOCK_NAMES:
            yield source, f"blk.{parts[2]}.{BLOCK_NAMES[parts[3]]}.weight"
        else:
            raise ValueError(f"{checkpoint.folder}: {source} has no name in GGUF's llama")


def _type(checkpoint: Checkpoint, source: str, kind: str) -> GGMLQuantizationType:
    shape = checkpoint.info(source).shape
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    if kind == "q8_0" and shape[1] % _Q8_BLOCK:
        raise ValueError(f"Q8_0 needs rows of a multiple of {_Q8_BLOCK}; {source} has {shape[1]}")
    return _QUANT_TYPES[kind]


def _values(checkpoint: Checkpoint, config: dict[str, Any], source: str) -> Array:
    """A tensor in fp32 and in llama.cpp's order of rows."""
    values: Array = checkpoint.tensor(source).to(torch.float32).numpy()
    num_heads = config["num_attention_heads"]
    if source.endswith("q_proj.weight"):
        return interleave_halves(values, num_heads)
    if source.endswith("k_proj.weight"):
        return interleave_halves(values, config.get("num_key_value_heads") or num_heads)
    return values


def interleave_halves(weight: Array, num_heads: int) -> Array:
    """Order the rows of each head as llama.cpp's rotary embedding pairs them: neighbours.

    transformers pairs row i of a head's first half with row i of its second half.
    """
    out, width = weight.shape
    halves = weight.reshape(num_heads, 2, out // num_heads // 2, width)
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(out, width)


def _converted(values: Array, kind: GGMLQuantizationType, source: str) -> Array:
    with np.errstate(over="ignore"):
        converted: Array = quantize(values, kind)
    if kind == GGMLQuantizationType.F16 and not np.isfinite(converted).all():
        raise ValueError(f"{source} overflows F16; export it as q8_0")
    return converted
