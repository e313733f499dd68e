"""Rows of training data, out of whatever file holds them."""

import csv
import importlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
ROLES = ("system", "user", "assistant")
_MAX_CELL = 2**31 - 1  # characters of a CSV's cell; Python's own limit is 131,072
_FIELDS = {
    "chat": ("messages",),
    "instruction": ("instruction", "output"),
    "prompt": ("prompt", "completion"),
    "text": ("text",),
}


class RowRefused(ValueError):
    """This row cannot be learned from; the run goes on without it."""


class NoLabel(RowRefused):
    """It holds a question, and nothing to be learned as the answer."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A conversation, to be rendered with the base's template."""

    messages: tuple[dict[str, str], ...]


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text; `prompt` is read and `completion` is learned."""

    prompt: str
    completion: str


def read_rows(path: Path) -> Iterator[Row | RowRefused]:
    """Yield each row of a file or a datasets folder, or why it is none.

    Raises ValueError where the file as a whole cannot be read.
    """
    if not path.exists():
        raise ValueError(f"the data {path} is not there")
    if path.is_dir():
        return iter(_datasets_folder(path))
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}
    if path.suffix not in readers:
        raise ValueError(f"{path} ends in none of {', '.join(readers)}")
    return _decoded(path, readers[path.suffix](path))


def _decoded(path: Path, rows: Iterator[Row | RowRefused]) -> Iterator[Row | RowRefused]:
    try:
        yield from rows
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None


def to_document(row: Row, kind: str, system: str | None) -> Chat | Text:
    """Make sense of one row. `kind` is the config's format. Raises RowRefused."""
    if kind == "auto":
        kind = _kind(row)
    missing = [field for field in _FIELDS[kind] if row.get(field) in (None, "")]
    if missing:
        kind_of_refusal = NoLabel if missing in (["output"], ["completion"]) else RowRefused
        raise kind_of_refusal(f"{' and '.join(missing)} missing or empty")
    if kind == "chat":
        return Chat(_messages(row["messages"], system))
    if kind == "instruction":
        parts = [_text(row, "instruction"), _text(row, "input") if row.get("input") else ""]
        turns = [_turn("user", "\n\n".join(part for part in parts if part))]
        return Chat(_messages([*turns, _turn("assistant", _text(row, "output"))], system))
    if kind == "prompt" and isinstance(row["prompt"], list):
        completion = row["completion"]
        if isinstance(completion, str):
            completion = [_turn("assistant", completion)]
        if not isinstance(completion, list):
            raise RowRefused("completion is neither a text nor a list of messages")
        return Chat(_messages([*row["prompt"], *completion], system))
    if kind == "prompt":
        return Text(_text(row, "prompt"), _text(row, "completion"))
    return Text("", _text(row, "text"))


def _kind(row: Row) -> str:
    for kind, fields in _FIELDS.items():
        if all(field in row for field in fields):
            return kind
    raise RowRefused("no field of any known format")


def _text(row: Row, field: str) -> str:
    return _checked(row[field], field)


def _checked(value: Any, what: str) -> str:
    """A text that can be tokenized and written down again."""
    if not isinstance(value, str):
        raise RowRefused(f"{what} is not a text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise RowRefused(f"{what} holds half a character (a surrogate without the other)") from None
    return value


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _messages(turns: Any, system: str | None) -> tuple[dict[str, str], ...]:
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise RowRefused("messages is not a list of messages")
    for turn in turns:
        if turn.get("role") not in ROLES:
            raise RowRefused(f"role {str(turn.get('role'))[:20]!r} is not among {', '.join(ROLES)}")
        _checked(turn.get("content"), "a message's content")
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in turns):
        raise NoLabel("no message of the assistant, or an empty one")
    known = [_turn(turn["role"], turn["content"]) for turn in turns]
    if system is not None and known[0]["role"] != "system":
        known.insert(0, _turn("system", system))
    return tuple(known)


def _jsonl(path: Path) -> Iterator[Row | RowRefused]:
    with path.open(encoding="utf-8-sig") as file:
        for line in file:
            if line.strip():
                yield _parsed(line)


def _parsed(line: str) -> Row | RowRefused:
    try:
        return _object(json.loads(line))
    except (ValueError, RecursionError):
        return RowRefused("not JSON")


def _object(value: Any) -> Row | RowRefused:
    return value if isinstance(value, dict) else RowRefused("not a JSON object")


def _json(path: Path) -> Iterator[Row | RowRefused]:
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if isinstance(found, dict) and len(found) == 1:  # {"data": [...]}
        (found,) = found.values()
    if not isinstance(found, list):
        raise ValueError(f"{path} must hold a list of rows")
    yield from map(_object, found)


def _csv(path: Path) -> Iterator[Row | RowRefused]:
    csv.field_size_limit(_MAX_CELL)
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)  # or an open quote would swallow what follows
        try:
            for row in reader:
                yield _csv_row(row)
        except csv.Error as error:
            raise ValueError(f"{path} is not CSV after line {reader.line_num}: {error}") from None


def _csv_row(row: dict[Any, Any]) -> Row | RowRefused:
    if None in row:
        return RowRefused("more cells than the header has")
    if not isinstance(row.get("messages"), str):
        return row
    messages = _parsed(f'{{"messages": {row["messages"]}}}')  # a cell holds no list: JSON in it may
    return messages if isinstance(messages, RowRefused) else {**row, **messages}


def _parquet(path: Path) -> Iterator[Row | RowRefused]:
    yield from _optional("pyarrow.parquet", path).read_table(path).to_pylist()


def _datasets_folder(path: Path) -> Iterator[Row | RowRefused]:
    """What `save_to_disk` wrote, or a copy of a repository of data files."""
    datasets = _optional("datasets", path)
    is_saved = any((path / name).is_file() for name in ("state.json", "dataset_dict.json"))
    found = datasets.load_from_disk(str(path)) if is_saved else datasets.load_dataset(str(path))
    if hasattr(found, "keys"):  # one of several splits
        if "train" not in found:
            raise ValueError(f"{path} holds the splits {', '.join(found)}; name the file of one")
        found = found["train"]
    for row in found:
        yield dict(row)


def _optional(module: str, path: Path) -> Any:
    """A library that Turnout does without."""
    try:
        return importlib.import_module(module)
    except ImportError:
        name = module.split(".")[0]
        raise ValueError(
            f"to read {path} needs {name}: pip install {name}, or hand in JSONL"
        ) from None
