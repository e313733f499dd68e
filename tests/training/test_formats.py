"""The same conversation, whatever row and file it comes in."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.conftest import MakeConfig, dataset_of
from training.rows import Row

QUESTION, REPLY = 'What is "x",\nin short?', "Sieben é 7"
MESSAGES = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": REPLY}]
ROWS: dict[str, Row] = {
    "instruction": {"instruction": QUESTION, "input": "", "output": REPLY},
    "chat": {"messages": MESSAGES},
    "prompt": {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]},
}


def as_jsonl(path: Path, row: Row) -> Path:
    path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return path


def as_json(path: Path, row: Row) -> Path:
    path.write_text(json.dumps({"rows": [row]}, ensure_ascii=False), encoding="utf-8")
    return path


def as_csv(path: Path, row: Row) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        writer.writeheader()
        cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
        writer.writerow(cells)
    return path


def example_of(config: Any, tokenizer: Any) -> Any:
    (example,) = dataset_of(config, tokenizer).training
    return example


@pytest.fixture
def expected(make: MakeConfig, tokenizer: Any, tmp_path: Path) -> Any:
    data = as_jsonl(tmp_path / "expected.jsonl", ROWS["chat"])
    return example_of(make(data=data, eval_fraction=0), tokenizer)


@pytest.mark.parametrize("kind", sorted(ROWS))
@pytest.mark.parametrize("is_named", [False, True])
def test_every_format_renders_to_the_same_tokens_and_mask(
    make: MakeConfig, tokenizer: Any, tmp_path: Path, expected: Any, kind: str, is_named: bool
) -> None:
    data = as_jsonl(tmp_path / "a.jsonl", ROWS[kind])
    config = make(data=data, eval_fraction=0, format=kind if is_named else "auto")
    assert example_of(config, tokenizer) == expected
    learned = [i for i, yes in zip(expected.ids, expected.is_learned, strict=True) if yes]
    assert tokenizer.decode(learned) == f"{REPLY}<|im_end|>"


@pytest.mark.parametrize(
    ("write", "name", "kind"),
    [
        (as_json, "a.json", "chat"),
        (as_json, "a.json", "instruction"),
        (as_csv, "a.csv", "chat"),
        (as_csv, "a.csv", "instruction"),
    ],
)
def test_every_file_gives_the_same_tokens_and_mask(
    make: MakeConfig,
    tokenizer: Any,
    tmp_path: Path,
    expected: Any,
    write: Callable[[Path, Row], Path],
    name: str,
    kind: str,
) -> None:
    data = write(tmp_path / name, ROWS[kind])
    assert example_of(make(data=data, eval_fraction=0), tokenizer) == expected


def test_formats_may_be_mixed_in_one_file(make: MakeConfig, tokenizer: Any, tmp_path: Path) -> None:
    data = tmp_path / "a.jsonl"
    rows = [*ROWS.values(), {"text": "plain"}, {"prompt": "a", "completion": "b"}]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    dataset = dataset_of(make(data=data, eval_fraction=0), tokenizer)
    assert len(dataset.training) == 5
    assert dataset.reports[0].num_duplicates == 2
    assert len(set(dataset.training)) == 3


def test_a_named_format_refuses_rows_of_another(
    make: MakeConfig, tokenizer: Any, tmp_path: Path
) -> None:
    data = tmp_path / "a.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS.values()))
    dataset = dataset_of(make(data=data, eval_fraction=0, format="chat"), tokenizer)
    assert len(dataset.training) == 1
    assert dict(dataset.reports[0].lines())["refused: messages missing or empty"] == (
        "2, first in row 1"
    )


def test_the_system_prompt_is_in_every_chat_and_never_learned(
    make: MakeConfig, tokenizer: Any, tmp_path: Path, expected: Any
) -> None:
    data = as_jsonl(tmp_path / "a.jsonl", ROWS["instruction"])
    example = example_of(make(data=data, eval_fraction=0, system="Be brief."), tokenizer)
    text = tokenizer.decode(example.ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n")
    assert example.num_learned == expected.num_learned
