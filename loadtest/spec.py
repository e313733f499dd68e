"""Targets, headers and ranges as they are typed."""

from collections.abc import Iterable

import msgspec

from loadtest.target import Target

_KEYS = ("name", "model", "url", "header", "path", "key")


def parse_headers(typed: Iterable[str]) -> dict[str, str]:
    """NAME:VALUE, each; names come out in lower case."""
    headers = {}
    for text in typed:
        name, colon, value = text.partition(":")
        if not colon or not name.strip() or any(c in text for c in "\r\n"):
            raise ValueError(f"--header is {text!r}; it must be NAME:VALUE")
        headers[name.strip().lower()] = value.strip()
    return headers


def parse_pairs(typed: Iterable[str], option: str) -> dict[str, str]:
    """NAME=VALUE, each."""
    pairs = {}
    for text in typed:
        name, sign, value = text.partition("=")
        if not sign or not name:
            raise ValueError(f"{option} is {text!r}; it must be NAME=VALUE")
        pairs[name] = value
    return pairs


def parse_range(typed: str) -> tuple[int, int]:
    """FROM:TO, two numbers."""
    low, _, high = typed.partition(":")
    if not (low.isdigit() and high.isdigit()):
        raise ValueError(f"--token-ids is {typed!r}; it must be FROM:TO, say 300:4000")
    return int(low), int(high)


def parse_target(spec: str, default: Target, name: str) -> tuple[str, Target]:
    """One side of a comparison: `default` with what the spec changes, and its name.

    The spec is KEY=VALUE with commas between; keys are name, model, url, header (NAME:VALUE,
    repeatable), path (what x-serving-path must say) and key (an API key).
    """
    changed: dict[str, object] = {}
    headers = dict(default.headers)
    for part in filter(None, spec.split(",")):
        key, sign, value = part.partition("=")
        if not sign or key not in _KEYS:
            raise ValueError(f"{part!r} is no part of a target; it must be KEY=VALUE, KEY among "
                             f"{', '.join(_KEYS)}")  # fmt: skip
        if key == "name":
            name = value
        elif key == "header":
            headers |= parse_headers([value])
        else:
            changed[{"path": "expect_path", "key": "api_key"}.get(key, key)] = value
    return name, msgspec.structs.replace(default, headers=headers, **changed)
