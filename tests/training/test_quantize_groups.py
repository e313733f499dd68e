"""The group size is settled before anything is quantized, over every linear."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from training.merge_checkpoint import Checkpoint
from training.quantize_groups import choose_group_size, linear_names

Make = Callable[..., Checkpoint]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """A function that makes a checkpoint whose linears have these shapes [out, in]."""
    opened = contextlib.ExitStack()

    def checkpoint(**shapes: tuple[int, int]) -> Checkpoint:
        weights = {
            f"model.layers.0.mlp.{name}.weight": torch.zeros(shape)
            for name, shape in shapes.items()
        }
        weights["model.embed_tokens.weight"] = torch.zeros(8, 5)
        weights["model.layers.0.input_layernorm.weight"] = torch.zeros(5)
        (tmp_path / "config.json").write_text("{}")
        save_file(weights, tmp_path / "model.safetensors")
        return opened.enter_context(contextlib.closing(Checkpoint(tmp_path)))

    with opened:
        yield checkpoint


@pytest.mark.parametrize(("width", "expected"), [(256, 128), (192, 64), (96, 32), (576, 64)])
def test_the_largest_size_that_fits_every_linear_is_taken(
    width: int, expected: int, make: Make
) -> None:
    checkpoint = make(up_proj=(8, 256), down_proj=(16, width))
    assert choose_group_size(checkpoint, 0) == expected
    assert choose_group_size(checkpoint, 32) == 32


def test_a_size_that_does_not_fit_is_refused_with_those_that_do(make: Make) -> None:
    checkpoint = make(up_proj=(8, 256), down_proj=(16, 576))
    with pytest.raises(ValueError, match="not divide the 576 inputs") as refusal:
        choose_group_size(checkpoint, 128)
    assert "model.layers.0.mlp.down_proj (1 of 2 linears); what fits is 64 or 32" in str(
        refusal.value
    )


def test_a_model_that_no_size_fits_is_refused(make: Make) -> None:
    checkpoint = make(up_proj=(8, 256), down_proj=(16, 40))
    for wanted in (0, 32):
        with pytest.raises(ValueError, match="40 inputs, which no group size divides"):
            choose_group_size(checkpoint, wanted)


def test_outputs_that_cannot_be_packed_are_refused(make: Make) -> None:
    checkpoint = make(up_proj=(12, 64))
    with pytest.raises(ValueError, match="up_proj has 12 outputs"):
        choose_group_size(checkpoint, 0)


def test_a_size_that_no_tool_writes_is_refused(make: Make) -> None:
    checkpoint = make(up_proj=(8, 96))
    with pytest.raises(ValueError, match=r"is 48; it must be 128, 64, 32, or 0"):
        choose_group_size(checkpoint, 48)


def test_embeddings_and_norms_are_no_linears(make: Make) -> None:
    checkpoint = make(up_proj=(8, 64))
    assert linear_names(checkpoint) == ["model.layers.0.mlp.up_proj"]


def test_a_checkpoint_of_another_kind_of_model_is_refused(make: Make) -> None:
    checkpoint = make(experts=(8, 64))
    with pytest.raises(ValueError, match="no linears of a Mistral or Llama"):
        choose_group_size(checkpoint, 0)
