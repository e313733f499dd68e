"""Which step a run takes, and that it says why."""

from typing import Any

import pytest
import torch
from transformers import MistralConfig

from tests.training.conftest import MakeConfig
from training.fast.choice import Choice, choices
from training.fast.layer import CHOICES

CPU, GPU = torch.device("cpu"), torch.device("cuda")
BASE = MistralConfig(sliding_window=None)


def choose(*args: Any) -> Choice:
    """The one that takes the least memory."""
    return choices(*args)[-1]


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))


@pytest.mark.usefixtures("hopper")
def test_on_a_gpu_the_fast_step_keeps_what_there_is_memory_for(make: MakeConfig) -> None:
    found = choices(make(), BASE, torch.bfloat16, GPU)
    kept = [(len(one.options.keep), one.options.on_host) for one in found if one.options]
    assert kept == [(4, False), (3, False), (3, True)]
    assert [str(one)[:6] for one in found] == ["fast: "] * 3
    assert len({one.why for one in found}) == 3


@pytest.mark.usefixtures("hopper")
def test_checkpointing_asked_for_or_not_leaves_one_choice(make: MakeConfig) -> None:
    (least,) = choices(make(gradient_checkpointing=True), BASE, torch.bfloat16, GPU)
    assert least.options is not None
    assert least.options.on_host
    (most,) = choices(make(gradient_checkpointing=False), BASE, torch.bfloat16, GPU)
    assert most.options is not None
    assert most.options.keep == set(CHOICES)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    ("settings", "changes", "why"),
    [
        ({"dropout": 0.05}, {}, "dropout is 0.05"),
        ({"use_dora": True}, {}, "use_dora is set"),
        ({}, {"hidden_act": "gelu"}, "activation is gelu"),
        ({}, {"attention_bias": True}, "have biases"),
        ({}, {"sliding_window": 100}, "window of 100 is narrower"),
    ],
)
def test_what_it_does_not_know_is_named_and_refused_where_it_was_asked_for(
    make: MakeConfig, settings: dict[str, Any], changes: dict[str, Any], why: str
) -> None:
    base = MistralConfig(**{"sliding_window": None, **changes})
    choice = choose(make(**settings), base, torch.bfloat16, GPU)
    assert choice.options is None
    assert why in str(choice)
    assert str(choice).startswith("reference: ")
    with pytest.raises(ValueError, match=f"kernels is 'fast', but .*{why}"):
        choose(make(kernels="fast", **settings), base, torch.bfloat16, GPU)


@pytest.mark.usefixtures("hopper")
def test_a_window_as_wide_as_the_rows_is_none(make: MakeConfig) -> None:
    base = MistralConfig(sliding_window=128)
    assert choose(make(max_length=128), base, torch.bfloat16, GPU).options is not None


def test_hardware_that_lacks_something_is_told_so(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert "7.5, not 8.0" in str(choose(make(), BASE, torch.float16, GPU))
    assert "dtype is fp32" in str(choose(make(), BASE, torch.float32, GPU))
    with pytest.raises(ValueError, match=r"7\.5"):
        choose(make(kernels="fast"), BASE, torch.float16, GPU)


def test_without_a_gpu_the_modules_run_unless_told(make: MakeConfig) -> None:
    assert str(choose(make(), BASE, torch.float32, CPU)) == "reference: there is no GPU"
    assert choose(make(kernels="fast"), BASE, torch.float32, CPU).options is not None


@pytest.mark.usefixtures("hopper")
def test_the_reference_can_be_asked_for(make: MakeConfig) -> None:
    assert choose(make(kernels="reference"), BASE, torch.bfloat16, GPU).options is None
