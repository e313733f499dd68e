"""The command line of `turnout quantize`: each output, and no option that does nothing."""

import json
from pathlib import Path

import pytest

from server.cli import main
from tests.conftest import MakeAdapter
from tests.training import packing_by_hand
from tests.training.test_gguf_export import add_tokenizer
from tests.training.test_merge_oracle import merge, options
from training import artifact as artifact_module
from training import quantize as quantize_module
from training import quantize_cli
from training.artifact import GateFailed
from training.gate import Thresholds
from training.quantize_cli import thresholds


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quantizer that needs no library."""
    monkeypatch.setattr(quantize_module, "run_worker", packing_by_hand.worker)
    for module in (quantize_module, artifact_module):
        monkeypatch.setattr(module, "find_python", lambda wanted, kind: Path("python"))


def succeeds(*words: str | Path) -> None:
    """Run the command."""
    with pytest.raises(SystemExit) as exit_:
        main(["quantize", *map(str, words)])
    assert exit_.value.code == 0


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """What the command says on stderr, in one line, when it exits with 1."""
    with pytest.raises(SystemExit) as exit_:
        main(["quantize", *map(str, words)])
    assert exit_.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("turnout: ")
    return said


@pytest.mark.usefixtures("by_hand")
def test_a_checkpoint_is_quantized_and_its_errors_are_printed(
    chat_base: Path, rows_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    succeeds("--model", chat_base, "--rows", rows_file, "--out", out)
    said = " ".join(capsys.readouterr().out.split())
    assert "mlp.up_proj" in said
    assert "group size 64" in said
    assert "Calibrated on" in said
    assert json.loads((out / "turnout.json").read_text())["kind"] == "gptq"


@pytest.mark.usefixtures("by_hand")
def test_an_adapter_is_merged_quantized_and_gated(
    chat_base: Path,
    rows_file: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    adapter, out = make_adapter(base=chat_base), tmp_path / "out"
    succeeds(
        *("--base", chat_base, "--rows", rows_file, "--merge-base", "dequantized"),
        *("--adapter", adapter, "--gate", "max_mean_kl=9", "--gate", "min_top1_agreement=0"),
        *("--out", out),
    )
    said = " ".join(capsys.readouterr().out.split())
    assert "dequantized *" in said
    assert "passed" in said
    gate = json.loads((out / "turnout.json").read_text())["gate"]
    assert gate["thresholds"]["max_mean_kl"] == 9.0
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_a_failed_gate_ends_the_command_with_its_figures(
    chat_base: Path,
    rows_file: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise GateFailed({"message": "the quality gate failed. original base: mean KL is 1"})

    monkeypatch.setattr(quantize_cli, "make_artifact", fail)
    words = ("--base", chat_base, "--rows", rows_file, "--adapter", "a", "--out", tmp_path / "o")
    assert "original base: mean KL is 1" in refused(capsys, *words)


@pytest.mark.parametrize("kind", ["gguf-f16", "gguf-q8_0"])
def test_a_merged_checkpoint_is_written_as_gguf(
    kind: str, tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    merge(options(tiny_base, make_adapter(), tmp_path / "merged"))
    add_tokenizer(tmp_path / "merged")
    out = tmp_path / "model.gguf"
    succeeds("--model", tmp_path / "merged", "--format", kind, "--out", out)
    assert out.read_bytes()[:4] == b"GGUF"


def test_an_adapter_is_written_as_gguf(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    out = tmp_path / "adapter.gguf"
    succeeds(
        "--adapter", make_adapter(), "--base", tiny_base, "--format", "gguf-lora", "--out", out
    )
    assert out.read_bytes()[:4] == b"GGUF"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--format=exl2", "--model=m"], "--format is 'exl2'; it must be one of gptq, awq"),
        ([], "name one of --model (a merged checkpoint) and --adapter"),
        (["--format=awq", "--adapter=a"], "is made from a merged checkpoint: `turnout merge`"),
        (["--format=gguf-lora", "--model=m"], "is made from an adapter: --adapter, not --model"),
        (["--format=gguf-f16", "--model=m", "--rows=r"], "--rows does nothing with --model"),
        (["--model=m", "--gate=max_mean_kl=1"], "--gate does nothing with --model and gptq"),
        (["--model=m", "--iterations=3"], "--iterations does nothing with gptqmodel"),
        (["--adapter=a", "--iterations=3"], "--iterations does nothing with gptqmodel"),
        (["--format=awq", "--model=m", "--backend=gptqmodel"], "awq is written by auto-round"),
        (["--format=awq", "--model=m", "--desc-act"], "--desc-act does nothing"),
        (["--adapter=a", "--desc-act"], "--desc-act does nothing"),
        (["--model=m", "--backend=auto-gptq"], "--backend gptqmodel"),
        (["--model=m", "--rows=r", "--text-share=0.3"], "without both --rows and --text"),
        (["--model=m", "--text=t", "--text-share=0.3"], "without both --rows and --text"),
    ],
)
def test_what_does_not_apply_is_refused(
    words: list[str], complaint: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert complaint in refused(capsys, *words, f"--out={out}")
    assert not out.exists()


def test_both_sources_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert "name one of" in refused(capsys, "--out=o", "--model=m", "--adapter=a")


def test_thresholds_are_read_from_words() -> None:
    assert thresholds(["max_mean_kl=0.5"]) == Thresholds(max_mean_kl=0.5)
    for word in ("max_mean_kl", "max_mean_kl=low"):
        with pytest.raises(ValueError, match=f"--gate is '{word}'; it must be name=number"):
            thresholds([word])
    with pytest.raises(ValueError, match="no threshold 'kl'"):
        thresholds(["kl=1"])
