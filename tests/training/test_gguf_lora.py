"""An adapter as a GGUF LoRA file: the layout that llama.cpp reads, and the numbers in it."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFWriter, Keys

from adapters.manifest import BaseShape
from server.base_digest import base_digest
from server.default_base import split_halves
from tests.conftest import MakeAdapter
from training.gguf_lora import export_adapter
from training.merge_adapter import MergeAdapter, open_adapter

CPU = torch.device("cpu")
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


@contextlib.contextmanager
def opened(adapter: Path, base: Path, tmp_path: Path) -> Iterator[MergeAdapter]:
    shape = BaseShape.from_config(base, base.name, base_digest(base))
    scratch = tmp_path / "staged"
    with open_adapter(
        str(adapter), shape, tmp_path / "store", scratch, allow_other_base=False
    ) as found:
        yield found


def field(reader: GGUFReader, key: str) -> Any:
    found = reader.get_field(key)
    assert found is not None, key
    return found.contents()


def deltas(file: Path, num_heads: dict[str, int]) -> dict[str, torch.Tensor]:
    """What llama.cpp adds to each linear [out, in], rows in transformers' order again."""
    reader = GGUFReader(file)
    alpha = field(reader, Keys.Adapter.LORA_ALPHA)
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    found = {}
    for name in {name.rpartition(".")[0] for name in tensors}:
        lora_a, lora_b = (tensors[f"{name}.lora_{part}"] for part in "ab")
        delta = alpha / len(lora_a) * (lora_b @ lora_a)  # llama.cpp: alpha / rank
        leaf = name.split(".")[2]
        found[name] = torch.from_numpy(
            split_halves(delta, num_heads[leaf]) if leaf in num_heads else delta
        )
    return found


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
        {
            "target_modules": "all-linear",
            "r": 4,
            "rank_pattern": {"down_proj": 7, r"layers\.1\.self_attn\.q_proj": 3},
            "alpha_pattern": {"v_proj": 3},
        },
    ],
    ids=["plain", "rslora", "patterns"],
)
def test_llama_cpp_adds_what_peft_adds(
    lora: dict[str, Any], tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    out = tmp_path / "out" / "adapter.gguf"
    with opened(make_adapter(**lora), tiny_base, tmp_path) as adapter:
        export_adapter(adapter, tiny_base, out)
        expected = {}
        for module in adapter.module_names:
            found = adapter.lora(module, CPU)
            assert found is not None
            _, _, layer, linear = module.split(".", 3)
            delta = found.scaling * (found.lora_b @ found.lora_a)
            expected[f"blk.{layer}.{NAMES[linear]}.weight"] = delta
    found_deltas = deltas(out, {"attn_q": 4, "attn_k": 2})
    assert found_deltas.keys() == expected.keys()
    for name, delta in expected.items():
        torch.testing.assert_close(found_deltas[name], delta, atol=1e-6, rtol=1e-5)
    assert [path.name for path in out.parent.iterdir()] == ["adapter.gguf"]


def test_the_file_says_that_it_is_a_lora_over_a_llama(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    out = tmp_path / "adapter.gguf"
    with opened(make_adapter(r=8, lora_alpha=20), tiny_base, tmp_path) as adapter:
        export_adapter(adapter, tiny_base, out)
        original = adapter.lora("model.layers.0.self_attn.v_proj", CPU)
    reader = GGUFReader(out)
    assert field(reader, Keys.General.ARCHITECTURE) == "llama"
    assert field(reader, Keys.General.TYPE) == "adapter"
    assert field(reader, Keys.Adapter.TYPE) == "lora"
    assert field(reader, Keys.Adapter.LORA_ALPHA) == 20.0
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert len(tensors) == 2 * 2 * 2
    assert original is not None
    assert np.array_equal(tensors["blk.0.attn_v.weight.lora_a"], original.lora_a.numpy())
    assert np.array_equal(tensors["blk.0.attn_v.weight.lora_b"], original.lora_b.numpy())


def test_dora_is_refused(tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    out = tmp_path / "out" / "adapter.gguf"
    with (
        opened(make_adapter(use_dora=True), tiny_base, tmp_path) as adapter,
        pytest.raises(ValueError, match=r"q_proj is trained with DoRA.*merge it"),
    ):
        export_adapter(adapter, tiny_base, out)
    assert not out.parent.exists()


def test_a_file_that_exists_is_refused(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    out = tmp_path / "adapter.gguf"
    out.write_text("mine")
    with (
        opened(make_adapter(), tiny_base, tmp_path) as adapter,
        pytest.raises(ValueError, match="exists"),
    ):
        export_adapter(adapter, tiny_base, out)
    assert out.read_text() == "mine"


def test_a_file_that_differs_in_one_number_is_told(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = GGUFWriter.add_tensor

    def spoil(writer: GGUFWriter, name: str, values: Any) -> None:
        plain(writer, name, values + (name == "blk.1.attn_q.weight.lora_b") * 1e-6)

    monkeypatch.setattr(GGUFWriter, "add_tensor", spoil)
    out = tmp_path / "out" / "adapter.gguf"
    with (
        opened(make_adapter(), tiny_base, tmp_path) as adapter,
        pytest.raises(ValueError, match=r"blk\.1\.attn_q\.weight\.lora_b is not the adapter's"),
    ):
        export_adapter(adapter, tiny_base, out)
    assert list(out.parent.iterdir()) == []
