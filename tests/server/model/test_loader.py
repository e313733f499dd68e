"""Checkpoints that are not what their config.json says, and files that change after the load."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.model.decoder import Decoder
from server.model.gpu_decoder import GpuDecoder
from server.model.gpu_loader import load_gpu_decoder
from server.model.loader import Checkpoint, load_decoder
from server.model.rotary import RotaryTables
from server.model.spec import read_spec
from tests.random_mistral import random_mistral

CPU = torch.device("cpu")
Load = Callable[[Path], Decoder | GpuDecoder]


def load_on_cpu(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    spec = read_spec(folder)
    rotary = RotaryTables(spec.head_dim, spec.rope_theta, 64, 1, CPU)
    return load_decoder(Checkpoint(folder), spec, "none", dtype, CPU, rotary, lambda *_: None)


def load_as_on_a_gpu(folder: Path) -> GpuDecoder:
    spec = read_spec(folder)
    rotary = RotaryTables(spec.head_dim, spec.rope_theta, 64, 1, CPU)
    return load_gpu_decoder(Checkpoint(folder), spec, "nf4", CPU, rotary, lambda *_: None)


@pytest.fixture
def folder(tiny_base: Path, tmp_path: Path) -> Path:
    copied: Path = shutil.copytree(tiny_base, tmp_path / "base")
    return copied


@pytest.mark.parametrize("load", [load_on_cpu, load_as_on_a_gpu])
@pytest.mark.parametrize(
    ("said", "named"),
    [
        ({"vocab_size": 300}, r"model\.embed_tokens is \[256, 64\]; .* makes it \[300, 64\]"),
        ({"head_dim": 8}, r"layers\.0\.self_attn\.q_proj is \[64, 64\]; .* makes it \[32, 64\]"),
        ({"num_key_value_heads": 4}, r"layers\.0\.self_attn\.k_proj is \[32, 64\]"),
        ({"intermediate_size": 64}, r"layers\.0\.mlp\.gate_proj is \[128, 64\]"),
    ],
)
def test_a_weight_that_config_json_gives_another_shape_is_named(
    said: dict[str, Any], named: str, load: Load, folder: Path
) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | said))
    with pytest.raises(ValueError, match=named):
        load(folder)


@pytest.mark.parametrize("load", [load_on_cpu, load_as_on_a_gpu])
@pytest.mark.parametrize("name", ["model.norm", "model.layers.1.input_layernorm", "lm_head"])
def test_a_norm_or_head_of_another_shape_is_named(name: str, load: Load, folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[f"{name}.weight"] = tensors[f"{name}.weight"][:7].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"base: {name} is \[7.*\]; its config.json makes it"):
        load(folder)


@pytest.mark.parametrize("load", [load_on_cpu, load_as_on_a_gpu])
def test_a_head_that_is_neither_there_nor_said_to_be_tied_is_missed(
    load: Load, folder: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"tensor lm_head\.weight is missing"):
        load(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    base = load(folder)
    head = base.lm_head if isinstance(base, GpuDecoder) else base.lm_head.weight
    assert torch.equal(head, base.embedding)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_bytes_whose_scales_are_unknown_are_not_taken_for_weights(
    dtype: torch.dtype, folder: Path
) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=rf"up_proj is {dtype}; 16 or 32 bits are read"):
        load_on_cpu(folder)


@pytest.mark.parametrize("num_bytes", [0, 100, -1])
def test_a_file_that_was_cut_short_is_named(num_bytes: int, folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:num_bytes])
    with pytest.raises(ValueError, match=r"base/model\.safetensors is damaged, or was not copied"):
        Checkpoint(folder)


def test_a_shard_without_what_the_index_says_of_it_is_named(folder: Path) -> None:
    names = [*load_file(folder / "model.safetensors"), "another"]
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    checkpoint = Checkpoint(folder)
    assert checkpoint.tensor("model.norm.weight").shape == (64,)
    with pytest.raises(ValueError, match=r"base/model\.safetensors is damaged.*another"):
        checkpoint.tensor("another")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_that_is_written_over_changes_no_model_that_was_read_from_it(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    folder = random_mistral(tmp_path / "base", dtype=dtype, has_random_norms=True)
    base = load_on_cpu(folder, dtype)
    weights = [base.embedding, base.final_norm, base.lm_head.weight, base.layers[0].input_norm]
    weights += [layer.linears["down"].weight.weight for layer in base.layers]
    weights = [weight for weight in weights if not weight.is_mkldnn]
    before = [weight.clone() for weight in weights]
    with (folder / "model.safetensors").open("r+b") as file:
        file.write(bytes((folder / "model.safetensors").stat().st_size))
    assert all(torch.equal(own, now) for own, now in zip(before, weights, strict=True))
