"""The bench itself: every case measured in every system, and the table that shows it."""

import json
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from server.bench.run import BenchOptions, Row, _print, run
from server.config import ModelConfig
from server.engine.messages import EngineInfo


def test_every_case_is_measured_in_every_system_and_shown(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = BenchOptions(
        model=ModelConfig(path=tiny_base, name="tiny", quantization="none", dtype="float32"),
        batch_sizes=(1, 3),
        num_adapters=2,
        prompt_tokens=5,
        new_tokens=4,
        rounds=1,
        http=False,
        json_file=tmp_path / "rows.json",
    )
    rows = run(options)
    cases = {("base", 1), ("one adapter", 1), ("base", 3), ("one adapter", 3), ("2 mixed", 3)}
    for system in ("turnout", "transformers + PEFT"):
        assert {(row.adapters, row.batch) for row in rows if row.system == system} == cases
    for row in rows:
        assert min(row.prefill_tok_s, row.decode_tok_s, row.total_tok_s) > 0
    assert len(json.loads((tmp_path / "rows.json").read_text())) == len(rows)
    shown = capsys.readouterr().out
    assert "2 mixed" in shown
    assert "PEFT: transformers + PEFT, total\n" in shown
    assert "HTTP" not in shown  # which was not measured


def test_the_table_of_large_figures_fits_a_terminal_of_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    systems = ("turnout", "transformers + PEFT", "turnout over HTTP")
    rows = [
        Row(system, adapters, 128, 123_456.0, 98_765.4, 54_321.0)
        for system in systems
        for adapters in ("base", "one adapter", "8 mixed")
    ]
    options = BenchOptions(model=ModelConfig(path=Path("x"), name="smollm2-135m-instruct"))
    counts = dict.fromkeys(
        ("num_blocks", "block_size", "max_model_len", "bank_rows", "page_rows", "vocab_size"), 1
    )
    names = {"base_digest": "d", "device": "cpu", "dtype": "bfloat16", "quantization": "nf4"}
    info = msgspec.convert({**counts, **names, "eos_token_ids": [], "kernels": {}}, EngineInfo)
    _print(rows, options, info, Console())
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line.split() for line in lines if "one adapter" in line]
    assert line == [
        "one",
        "adapter",
        "128",
        "123,456",
        "98,765",
        "54,321",
        "54,321",
        "1.00",
        "54,321",
        "1.00",
    ]
    assert "…" not in "".join(lines)
    titles = next(line.split() for line in lines if line.startswith("adapters"))
    assert titles == [
        "adapters",
        "batch",
        "prefill",
        "decode",
        "total",
        "PEFT",
        "ratio",
        "HTTP",
        "ratio",
    ]
