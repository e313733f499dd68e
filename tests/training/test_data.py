"""The data report, what it refuses, and a split without overlap."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import MakeConfig, dataset_of
from training.data import Dataset, split
from training.render import Example
from training.rows import Row


def write(path: Path, rows: list[Row | str]) -> Path:
    """As JSONL; a string is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def said(dataset: Dataset, number: int = 0) -> dict[str, str]:
    return dict(dataset.reports[number].lines())


def test_the_report_counts_what_was_kept_and_why_the_rest_was_not(
    make: MakeConfig, tokenizer: Any, tmp_path: Path
) -> None:
    rows: list[Row | str] = [
        {"text": "one two three"},
        "{",
        {"text": ""},
        {"text": "one two three"},
        {"text": "four"},
        "{",
    ]
    dataset = dataset_of(make(data=write(tmp_path / "a.jsonl", rows), eval_fraction=0), tokenizer)
    lengths = [len(example.ids) for example in dataset.training]
    assert said(dataset) == {
        "rows": "6 read, 3 kept",
        "lengths": f"{min(lengths)} to {max(lengths)} tokens, median {lengths[0]}, "
        f"95 % within {max(lengths)}",
        "tokens": f"{sum(lengths)}, of which {sum(lengths) - 3} are learned",
        "cut at max_length": "0",
        "duplicates": "1",
        "end of turn learned": "in 3 of 3",
        "refused: not JSON": "2, first in row 2",
        "refused: text missing or empty": "1, first in row 3",
    }


def test_rows_past_the_length_are_cut_or_dropped(
    make: MakeConfig, tokenizer: Any, tmp_path: Path
) -> None:
    rows: list[Row | str] = [{"text": "word " * 50}, {"text": "short"}]
    data = write(tmp_path / "a.jsonl", rows)
    cut = dataset_of(make(data=data, max_length=16, eval_fraction=0), tokenizer)
    assert [len(example.ids) for example in cut.training] == [16, 2]
    assert said(cut)["cut at max_length"] == "1"
    assert said(cut)["end of turn learned"] == "in 1 of 2"
    warnings = " ".join(cut.warnings())
    assert "1 of 2 rows" in warnings
    assert "teach no end of turn" in warnings
    assert "1 rows are cut" in warnings
    assert "nothing is held out" in warnings
    dropped = dataset_of(
        make(data=data, max_length=16, too_long="drop", eval_fraction=0), tokenizer
    )
    assert [len(example.ids) for example in dropped.training] == [2]
    assert said(dropped)["refused: over max_length"] == "1, first in row 1"


def test_rows_with_nothing_to_learn_are_refused_and_past_5_percent_an_error(
    make: MakeConfig, tokenizer: Any, tmp_path: Path
) -> None:
    empty: Row = {"prompt": "word " * 40, "completion": "x"}
    full: Row = {"prompt": "a", "completion": "b"}
    data = write(tmp_path / "a.jsonl", [empty, *[full] * 19])
    dataset = dataset_of(make(data=data, max_length=16, eval_fraction=0), tokenizer)
    assert said(dataset)["refused: nothing to learn in it"] == "1, first in row 1"
    assert len(dataset.training) == 19
    unanswered: Row = {"prompt": "a", "completion": ""}
    data = write(tmp_path / "c.jsonl", [*[full] * 18, empty, unanswered])
    with pytest.raises(
        ValueError, match=r"2 of 20 .* or are answers missing\? Refused: nothing to"
    ):
        dataset_of(make(data=data, max_length=16), tokenizer)
    data = write(tmp_path / "b.jsonl", [empty, *[full] * 18])
    with pytest.raises(ValueError, match=r"1 of 19 rows .* over 5%: is max_length \(16\)"):
        dataset_of(make(data=data, max_length=16), tokenizer)


def test_a_file_without_any_good_row_is_an_error_with_its_reasons(
    make: MakeConfig, tokenizer: Any, tmp_path: Path
) -> None:
    data = write(tmp_path / "a.jsonl", ["{", '{"x": 1}'])
    with pytest.raises(ValueError, match="can be learned from: not JSON, no field of any"):
        dataset_of(make(data=data), tokenizer)
    with pytest.raises(ValueError, match="it is empty"):
        dataset_of(make(data=write(tmp_path / "b.jsonl", [])), tokenizer)


def test_rows_that_evaluation_holds_are_left_out_of_training(
    make: MakeConfig, tokenizer: Any, tmp_path: Path
) -> None:
    rows: list[Row | str] = [{"text": text} for text in ("a", "b", "c", "b")]
    data = write(tmp_path / "a.jsonl", rows)
    held = write(tmp_path / "b.jsonl", [{"text": "b"}, {"text": "d"}])
    dataset = dataset_of(make(data=data, eval_data=held), tokenizer)
    texts = [tokenizer.decode(example.ids[:-1]) for example in dataset.training]
    assert texts == ["a", "c"]
    assert dataset.num_overlapping == 2
    assert len(dataset.evaluation) == 2
    assert said(dataset, 1)["rows"] == "2 read, 2 kept"
    assert dataset.warnings() == []
    with pytest.raises(ValueError, match="every row of"):
        dataset_of(make(data=data, eval_data=data), tokenizer)


def examples(texts: str) -> list[Example]:
    return [Example((ord(text), 2), (True, True), True) for text in texts]


def test_equal_rows_stay_on_one_side_of_the_split() -> None:
    rows = examples("abcabcabcdefgh")
    for seed in range(20):
        training, held = split(rows, 0.3, seed)
        assert not set(training) & set(held)
        assert len(training) + len(held) == len(rows)
        assert 1 <= len(held) <= 4


def test_rows_that_all_have_equals_are_held_out_too() -> None:
    rows = [Example((i, i), (False, True), ends_turn=True) for i in range(4) for _ in range(3)]
    training, held = split(rows, 0.05, 0)
    assert (len(training), len(held)) == (9, 3)
    assert not set(training) & set(held)
    assert split(rows, 0.0, 0) == (rows, [])
    assert split(rows[:3], 0.05, 0) == (rows[:3], [])  # one row, however often


def test_patience_without_a_row_to_hold_out_is_refused(
    make: MakeConfig, tokenizer: Any, tmp_path: Path
) -> None:
    data = write(tmp_path / "a.jsonl", [{"text": "a b"}, {"text": "a b"}])
    with pytest.raises(ValueError, match=r"patience is 2, but .*a\.jsonl has too few different"):
        dataset_of(make(data=data, patience=2), tokenizer)
    assert dataset_of(make(data=data), tokenizer).evaluation == ()


def test_the_split_is_set_by_its_seed() -> None:
    rows = examples("abcdefghijklmnop")
    assert split(rows, 0.25, 1) == split(rows, 0.25, 1)
    assert split(rows, 0.25, 1) != split(rows, 0.25, 2)
    assert len(split(rows, 0.25, 1)[1]) == 4


def test_a_small_file_still_holds_one_row_out_and_keeps_one() -> None:
    assert [len(side) for side in split(examples("ab"), 0.05, 0)] == [1, 1]
    assert [len(side) for side in split(examples("aa"), 0.5, 0)] == [2, 0]
    assert [len(side) for side in split(examples("ab"), 0.0, 0)] == [2, 0]


def test_the_fingerprint_follows_the_tokens_and_the_masks(make: MakeConfig, tokenizer: Any) -> None:
    prints = {
        dataset_of(make(**settings), tokenizer).fingerprint
        for settings in ({}, {"loss": "all"}, {"system": "Be brief."}, {"seed": 1})
    }
    assert len(prints) == 4
    assert dataset_of(make(rank=8), tokenizer).fingerprint in prints
