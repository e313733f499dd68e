"""The plan: what a run will take, line by line."""

import io
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, MistralConfig

from tests.training.conftest import MakeConfig, dataset_of
from training.config import TrainConfig
from training.data import Dataset
from training.fast.choice import Choice
from training.fast.layer import CHOICES
from training.fast.model import Options
from training.plan import Plan, first_that_fits, make_plan, show_data, show_plan
from training.qlora import count_trainable, find_linears, load_base, skeleton

CPU = torch.device("cpu")
REFERENCE = Choice(None, "asked for")


def planned(
    config: TrainConfig,
    dataset: Dataset,
    *,
    is_packed: bool = False,
    element_bytes: int = 2,
    checkpointing: bool = False,
    kernels: Choice = REFERENCE,
) -> Plan:
    return make_plan(
        config,
        dataset,
        AutoConfig.from_pretrained(config.base),
        find_linears(skeleton(config.base)),
        is_packed=is_packed,
        element_bytes=element_bytes,
        checkpointing=checkpointing,
        kernels=kernels,
    )


def lines(plan: Plan) -> dict[str, int]:
    """The memory lines by their words, numbers left out."""
    return {re.sub(r"\d[\d,]* ", "", what): size for what, size in plan.memory}


@pytest.fixture
def dataset(make: MakeConfig, tokenizer: Any) -> Dataset:
    return dataset_of(make(), tokenizer)


def test_weights_count_as_the_loaded_model_holds_them(
    make: MakeConfig, dataset: Dataset, chat_base: Path
) -> None:
    model = load_base(chat_base, "nf4", torch.bfloat16, CPU)
    norms = sum(weight.nbytes for weight in model.parameters() if weight.ndim == 1)
    held = sum(weight.nbytes for weight in model.parameters()) - norms
    plan = lines(planned(make(), dataset))
    assert plan["weights of linears"] + plan["of embeddings and head"] == held


def test_packed_weights_take_a_little_over_4_bits_and_one_matrix_in_full(
    make: MakeConfig, dataset: Dataset
) -> None:
    plain = lines(planned(make(), dataset))
    packed = lines(planned(make(), dataset, is_packed=True))
    assert 4.0 < 16 * packed["weights of linears"] / plain["weights of linears"] < 4.2
    assert packed["one dequantized matrix"] == 2 * 64 * 128
    unquantized = lines(planned(make(quantization="none"), dataset, is_packed=True))
    assert unquantized["weights of linears"] == plain["weights of linears"]


@pytest.mark.parametrize(
    ("optimizer", "state_bytes"), [("adamw", 8), ("paged_adamw", 8), ("paged_adamw_8bit", 2)]
)
def test_what_is_trained_takes_weight_gradient_and_state(
    make: MakeConfig, dataset: Dataset, optimizer: str, state_bytes: int
) -> None:
    config = make(optimizer=optimizer, rank=7)
    plan = planned(config, dataset)
    found = lines(plan)
    count = count_trainable(config, find_linears(skeleton(config.base)))
    assert plan.num_trainable == count
    assert found["adapter, fp32"] == found["its gradients"] == 4 * count
    assert found[f"{optimizer}'s state"] == state_bytes * count


def test_activations_grow_with_the_pass_and_shrink_with_checkpointing(
    make: MakeConfig, dataset: Dataset
) -> None:
    def activations(micro_batch: int, **options: Any) -> int:
        plan = planned(make(micro_batch=micro_batch), dataset, **options)
        return lines(plan)["activations of tokens"]

    assert activations(1) < activations(2) < activations(4)
    assert activations(4, checkpointing=True) < activations(4)
    assert activations(16) == activations(4)  # a step has 4 rows


def test_the_estimate_of_the_reference_is_that_of_the_papers(
    make: MakeConfig, dataset: Dataset
) -> None:
    """Mistral-7B, r = 16 on all linears: 41.9 M parameters; weights of 3.6 GB in 4 bits."""
    config = make(rank=16)
    shapes = {"q_proj": (4096, 4096), "k_proj": (1024, 4096), "v_proj": (1024, 4096)}
    shapes |= {"o_proj": (4096, 4096), "gate_proj": (14336, 4096), "up_proj": (14336, 4096)}
    shapes |= {"down_proj": (4096, 14336)}
    linears = {
        f"model.layers.{layer}.block.{name}": shape
        for layer in range(32)
        for name, shape in shapes.items()
    }
    reference = MistralConfig(vocab_size=32000, tie_word_embeddings=False)
    plan = make_plan(
        config,
        dataset,
        reference,
        linears,
        is_packed=True,
        element_bytes=2,
        checkpointing=True,
        kernels=REFERENCE,
    )
    assert plan.num_trainable == 41_943_040
    assert lines(plan)["weights of linears"] == pytest.approx(3.6e9, rel=0.01)
    assert lines(plan)["of embeddings and head"] == 2 * 2 * 32000 * 4096


def test_the_fast_step_says_what_it_keeps_and_where(make: MakeConfig, dataset: Dataset) -> None:
    """Hidden 64, gate and up 2 x 128, q, k, v 64 + 32 + 32; rank 4, so widths of 64."""

    def fast(**options: Any) -> dict[str, int]:
        kernels = Choice(Options(**options), "")
        return lines(planned(make(), dataset, is_packed=True, kernels=kernels))

    held = fast(keep=frozenset(), on_host=False)
    assert held["two dequantized matrices"] == 2 * (320 * 128 + 128 * 192)
    num_tokens = held["kept for the backward pass, tokens"] // (2 * 2 * 64)  # 2 layers, 2 bytes
    assert held["kept for the backward pass, tokens"] == num_tokens * 2 * 2 * 64
    whole = fast(keep=frozenset(CHOICES), on_host=False)["kept for the backward pass, tokens"]
    assert whole == num_tokens * 2 * 2 * (64 + 64 + 64 + 128 + 320)
    two = frozenset(CHOICES[:2])
    waiting = fast(keep=two, on_host=True)["kept for the backward pass, tokens"]
    assert waiting == num_tokens * 2 * 192  # one layer's
    assert "one dequantized matrix" not in held


def test_the_first_plan_that_fits_is_taken_or_else_the_last(
    make: MakeConfig, dataset: Dataset
) -> None:
    plans = [planned(make(micro_batch=size), dataset) for size in (4, 2, 1)]
    needed = [plan.total_bytes for plan in plans]
    assert needed == sorted(needed, reverse=True)
    for index, size in enumerate(needed):
        assert first_that_fits(plans, math.ceil(size / 0.9)) is plans[index]
    assert first_that_fits(plans, 0) is plans[-1]


def test_packing_fills_what_padding_wastes(make: MakeConfig, dataset: Dataset) -> None:
    apart, packed = planned(make(), dataset), planned(make(packing=True), dataset)
    assert 0.5 < apart.fill < 1
    assert len(packed.steps.rows) < len(apart.steps.rows)
    lengths = [len(example.ids) for example in dataset.training]
    assert apart.fill == sum(lengths) / (len(lengths) * max(lengths))
    assert apart.total_bytes == sum(lines(apart).values())


def said(show: Any) -> str:
    """What it prints, 100 columns wide, colours as escapes."""
    sink = io.StringIO()
    show(Console(file=sink, width=100, force_terminal=True, color_system="standard"))
    return sink.getvalue()


def test_data_and_plan_are_printed(make: MakeConfig, dataset: Dataset, tokenizer: Any) -> None:
    config = make(targets=["q_proj", "v_proj"])
    plan = planned(config, dataset)
    example = dataset.training[0]
    text = said(lambda console: show_plan(plan, config, example, tokenizer, console))
    assert f"{plan.num_trainable:,}" in text
    assert "q_proj, v_proj" in text
    assert "reference: asked for" in text
    assert f"{plan.total_bytes / 2**20:,.0f} MiB" in text
    assert re.search(r"\x1b\[4;32m[^\x1b]*yes", text)  # learned: green, underlined
    assert re.search(r"\x1b\[2m[^\x1b]*system", text)  # read: dim
    report = said(lambda console: show_data(dataset, console))
    assert "9 rows" in report
    assert "3 rows" in report
    assert "left out of training, being in evaluation" in report


def test_markup_in_the_data_is_printed_as_it_is(
    make: MakeConfig, tokenizer: Any, tmp_path: Path
) -> None:
    data = tmp_path / "[bold]rows.jsonl"
    data.write_text('{"text": "[red]a[/red]"}\n{"text": "b"}\n')
    dataset = dataset_of(make(data=data, eval_fraction=0), tokenizer)
    report = said(lambda console: show_data(dataset, console))
    assert "[bold]rows.jsonl" in report
    config, example = make(data=data, eval_fraction=0), dataset.training[0]
    plan = planned(config, dataset)
    text = said(lambda console: show_plan(plan, config, example, tokenizer, console))
    assert "red" in re.sub(r"\x1b\[[\d;]*m|\|", "", text)
