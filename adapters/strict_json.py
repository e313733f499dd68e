"""Decode JSON that a stranger wrote."""

import json
from typing import Any

from adapters.manifest import AdapterRefused, show


def parse_json_object(text: bytes, file: str) -> dict[str, Any]:
    """Decode one JSON object that has no key twice and no NaN; `file` names it in refusals."""
    try:
        value = json.loads(
            text.decode("utf-8"), object_pairs_hook=_no_duplicates, parse_constant=_no_constant
        )
        if b"\\u" in text:
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # fails on half a surrogate pair
    except RecursionError:
        raise AdapterRefused(file, "is nested too deeply") from None
    except ValueError as error:  # not UTF-8, not JSON, a key twice, a number of 5,000 digits
        raise AdapterRefused(file, f"is not valid JSON: {show(str(error))}") from None
    if not isinstance(value, dict):
        raise AdapterRefused(file, "is not a JSON object")
    return value


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # set.add is None, which is the point
        raise ValueError(f"key {show(twice)} occurs twice")
    return result


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number")
