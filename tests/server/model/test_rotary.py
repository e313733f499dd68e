"""Rotary tables: transformers' own frequencies, and tables that keep to themselves."""

from typing import Any

import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from adapters.rope import RopeScaling
from server.kernels.fused import cos_and_sin
from server.model.rotary import RotaryTables, frequencies, scaled_frequencies

CPU = torch.device("cpu")
LINEAR = {"rope_type": "linear", "factor": 3.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
SCALINGS: list[dict[str, Any]] = [
    LINEAR,
    {"rope_type": "linear", "factor": 1.0},
    YARN,
    {**YARN, "factor": 1.0},
    {**YARN, "original_max_position_embeddings": 8192, "factor": 16.0},
    {**YARN, "original_max_position_embeddings": 2},  # all of it stretched
    {**YARN, "truncate": False, "beta_fast": 20.0, "beta_slow": 2.5},
    {**YARN, "beta_fast": 4.0, "beta_slow": 4.0, "truncate": False},
    {**YARN, "attention_factor": 1.75},
    {**YARN, "mscale": 0.7, "mscale_all_dim": 1.3},
]


def config_of(head_dim: int, theta: float, fields: dict[str, Any]) -> transformers.MistralConfig:
    return transformers.MistralConfig(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        head_dim=head_dim,
        max_position_embeddings=512,
        rope_parameters={**fields, "rope_theta": theta},
    )


@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("theta", [10000.0, 1e6])
@pytest.mark.parametrize("fields", SCALINGS)
def test_frequencies_are_transformers_own_to_the_last_bit(
    fields: dict[str, Any], theta: float, head_dim: int
) -> None:
    scaling = RopeScaling.read(fields, theta=theta)
    expected, factor = ROPE_INIT_FUNCTIONS[fields["rope_type"]](
        config_of(head_dim, theta, fields), CPU
    )
    assert torch.equal(scaled_frequencies(head_dim, theta, scaling), expected)
    assert scaling.attention_factor == factor


@pytest.mark.parametrize("fields", [{"rope_type": "default"}, LINEAR, YARN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_transformers_cosines_and_sines(
    fields: dict[str, Any], dtype: torch.dtype
) -> None:
    tables = RotaryTables(16, 10000.0, 100, 2, CPU)
    number = None
    if fields["rope_type"] != "default":
        tables.write(2, RopeScaling.read(fields, theta=10000.0))
        number = torch.tensor([2, 2, 2])
    positions = torch.tensor([0, 7, 99])
    rotary: Any = transformers.models.mistral.modeling_mistral.MistralRotaryEmbedding(
        config_of(16, 10000.0, fields)
    )
    cos, sin = rotary(torch.zeros(1, dtype=dtype), positions[None])
    ours = cos_and_sin(tables.look_up(positions, number), dtype)
    assert torch.equal(ours[0][:, 0], cos[0])
    assert torch.equal(ours[1][:, 0, 8:], sin[0][:, 8:])
    assert torch.equal(ours[1][:, 0, :8], -sin[0][:, :8])


def test_each_token_takes_the_table_that_is_named_for_it() -> None:
    tables = RotaryTables(16, 10000.0, 50, 2, CPU)
    tables.write(1, RopeScaling.read(LINEAR, theta=10000.0))
    tables.write(2, RopeScaling.read(YARN, theta=10000.0))
    positions, numbers = torch.tensor([9, 9, 9, 30]), torch.tensor([2, 0, 1, 1])
    found = tables.look_up(positions, numbers)
    for row, number, position in zip(found, numbers, positions, strict=True):
        assert torch.equal(row, tables.rows[number, position])
    torch.testing.assert_close(found[2], tables.rows[0, 3])  # a third of the way
    torch.testing.assert_close(found[3], tables.rows[0, 10])
    assert torch.equal(tables.look_up(positions, None), tables.rows[0, positions])


def test_a_table_is_written_over_and_its_neighbours_stay() -> None:
    tables = RotaryTables(16, 10000.0, 50, 2, CPU)
    first = RopeScaling.read(LINEAR, theta=10000.0)
    tables.write(1, first)
    tables.write(2, first)
    before = tables.rows.clone()
    tables.write(1, RopeScaling.read(YARN, theta=10000.0))
    assert not torch.equal(tables.rows[1], before[1])
    assert torch.equal(tables.rows[0], before[0])
    assert torch.equal(tables.rows[2], before[2])
    with pytest.raises(AssertionError, match="base's table never changes"):
        tables.write(0, first)


def test_the_bases_frequencies_fall_from_one_to_its_theta() -> None:
    found = frequencies(64, 5e5)
    assert found[0] == 1
    assert float(found[-1]) == pytest.approx(5e5 ** (-62 / 64))
