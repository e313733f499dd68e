"""The estimate of the fast step against what an H100 held."""

from pathlib import Path

import pytest
import torch
import transformers

from training.bench_model import shape_7b
from training.config import TrainConfig
from training.fast.layer import CHOICES
from training.fast.model import Options
from training.memory import Setting, estimate
from training.qlora import find_linears

CONFIG = TrainConfig(base=Path("-"), data=Path("-"), out=Path("-"), optimizer="paged_adamw_8bit")
NOT_PYTORCHS = ("run time", "paged_adamw_8bit's state")  # which its peak leaves out


def gigabytes(num_tokens: int, options: Options) -> float:
    """Of Mistral-7B, r = 16 on all linears, as PyTorch counts them."""
    with torch.device("meta"):
        model = transformers.MistralForCausalLM(shape_7b())
    setting = Setting(
        num_trainable=41_943_040,
        num_tokens=num_tokens,
        is_packed=True,
        element_bytes=2,
        checkpointing=True,
        options=options,
    )
    lines = estimate(CONFIG, model.config, find_linears(model), setting)
    return sum(size for what, size in lines if what not in NOT_PYTORCHS) / 1e9


@pytest.mark.parametrize(
    ("num_tokens", "options", "measured"),
    [
        (4096, Options(), 5.70),
        (4096, Options(on_host=False), 10.34),
        (4096, Options(keep=frozenset(CHOICES), on_host=False), 17.86),
    ],
)
def test_estimates_are_near_what_was_measured(
    num_tokens: int, options: Options, measured: float
) -> None:
    assert gigabytes(num_tokens, options) == pytest.approx(measured, rel=0.03)


def test_a_layer_at_a_time_is_all_that_the_device_holds_of_what_waits_on_the_host() -> None:
    near = gigabytes(16384, Options(on_host=False)) - gigabytes(4096, Options(on_host=False))
    away = gigabytes(16384, Options()) - gigabytes(4096, Options())
    assert away < near / 5
