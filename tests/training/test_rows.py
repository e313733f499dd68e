"""Rows of every format, out of every kind of file."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from training.rows import Chat, NoLabel, Row, RowRefused, Text, read_rows, to_document

ROW = {"instruction": "Add.", "input": "1 + 1", "output": "2"}


def written(path: Path, text: str) -> list[Row | str]:
    """Write a file and read its rows; what is refused as its reason."""
    path.write_text(text, encoding="utf-8")
    return [str(row) if isinstance(row, RowRefused) else row for row in read_rows(path)]


def chat(*turns: tuple[str, str]) -> Chat:
    return Chat(tuple({"role": role, "content": content} for role, content in turns))


def test_instruction_and_input_make_one_question() -> None:
    assert to_document(ROW, "auto", None) == chat(("user", "Add.\n\n1 + 1"), ("assistant", "2"))
    plain = to_document({**ROW, "input": ""}, "auto", None)
    assert plain == chat(("user", "Add."), ("assistant", "2"))


def test_a_system_prompt_goes_before_chats_that_have_none() -> None:
    with_own = {"messages": [*chat(("system", "A"), ("user", "B"), ("assistant", "C")).messages]}
    assert to_document(ROW, "instruction", "Be brief.") == chat(
        ("system", "Be brief."), ("user", "Add.\n\n1 + 1"), ("assistant", "2")
    )
    assert to_document(with_own, "chat", "Be brief.") == Chat(tuple(with_own["messages"]))


def test_prompt_and_completion_are_plain_text_or_messages() -> None:
    assert to_document({"prompt": "a", "completion": "b"}, "auto", None) == Text("a", "b")
    turns = [{"role": "user", "content": "a"}]
    expected = chat(("user", "a"), ("assistant", "b"))
    assert to_document({"prompt": turns, "completion": "b"}, "auto", None) == expected
    reply = [{"role": "assistant", "content": "b"}]
    assert to_document({"prompt": turns, "completion": reply}, "auto", None) == expected


def test_text_is_learned_whole() -> None:
    assert to_document({"text": "abc", "id": 3}, "auto", None) == Text("", "abc")


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({"a": 1}, "auto", "no field of any known format"),
        ({"instruction": "x", "output": ""}, "auto", "output missing or empty"),
        ({"output": "x"}, "instruction", "instruction missing or empty"),
        ({"text": 3}, "auto", "text is not a text"),
        ({"messages": "hi"}, "auto", "messages is not a list of messages"),
        ({"messages": [{"role": "user", "content": "x"}]}, "auto", "no message of the assistant"),
        ({"messages": [{"role": "assistant", "content": " "}]}, "auto", "or an empty one"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "auto", "role 'tool' is not among"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "auto", "content is not a text"),
        ({"prompt": [], "completion": "x"}, "prompt", None),
        ({"prompt": [{"role": "user", "content": "x"}], "completion": 3}, "prompt", "neither"),
    ],
)
def test_a_row_that_says_nothing_is_refused_with_a_reason(
    row: Row, kind: str, reason: str | None
) -> None:
    if reason is None:  # a reply alone is a conversation
        assert to_document(row, kind, None) == chat(("assistant", "x"))
        return
    with pytest.raises(RowRefused, match=reason):
        to_document(row, kind, None)


def test_jsonl_skips_blank_lines_and_refuses_bad_ones(tmp_path: Path) -> None:
    text = '\ufeff{"text": "a"}\n\n{"text": \n[1]\n{"text": "b"}\n'
    found = written(tmp_path / "a.jsonl", text)
    assert found == [{"text": "a"}, "not JSON", "not a JSON object", {"text": "b"}]


def test_json_is_a_list_or_one_inside_an_object(tmp_path: Path) -> None:
    assert written(tmp_path / "a.json", '[{"text": "a"}, 3]') == [
        {"text": "a"},
        "not a JSON object",
    ]
    assert written(tmp_path / "a.json", '{"data": [{"text": "a"}]}') == [{"text": "a"}]
    for text, complaint in (("{", "is not JSON"), ('{"a": 1, "b": 2}', "must hold a list")):
        with pytest.raises(ValueError, match=complaint):
            written(tmp_path / "a.json", text)


def test_csv_takes_quoted_lines_and_messages_as_json(tmp_path: Path) -> None:
    text = 'instruction,output\n"Say\nit","a, b"\nx,y,z\n'
    assert written(tmp_path / "a.csv", text) == [
        {"instruction": "Say\nit", "output": "a, b"},
        "more cells than the header has",
    ]
    messages = [{"role": "user", "content": 'a "b"'}, {"role": "assistant", "content": "c"}]
    cell = json.dumps(messages).replace('"', '""')
    text = f'messages\n"{cell}"\nnonsense\n'
    assert written(tmp_path / "b.csv", text) == [{"messages": messages}, "not JSON"]


@pytest.mark.parametrize("name", ["a.txt", "a", "a.json.gz"])
def test_a_file_of_another_kind_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(ValueError, match=r"ends in none of \.jsonl, \.json, \.csv, \.parquet"):
        read_rows(tmp_path / name)


def test_a_file_that_is_not_there_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not there"):
        read_rows(tmp_path / "none.jsonl")


def test_without_its_library_a_format_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "datasets", None)
    (tmp_path / "a.parquet").write_text("x")
    with pytest.raises(ValueError, match="needs pyarrow: pip install pyarrow"):
        list(read_rows(tmp_path / "a.parquet"))
    with pytest.raises(ValueError, match="needs datasets: pip install datasets"):
        list(read_rows(tmp_path))


def test_parquet_and_datasets_folders_come_through_their_libraries(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"text": "a"}, {"text": "b"}]

    class Table:
        def to_pylist(self) -> list[Row]:
            return rows

    def module(name: str, **functions: Any) -> None:
        fake = ModuleType(name)
        fake.__dict__.update(functions)
        monkeypatch.setitem(sys.modules, name, fake)

    module("pyarrow")
    module("pyarrow.parquet", read_table=lambda path: Table())
    (tmp_path / "a.parquet").write_text("x")
    assert list(read_rows(tmp_path / "a.parquet")) == rows
    for name, loader in (("state.json", "load_from_disk"), ("a.csv", "load_dataset")):
        folder = tmp_path / name.partition(".")[0]
        folder.mkdir()
        (folder / name).write_text("x")
        module("datasets", **{loader: lambda path: {"train": rows, "test": []}})
        assert list(read_rows(folder)) == rows
        module("datasets", **{loader: lambda path: rows})
        assert list(read_rows(folder)) == rows
        module("datasets", **{loader: lambda path: {"a": rows, "b": rows}})
        with pytest.raises(ValueError, match="holds the splits a, b"):
            list(read_rows(folder))


def test_real_parquet_files_and_datasets_folders_are_read(tmp_path: Path) -> None:
    datasets: Any = pytest.importorskip("datasets")
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "c", "output": "d"}]
    found = datasets.Dataset.from_list(rows)
    found.to_parquet(tmp_path / "a.parquet")
    assert list(read_rows(tmp_path / "a.parquet")) == rows
    found.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": found, "test": found}).save_to_disk(tmp_path / "two")
    (tmp_path / "three" / "data").mkdir(parents=True)
    found.to_parquet(tmp_path / "three" / "data" / "train-00000-of-00001.parquet")
    for name in ("one", "two", "three"):
        assert list(read_rows(tmp_path / name)) == rows


def test_questions_without_an_answer_are_told_from_other_refusals() -> None:
    unanswered: list[Row] = [
        {"instruction": "x", "output": ""},
        {"prompt": "x", "completion": None},
        {"messages": [{"role": "user", "content": "x"}]},
    ]
    for row in unanswered:
        with pytest.raises(NoLabel):
            to_document(row, "auto", None)
    others: list[Row] = [{"instruction": "", "output": "x"}, {"text": ""}, {"a": 1}]
    for row in others:
        with pytest.raises(RowRefused) as refused:
            to_document(row, "auto", None)
        assert not isinstance(refused.value, NoLabel)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json"])
def test_a_file_of_another_encoding_is_named(tmp_path: Path, name: str) -> None:
    content = {"a.jsonl": '{"text": "é"}', "a.csv": "text\né\n", "a.json": '[{"text": "é"}]'}
    (tmp_path / name).write_text(content[name], encoding="latin-1")
    with pytest.raises(ValueError, match=rf"{name} is not (UTF-8|JSON): 'utf-8' codec"):
        list(read_rows(tmp_path / name))


def test_a_cell_may_be_longer_than_pythons_own_limit(tmp_path: Path) -> None:
    text = "long " * 40_000
    assert written(tmp_path / "a.csv", f'text\n"{text}"\n') == [{"text": text}]


def test_a_quote_that_is_never_closed_swallows_no_rows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.csv is not CSV after line 2: unexpected end of data"):
        written(tmp_path / "a.csv", 'text\none\n"two\nthree\n')


def test_json_nested_without_end_is_one_bad_row(tmp_path: Path) -> None:
    deep = "[" * 100_000
    rows = written(tmp_path / "a.jsonl", f'{{"text": {deep}\n{{"text": "a"}}\n')
    assert rows == ["not JSON", {"text": "a"}]
    with pytest.raises(ValueError, match=r"a\.json is not JSON"):
        written(tmp_path / "a.json", deep)


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a \ud83d"},
        {"instruction": "\ude00", "output": "b"},
        {"messages": [{"role": "assistant", "content": "\ud83d b"}]},
    ],
)
def test_half_a_character_is_refused_and_a_whole_one_is_not(row: Row) -> None:
    with pytest.raises(RowRefused, match="holds half a character"):
        to_document(row, "auto", None)
    assert to_document({"text": "\U0001f600"}, "auto", None) == Text("", "\U0001f600")
