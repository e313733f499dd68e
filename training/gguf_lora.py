"""An adapter as a GGUF LoRA file, which llama.cpp puts over the base's GGUF file (`--lora`).

The layout is that of llama.cpp's convert_lora_to_gguf.py: `blk.0.attn_q.weight.lora_a` [rank, in]
and `.lora_b` [out, rank], fp32, and one alpha for all: llama.cpp scales by alpha / rank.
"""

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFType, GGUFWriter, Keys, LlamaFileType

from training.folder_lock import scratch
from training.gguf_export import BLOCK_NAMES, Array, interleave_halves
from training.merge_adapter import Lora, MergeAdapter

_CPU = torch.device("cpu")


def export_adapter(adapter: MergeAdapter, base: Path, out: Path) -> None:
    """Write the adapter over the base in `base` to the GGUF file `out`, whole or not at all.

    Where linears differ in scaling or rank, what alpha / rank does not say is in `lora_b`. Raises
    ValueError for DoRA, which llama.cpp does not run, and where `out` exists.
    """
    if out.exists():
        raise ValueError(f"the output {out} exists; name a new file")
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    for name in adapter.module_names:
        if _lora(adapter, name).magnitude is not None:
            raise ValueError(f"{name} is trained with DoRA, which llama.cpp does not run; merge it")
    out.parent.mkdir(parents=True, exist_ok=True)
    with scratch(out.parent / f".{out.name}-exporting") as work:
        made = work / "made.gguf"
        _write(adapter, config, made)
        _compare(adapter, config, made)
        made.rename(out)


def _write(adapter: MergeAdapter, config: dict[str, Any], made: Path) -> None:
    alpha = _alpha(adapter)
    writer = GGUFWriter(made, "llama")
    try:
        writer.add_type(GGUFType.ADAPTER)
        writer.add_string(Keys.Adapter.TYPE, "lora")
        writer.add_float32(Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_file_type(LlamaFileType.ALL_F32)
        writer.add_quantization_version(2)
        for name, values in _tensors(adapter, config, alpha):
            writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _alpha(adapter: MergeAdapter) -> float:
    """The alpha that most linears have; in the file it is an fp32."""
    loras = (_lora(adapter, name) for name in adapter.module_names)
    counts = Counter(lora.scaling * lora.rank for lora in loras)
    return float(np.float32(counts.most_common(1)[0][0]))


def _tensors(
    adapter: MergeAdapter, config: dict[str, Any], alpha: float
) -> Iterator[tuple[str, Array]]:
    num_heads = config["num_attention_heads"]
    heads = {"q_proj": num_heads, "k_proj": config.get("num_key_value_heads") or num_heads}
    for module in adapter.module_names:  # model.layers.0.mlp.up_proj
        lora = _lora(adapter, module)
        _, _, layer, linear = module.split(".", 3)
        name = f"blk.{layer}.{BLOCK_NAMES[linear]}.weight"
        lora_b: Array = lora.lora_b.numpy()
        factor = lora.scaling * lora.rank / alpha
        if abs(factor - 1) > 1e-6:  # else it is what alpha itself lost to fp32
            lora_b = lora_b * np.float32(factor)
        leaf = linear.rpartition(".")[2]
        if leaf in heads:
            lora_b = interleave_halves(lora_b, heads[leaf])
        yield f"{name}.lora_a", np.ascontiguousarray(lora.lora_a.numpy())
        yield f"{name}.lora_b", np.ascontiguousarray(lora_b)


def _compare(adapter: MergeAdapter, config: dict[str, Any], file: Path) -> None:
    """Read the file again: every tensor must be what was to be written."""
    reader = GGUFReader(file)
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    for name, values in _tensors(adapter, config, _alpha(adapter)):
        if not np.array_equal(found.pop(name), values):
            raise ValueError(f"{file}: {name} is not the adapter's")
    assert not found, f"tensors that nobody wrote: {sorted(found)}"


def _lora(adapter: MergeAdapter, module: str) -> Lora:
    lora = adapter.lora(module, _CPU)
    assert lora is not None, f"{module} is the adapter's own"
    return lora
