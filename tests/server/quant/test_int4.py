"""GPTQ's layout against codes packed here, and every setting that is not served."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from server.quant import int4
from server.quant.int4 import GPTQFormat, Int4Tensor
from tests.server.gptq_folder import pack_linear, settings_of

CPU = torch.device("cpu")
Parts = dict[str, torch.Tensor]


def random_parts(
    group_size: int = 32, layout: str = "gptq", shape: tuple[int, int] = (24, 192)
) -> tuple[Parts, torch.Tensor]:
    """One linear `x`, and the matrix [out, in] that it stands for, in fp32."""
    generator = np.random.default_rng(0)
    codes = generator.integers(0, 16, shape)
    scales = generator.random((shape[0], shape[1] // group_size)).astype(np.float16) + np.float16(1)
    values = (codes - 8) * np.repeat(scales.astype(np.float32), group_size, axis=1)
    parts = pack_linear("x", codes, scales.astype(np.float32), group_size, layout)
    return parts, torch.from_numpy(values).float()


def read(parts: Parts, group_size: int = 32, zero_offset: int = 1) -> Int4Tensor:
    return int4.read_linear("x", GPTQFormat(group_size, zero_offset), parts.get, CPU)


class TestReadingALinear:
    @pytest.mark.parametrize(("layout", "zero_offset"), [("gptq", 1), ("gptq_v2", 0)])
    @pytest.mark.parametrize("group_size", int4.GROUP_SIZES)
    def test_it_stands_for_the_same_numbers(
        self, group_size: int, layout: str, zero_offset: int
    ) -> None:
        parts, values = random_parts(group_size, layout, (24, 384))
        tensor = read(parts, group_size, zero_offset)
        assert tensor.shape == (24, 384)
        assert tensor.group_size == group_size
        assert torch.equal(tensor.dequantize(torch.float32), values)

    def test_values_are_rounded_once(self) -> None:
        parts, values = random_parts()
        assert torch.equal(read(parts).dequantize(torch.bfloat16), values.bfloat16())

    def test_the_first_weight_is_in_the_high_nibble(self) -> None:
        parts, values = random_parts()
        tensor = read(parts)
        first = (tensor.qweight[:, 0] >> 4).float() - 8
        assert torch.equal(first * tensor.scales[:, 0], values[:, 0])

    def test_a_matrix_of_many_rows_is_expanded_whole(self) -> None:
        parts, values = random_parts(shape=(2056, 32))
        tensor = read(parts)
        assert torch.equal(tensor.dequantize(torch.float32), values)
        torch.testing.assert_close(tensor.row_norms_squared(), values.square().sum(dim=1))

    def test_group_indices_may_be_missing(self) -> None:
        parts, values = random_parts()
        del parts["x.g_idx"]
        assert torch.equal(read(parts).dequantize(torch.float32), values)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
    def test_scales_may_have_any_dtype(self, dtype: torch.dtype) -> None:
        parts, _ = random_parts()
        parts["x.scales"] = parts["x.scales"].to(dtype)
        tensor = read(parts)
        assert torch.equal(tensor.scales, parts["x.scales"].float().T)

    @pytest.mark.parametrize("part", ["qweight", "qzeros", "scales"])
    def test_a_missing_tensor_is_named(self, part: str) -> None:
        parts, _ = random_parts()
        del parts[f"x.{part}"]
        with pytest.raises(ValueError, match=f"tensor x.{part} is missing"):
            read(parts)

    def test_zero_points_of_the_other_layout_are_refused(self) -> None:
        parts, _ = random_parts(layout="gptq_v2")
        with pytest.raises(ValueError, match="x: zero points other than 8"):
            read(parts, zero_offset=1)

    def test_one_asymmetric_group_is_refused(self) -> None:
        parts, _ = random_parts()
        parts["x.qzeros"][2, 1] ^= 1 << 20
        with pytest.raises(ValueError, match="x: zero points other than 8"):
            read(parts)

    def test_scattered_groups_are_refused(self) -> None:
        parts, _ = random_parts()
        parts["x.g_idx"] = parts["x.g_idx"].flip(0)
        with pytest.raises(ValueError, match="x: groups of scattered inputs"):
            read(parts)

    def test_a_bias_is_refused_unless_it_is_zero(self) -> None:
        parts, values = random_parts()
        parts["x.bias"] = torch.zeros(24)
        assert torch.equal(read(parts).dequantize(torch.float32), values)
        parts["x.bias"][3] = 1.0
        with pytest.raises(ValueError, match="x: a bias"):
            read(parts)

    def test_scales_that_are_not_finite_are_refused(self) -> None:
        parts, _ = random_parts()
        parts["x.scales"][1, 2] = torch.inf
        with pytest.raises(ValueError, match="x: scales are not finite"):
            read(parts)

    @pytest.mark.parametrize("part", ["scales", "qzeros"])
    def test_shapes_that_do_not_fit_each_other_are_refused(self, part: str) -> None:
        parts, _ = random_parts()
        parts[f"x.{part}"] = parts[f"x.{part}"][:-1]
        with pytest.raises(ValueError, match=f"x: {part} .* do not fit codes of 192 inputs x 24"):
            read(parts)

    def test_groups_of_another_size_than_promised_are_refused(self) -> None:
        parts, _ = random_parts(group_size=64)
        with pytest.raises(ValueError, match=r"x: scales .* in groups of 32"):
            read(parts, group_size=32)

    def test_words_of_another_type_are_refused(self) -> None:
        parts, _ = random_parts()
        parts["x.qweight"] = parts["x.qweight"].long()
        with pytest.raises(ValueError, match=r"x\.qweight is torch\.int64 \[24, 24\]"):
            read(parts)


def write_config(folder: Path, settings: dict[str, Any] | None) -> Path:
    config: dict[str, Any] = {"hidden_size": 64}
    if settings is not None:
        config["quantization_config"] = settings
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class TestReadingTheFormat:
    def test_a_folder_without_settings_is_not_quantized(self, tmp_path: Path) -> None:
        assert int4.read_format(write_config(tmp_path, None)) is None

    @pytest.mark.parametrize(("layout", "zero_offset"), [("gptq", 1), ("gptq_v2", 0)])
    @pytest.mark.parametrize("group_size", int4.GROUP_SIZES)
    def test_group_size_and_layout(
        self, group_size: int, layout: str, zero_offset: int, tmp_path: Path
    ) -> None:
        folder = write_config(tmp_path, settings_of(group_size, layout))
        assert int4.read_format(folder) == GPTQFormat(group_size, zero_offset)

    def test_older_folders_say_it_beside_the_config(self, tmp_path: Path) -> None:
        write_config(tmp_path, None)
        own = {"bits": 4, "group_size": 128, "desc_act": False, "sym": True}
        (tmp_path / "quantize_config.json").write_text(json.dumps(own))
        assert int4.read_format(tmp_path) == GPTQFormat(128, 1)

    def test_desc_act_is_left_to_the_indices(self, tmp_path: Path) -> None:
        folder = write_config(tmp_path, settings_of(64, desc_act=True))
        assert int4.read_format(folder) == GPTQFormat(64)

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"quant_method": "awq"}, "quantized with awq; we read GPTQ"),
            ({"quant_method": "bitsandbytes"}, "quantized with bitsandbytes"),
            ({"bits": 8}, "to 8 bits; we read 4 bits"),
            ({"bits": None}, "to None bits"),
            ({"group_size": -1}, "in groups of -1; we read groups of 32, 64, 128"),
            ({"group_size": 256}, "in groups of 256"),
            ({"sym": False}, "asymmetrically"),
            ({"checkpoint_format": "marlin"}, "in the layout 'marlin'; we read gptq and gptq_v2"),
            ({"pack_dtype": "int16"}, "in words of int16"),
            ({"lm_head": True}, "with its lm_head"),
            ({"dynamic": {"-:.*down_proj": {}}}, "layer by layer"),
        ],
    )
    def test_what_is_not_served_is_named(
        self, changed: dict[str, Any], message: str, tmp_path: Path
    ) -> None:
        folder = write_config(tmp_path, settings_of(128) | changed)
        with pytest.raises(ValueError, match=message):
            int4.read_format(folder)


def test_gptqmodels_own_linear_stands_for_the_same_numbers() -> None:
    module = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch")
    parts, _ = random_parts(64, "gptq_v2", (64, 128))  # what it makes of v1 when it loads
    linear = module.TorchLinear(
        bits=4, group_size=64, sym=True, desc_act=False, in_features=128, out_features=64
    )
    for name in ("qweight", "qzeros", "scales", "g_idx"):
        getattr(linear, name).copy_(parts[f"x.{name}"])
    linear.qzero_format(format=2)
    expected = linear.dequantize_weight().T
    assert torch.equal(read(parts, 64, 0).dequantize(expected.dtype), expected)
