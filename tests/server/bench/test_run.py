"""The bench itself: every case measured in every system, and the table that shows it."""

import json
from pathlib import Path

import pytest

from server.bench.run import BenchOptions, run
from server.config import ModelConfig


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
