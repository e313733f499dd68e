"""`turnout train`, `merge` and `quantize`: what they pass on. What they make: tests/training."""

from pathlib import Path
from typing import Any

import pytest

from server import training_cli
from server.base_digest import base_digest
from tests.server.conftest import FakeModule, Turnout


def test_merge_passes_every_option_on(
    fake_module: FakeModule, turnout: Turnout, tiny_base: Path, tmp_path: Path
) -> None:
    seen: list[tuple[dict[str, Any], str]] = []
    fake_module(
        "training.merge",
        run=lambda options, digest, console: seen.append((options, digest)),
        MergeOptions=dict,
    )
    needed = ("--adapter", "bot@2", "--merge-base", "original", "--out", tmp_path / "out")
    turnout("merge", *needed, "--base", tiny_base)
    more = ("--base-name", "tiny", "--store", tmp_path / "s", "--probe", tmp_path / "p")
    turnout("merge", *needed, "--base", tiny_base, *more, "--device", "cpu", "--allow-other-base")
    by_default, told = seen
    always = {
        "adapter": "bot@2",
        "base": tiny_base,
        "merge_base": "original",
        "out": tmp_path / "out",
    }
    digest = base_digest(tiny_base)
    others = {
        "base_name": tiny_base.name,
        "store": tmp_path / "state" / "store",
        "probe": None,
        "device": "auto",
        "allow_other_base": False,
    }
    assert by_default == (always | others, digest)
    others = {
        "base_name": "tiny",
        "store": tmp_path / "s",
        "probe": tmp_path / "p",
        "device": "cpu",
        "allow_other_base": True,
    }
    assert told == (always | others, digest)


def test_quantize_passes_every_option_on(
    fake_module: FakeModule, turnout: Turnout, tiny_base: Path, tmp_path: Path
) -> None:
    seen: list[dict[str, Any]] = []
    fake_module(
        "training.quantize_cli",
        run=lambda request, console: seen.append(request),
        Request=dict,
    )
    paths = {name: tmp_path / name for name in ("out", "rows", "eval-rows", "text", "quantizer")}
    options: dict[str, object] = {
        **paths,
        "adapter": "bot",
        "base": tiny_base,
        "base-name": "tiny",
        "store": tmp_path / "s",
        "format": "gguf-lora",
        "merge-base": "dequantized",
        "group-size": 64,
        "iterations": 7,
        "text-share": 0.25,
        "tokens": 512,
        "seed": 3,
        "gate": "max_mean_kl=0.2",
        "device": "cpu",
        "backend": "auto-round",
    }
    pairs = [part for name, value in options.items() for part in (f"--{name}", value)]
    turnout("quantize", *pairs, "--gate", "min_top1=0.9", "--desc-act", "--allow-other-base")
    (request,) = seen
    assert request.pop("given") >= {"rows", "gate"}
    del options["format"]
    told = {name.replace("-", "_"): value for name, value in options.items()}
    gate = ("max_mean_kl=0.2", "min_top1=0.9")
    told |= {"kind": "gguf-lora", "model": None, "gate": gate}
    assert request == told | {"desc_act": True, "allow_other_base": True}


def test_a_merged_checkpoint_is_quantized_without_a_base(
    fake_module: FakeModule, turnout: Turnout, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[dict[str, Any]] = []
    fake_module(
        "training.quantize_cli",
        run=lambda request, console: seen.append(request),
        Request=dict,
    )
    monkeypatch.setattr(training_cli, "base_config", lambda *_: pytest.fail("a base was looked up"))
    turnout("quantize", "--model", tmp_path / "merged", "--out", tmp_path / "out")
    (request,) = seen
    assert (request["model"], request["base"]) == (tmp_path / "merged", None)


@pytest.mark.parametrize("option", ["--store", "--url", "--api-key"])
def test_train_refuses_what_only_a_registration_needs(refused: Turnout, option: str) -> None:
    assert refused("train", option, "x") == f"turnout: {option} does nothing without --register\n"


@pytest.mark.parametrize(
    ("given", "named"),
    [
        (("--dry-run",), "--dry-run"),
        (("--num-processes", 1), "--num-processes"),
        (("--register", "bot", "--store", "s"), "--register --store"),
        (("--rank", 8), "--rank 8"),
        (("--data", "rows.jsonl", "--rank=8"), "--data --rank=8"),
    ],
)
def test_train_lists_settings_for_nobody_who_also_gives_some(
    refused: Turnout, given: tuple[object, ...], named: str
) -> None:
    said = f"turnout: --settings only lists the settings: leave out {named}\n"
    assert refused("train", "--settings", *given) == said
    assert refused("train", *given, "--settings") == said


def test_train_takes_a_key_from_the_environment_without_a_registration(
    turnout: Turnout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TURNOUT_API_KEY", "x")
    assert "rank" in turnout("train", "--settings")
