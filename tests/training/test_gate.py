"""The gate's figures against transformers + PEFT, and what it takes and refuses."""

import contextlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from adapters.manifest import BaseShape
from server.base_digest import base_digest
from tests.conftest import MakeAdapter
from tests.training.packing_by_hand import quantize_folder
from tests.training.test_merge_oracle import merge, options, peft_over
from training.gate import Figures, GateReport, Thresholds, run_gate
from training.merge_adapter import MergeAdapter, open_adapter
from training.quantize_packed import PackedCheckpoint
from training.render import Example

CPU = torch.device("cpu")
ROWS = [
    Example((5, 9, 200, 31, 77, 8), (False, False, True, True, False, True), ends_turn=True),
    Example((64, 3, 250, 12), (True, True, True, True), ends_turn=False),
]
FIGURES = Figures(
    num_rows=2,
    num_tokens=6,
    mean_kl=0.05,
    max_kl=0.5,
    top1_agreement=0.95,
    adapter_loss=1.0,
    artifact_loss=1.05,
)


@contextlib.contextmanager
def opened(adapter: Path, base: Path, tmp_path: Path) -> Iterator[MergeAdapter]:
    shape = BaseShape.from_config(base, base.name, base_digest(base))
    scratch = tmp_path / "staged"
    with open_adapter(
        str(adapter), shape, tmp_path / "store", scratch, allow_other_base=False
    ) as found:
        yield found


def measured(base: Path, adapter: Path, artifact: Path, tmp_path: Path, **more: Any) -> Figures:
    with opened(adapter, base, tmp_path) as found:
        return run_gate(base, found, artifact, more.pop("rows", ROWS), device=CPU, **more)


def dequantized(artifact: Path, base: Path) -> Any:
    """transformers over the numbers that an artifact's codes stand for."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    packed = PackedCheckpoint(artifact)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = packed.weight(name)
    return model


@torch.inference_mode()
def expected(adapter_path: Any, artifact: Any) -> dict[str, float]:
    """The figures, over whole models and all logits."""
    kls, agrees, losses = [], [], []
    for row in ROWS:
        p, q = (
            model(torch.tensor([row.ids])).logits[0].double().log_softmax(-1)
            for model in (adapter_path, artifact)
        )
        for at, token in enumerate(row.ids[1:]):
            if row.is_learned[at + 1]:
                kls.append(float((p[at].exp() * (p[at] - q[at])).sum()))
                agrees.append(float(p[at].argmax() == q[at].argmax()))
                losses.append((-float(p[at, token]), -float(q[at, token])))
    count = len(kls)
    return {
        "num_tokens": count,
        "mean_kl": sum(kls) / count,
        "max_kl": max(kls),
        "top1_agreement": sum(agrees) / count,
        "adapter_loss": sum(mine for mine, _ in losses) / count,
        "artifact_loss": sum(theirs for _, theirs in losses) / count,
    }


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_the_figures_are_those_of_transformers_and_peft(
    lora: dict[str, Any], tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(target_modules="all-linear", **lora)
    merge(options(tiny_base, adapter, tmp_path / "merged", merge_base="dequantized"))
    quantize_folder(tmp_path / "merged", tmp_path / "artifact", 32)
    layers: list[tuple[int, int]] = []

    found = measured(
        tiny_base,
        adapter,
        tmp_path / "artifact",
        tmp_path,
        on_layer=lambda done, of: layers.append((done, of)),
    )

    wanted = expected(
        peft_over(tiny_base, "dequantized", adapter), dequantized(tmp_path / "artifact", tiny_base)
    )
    assert found.num_rows == 2
    assert wanted["num_tokens"] == 6, "no row's first token is predicted from anything"
    for name, value in wanted.items():
        assert getattr(found, name) == pytest.approx(value, rel=1e-3, abs=1e-5), name
    assert found.mean_kl > 1e-4, "four bits are seen"
    assert layers == [(1, 2), (2, 2)]


def test_an_artifact_of_another_adapter_does_not_pass(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter, other = (make_adapter(target_modules="all-linear", seed=seed) for seed in (0, 1))
    merge(options(tiny_base, other, tmp_path / "merged", merge_base="dequantized"))
    quantize_folder(tmp_path / "merged", tmp_path / "artifact", 32)
    report = GateReport(figures=measured(tiny_base, adapter, tmp_path / "artifact", tmp_path))
    assert not report.passed
    assert len(report.failures) >= 2


def test_rows_are_bounded_and_must_teach_something(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter()
    quantize_folder(tiny_base, tmp_path / "artifact", 32)
    idle = Example((5, 6, 7), (True, False, False), ends_turn=False)
    found = measured(tiny_base, adapter, tmp_path / "artifact", tmp_path, rows=[idle, ROWS[0]])
    assert (found.num_rows, found.num_tokens) == (1, 3)
    monkeypatch.setattr("training.gate.MAX_ROWS", 1)
    monkeypatch.setattr("training.gate.MAX_TOKENS", 3)
    found = measured(tiny_base, adapter, tmp_path / "artifact", tmp_path)
    assert (found.num_rows, found.num_tokens) == (1, 1)
    for rows in ([], [idle]):
        with pytest.raises(ValueError, match="needs held-out rows"):
            measured(tiny_base, adapter, tmp_path / "artifact", tmp_path, rows=rows)


def test_weights_that_are_no_number_do_not_pass(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter()
    quantize_folder(tiny_base, tmp_path / "artifact", 32)
    file = tmp_path / "artifact" / "model.safetensors"
    weights = load_file(file)
    weights["model.layers.0.mlp.up_proj.scales"].fill_(float("nan"))
    save_file(weights, file)
    figures = measured(tiny_base, adapter, tmp_path / "artifact", tmp_path)
    assert math.isnan(figures.mean_kl)
    assert not GateReport(figures=figures).passed


def test_what_is_within_every_threshold_passes() -> None:
    report = GateReport(figures=FIGURES)
    assert report.passed
    assert report.failures == []
    assert json.loads(json.dumps(report.to_json()))["figures"]["mean_kl"] == 0.05


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mean_kl": 0.25}, r"mean KL is 0\.2500 nats a token, 0\.0500 over 0\.2"),
        ({"top1_agreement": 0.6}, r"the same at 60\.0% of positions, 20\.0% under 80\.0%"),
        (
            {"artifact_loss": 1.25},
            r"the loss is 1\.2500 and the adapter path's 1\.0000: 0\.2500 more, 0\.1500 over the "
            r"0\.1000 allowed",
        ),
    ],
)
def test_a_failure_says_by_how_much(change: dict[str, Any], said: str) -> None:
    limits = Thresholds(max_mean_kl=0.2, min_top1_agreement=0.8, loss_slack=0.0)
    report = GateReport(figures=replace(FIGURES, **change), thresholds=limits)
    (failure,) = report.failures
    assert pytest.approx(report.figures.loss_increase) == change.get("artifact_loss", 1.05) - 1
    assert not report.passed
    assert re.search(said, failure)


def test_a_small_loss_may_grow_by_the_slack() -> None:
    small = replace(FIGURES, adapter_loss=0.01, artifact_loss=0.025)
    assert GateReport(figures=small).passed
    strict = Thresholds(loss_slack=0.0)
    assert not GateReport(figures=small, thresholds=strict).passed


def test_an_artifact_that_is_better_than_the_adapter_passes() -> None:
    assert GateReport(figures=replace(FIGURES, artifact_loss=0.5)).passed


def test_thresholds_are_named() -> None:
    assert Thresholds.from_settings({}) == Thresholds()
    assert Thresholds.from_settings({"max_mean_kl": 1}).max_mean_kl == 1.0
    with pytest.raises(ValueError, match="no threshold 'kl'; it has loss_slack, max_loss_increase"):
        Thresholds.from_settings({"kl": 0.1})
    with pytest.raises(ValueError, match="max_mean_kl is -1"):
        Thresholds(max_mean_kl=-1)
    with pytest.raises(ValueError, match="min_top1_agreement is 95"):
        Thresholds(min_top1_agreement=95)
