"""The tables of a GPU, their measurements replaced: what is printed and written down."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from server.bench import gpu_table
from server.bench.figures import Figure
from server.bench.gpu_table import MIXED_RANKS, RANK


def test_each_figure_is_printed_as_it_comes_and_all_are_written_down(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def figures(root: Path) -> Iterator[Figure]:
        assert root.is_dir()
        yield Figure("decode step, batch 1", 2.5, "ms", 1.3, "400 tok/s")
        yield Figure("prefill", 0.4, "s")

    monkeypatch.setattr(gpu_table, "_figures", figures)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    found = gpu_table.run(tmp_path / "table.json")

    assert [figure.value for figure in found] == [2.5, 0.4]
    shown = capsys.readouterr().out
    assert "decode step, batch 1: 2.500 ms 400 tok/s" in shown
    assert "a card" in shown
    written = json.loads((tmp_path / "table.json").read_text())
    assert (written["gpu"], written["torch"]) == ("a card", torch.__version__)
    assert [row["floor"] for row in written["figures"]] == [1.3, None]


def test_mixed_ranks_have_the_mean_of_the_uniform_ones() -> None:
    assert sum(MIXED_RANKS) == RANK * len(MIXED_RANKS)
    assert (min(MIXED_RANKS), max(MIXED_RANKS)) == (8, 64)
