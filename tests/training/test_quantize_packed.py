"""Packed files are read as the numbers that they stand for, and held against the model."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.training.packing_by_hand import (
    awq_tensors,
    gptq_tensors,
    quantize_folder,
    round_to_grid,
)
from training.quantize_check import check_result
from training.quantize_packed import PackedCheckpoint

LINEAR = "model.layers.1.self_attn.q_proj"


def write(folder: Path, tensors: dict[str, torch.Tensor], **settings: object) -> Path:
    folder.mkdir(exist_ok=True)
    config = {"bits": 4, "quant_method": "gptq", **settings}
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture
def weight() -> torch.Tensor:
    return torch.randn(40, 192, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_either_layout_gives_back_what_was_packed(
    method: str, group_size: int, weight: torch.Tensor, tmp_path: Path
) -> None:
    parts = {"gptq": gptq_tensors, "awq": awq_tensors}[method](weight, group_size)
    folder = write(
        tmp_path / "q", {f"a.{part}": tensor for part, tensor in parts.items()}, quant_method=method
    )
    codes, zeros, scales = round_to_grid(weight, group_size)
    expected = (codes.view(-1, group_size, 40) - zeros[:, None]) * scales[:, None]
    found = PackedCheckpoint(folder).weight("a")
    assert torch.equal(found, expected.reshape(192, 40).T)
    assert (found - weight).abs().max() < 0.3


def test_inputs_in_another_order_are_read_by_their_groups(
    weight: torch.Tensor, tmp_path: Path
) -> None:
    order = torch.randperm(192, generator=torch.Generator().manual_seed(1))
    parts = gptq_tensors(weight[:, order], 64)
    plain = PackedCheckpoint(
        write(tmp_path / "q", {f"a.{part}": tensor for part, tensor in parts.items()})
    ).weight("a")
    codes = torch.empty_like(round_to_grid(weight[:, order], 64)[0])
    codes[order] = round_to_grid(weight[:, order], 64)[0]
    from_order = parts["g_idx"][torch.argsort(order)]
    packed = gptq_tensors(weight, 64) | {"g_idx": from_order}
    eights = codes.T.reshape(40, -1, 8).long() << torch.arange(0, 32, 4)
    words = eights.sum(dim=-1)
    packed |= {
        "qweight": torch.where(words >= 2**31, words - 2**32, words).int().T.contiguous(),
        "qzeros": parts["qzeros"],
        "scales": parts["scales"],
    }
    folder = write(tmp_path / "r", {f"a.{part}": tensor for part, tensor in packed.items()})
    assert torch.equal(PackedCheckpoint(folder).weight("a")[:, order], plain)


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"bits": 8}, "no 4-bit"),
        ({"quant_method": "bitsandbytes"}, "no 4-bit"),
        ({"checkpoint_format": "gptq_v2"}, "gptq_v2"),
    ],
)
def test_other_layouts_are_refused(
    settings: dict[str, object], complaint: str, weight: torch.Tensor, tmp_path: Path
) -> None:
    folder = write(tmp_path / "q", {"a.weight": weight}, **settings)
    with pytest.raises(ValueError, match=complaint):
        PackedCheckpoint(folder)


def test_shards_are_found_by_their_index(weight: torch.Tensor, tmp_path: Path) -> None:
    folder = write(tmp_path / "q", {"a": weight})
    (folder / "model.safetensors").rename(folder / "part-1.safetensors")
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        PackedCheckpoint(folder)
    index = {"weight_map": {"a": "part-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    packed = PackedCheckpoint(folder)
    assert torch.equal(packed.tensor("a"), weight)
    assert "b" not in packed
    with pytest.raises(ValueError, match="tensor b is missing"):
        packed.tensor("b")


@pytest.fixture
def quantized(tiny_base: Path, tmp_path: Path) -> Path:
    quantize_folder(tiny_base, tmp_path / "quantized", 32)
    return tmp_path / "quantized"


def change(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(name, None)
    save_file(weights | ({} if tensor is None else {name: tensor}), folder / "model.safetensors")


def test_the_check_measures_how_far_the_weights_are(tiny_base: Path, quantized: Path) -> None:
    found = check_result(tiny_base, quantized, 32)
    weight = load_file(tiny_base / "model.safetensors")[f"{found['worst']}.weight"]
    error = PackedCheckpoint(quantized).weight(found["worst"]) - weight
    assert found["max"] == pytest.approx(float(error.norm() / weight.norm()), rel=0.01)
    assert 0.01 < found["mean"] <= found["max"] < 0.2


def test_codes_in_a_wrong_order_do_not_pass(tiny_base: Path, quantized: Path) -> None:
    codes = load_file(quantized / "model.safetensors")[f"{LINEAR}.qweight"]
    change(quantized, f"{LINEAR}.qweight", codes.flip(1))
    with pytest.raises(ValueError, match=rf"{LINEAR} is 1\.\d\d of its norm away"):
        check_result(tiny_base, quantized, 32)


def test_a_scale_that_is_no_number_does_not_pass(tiny_base: Path, quantized: Path) -> None:
    scales = load_file(quantized / "model.safetensors")[f"{LINEAR}.scales"]
    change(quantized, f"{LINEAR}.scales", scales * float("nan"))
    with pytest.raises(ValueError, match="of its norm away"):
        check_result(tiny_base, quantized, 32)


def test_another_group_size_does_not_pass(tiny_base: Path, quantized: Path) -> None:
    with pytest.raises(ValueError, match="another shape or group size"):
        check_result(tiny_base, quantized, 64)


def test_what_was_not_quantized_must_be_the_models(tiny_base: Path, quantized: Path) -> None:
    embeddings = load_file(tiny_base / "model.safetensors")["model.embed_tokens.weight"]
    change(quantized, "model.embed_tokens.weight", embeddings.bfloat16())
    check_result(tiny_base, quantized, 32)  # of fewer bits, and the same
    change(quantized, "model.embed_tokens.weight", embeddings + 1)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight is not the model's"):
        check_result(tiny_base, quantized, 32)


def test_a_linear_that_was_left_as_it_is_does_not_pass(tiny_base: Path, quantized: Path) -> None:
    weight = load_file(tiny_base / "model.safetensors")[f"{LINEAR}.weight"]
    change(quantized, f"{LINEAR}.weight", weight)
    with pytest.raises(ValueError, match="q_proj was not quantized"):
        check_result(tiny_base, quantized, 32)
    change(quantized, f"{LINEAR}.weight", None)
    change(quantized, "model.norm.weight", None)
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight is missing"):
        check_result(tiny_base, quantized, 32)
