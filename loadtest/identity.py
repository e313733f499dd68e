"""Checks on every reply that the adapter which answered is the one that was asked for."""

import contextlib
import urllib.parse
from collections.abc import Iterable, Sequence
from typing import Any, Self

import httpx
import msgspec

from loadtest.record import Record
from loadtest.target import Target

_TIMEOUT_S = 30.0
# Of a route that is not there, or answers what another server means by it.
_NO_ANSWER = (httpx.HTTPError, KeyError, TypeError, ValueError)


class IdentityCounts(msgspec.Struct):
    """Replies whose adapter digest was compared."""

    num_checked: int = 0
    num_mismatched: int = 0
    num_unknown: int = 0  # the reply names no digest, and none was expected
    source: str = (
        "first reply"  # whence the expected digests are: server's registry, or first reply
    )


class IdentityCheck:
    """Holds each reply to its model's digest, and to the path that was asked for.

    Where the server's registry could not be read, a model's first digest must stay.
    """

    def __init__(self, target: Target, expected: dict[str, str]) -> None:
        self.counts = IdentityCounts(source="registry" if expected else "first reply")
        self._target = target
        self._expected = dict(expected)

    @classmethod
    def of(cls, target: Target, models: Iterable[str]) -> Self:
        """Expect what the server's registry says."""
        asked = [target.model] if target.model else models
        return cls(target, expected_digests(target, asked))

    def check(self, record: Record, model: str) -> None:
        """Turn an ok record into a wrong one if someone else has answered."""
        if not record.is_ok:
            return
        why = self._mismatch(record, model)
        if why is None and self._target.expect_path not in (None, record.path):
            why = f"path {record.path}, not {self._target.expect_path}"
        if why is not None:
            record.outcome, record.reason = "wrong", why

    def _mismatch(self, record: Record, model: str) -> str | None:
        if record.digest is None and model not in self._expected:
            self.counts.num_unknown += 1
            return None
        self.counts.num_checked += 1
        expected = self._expected.setdefault(model, record.digest or "")
        named = (record.adapter_id or model).partition("@")[0]
        if record.digest == expected and named == model.partition("@")[0]:
            return None
        self.counts.num_mismatched += 1
        return "digest" if record.digest is not None else "no_digest"


def expected_digests(target: Target, models: Iterable[str]) -> dict[str, str]:
    """Each adapter's digest as the server's registry has it; empty where there is none to read."""
    try:
        with _client(target) as client:
            return _expected(client, models)
    except _NO_ANSWER:
        return {}


def _expected(client: httpx.Client, models: Iterable[str]) -> dict[str, str]:
    cards = _data(client, "/v1/adapters")
    current = {card["name"]: card["current"] for card in cards if card.get("current")}
    expected = {}
    for model in models:
        name, _, revision = model.partition("@")
        if revision and name in current:
            if digest := _digest_of(client, name, revision):
                expected[model] = digest
        elif name in current:
            expected[model] = str(current[name]["digest"])
    return expected


def listed_models(target: Target) -> list[str]:
    """The adapters that /v1/models lists, or all it lists where none says that it is one.

    Raises ValueError where the server does not answer that.
    """
    try:
        with _client(target) as client:
            cards = _data(client, "/v1/models")
        adapters = [str(card["id"]) for card in cards if card.get("parent")]
        found = adapters or [str(card["id"]) for card in cards]
    except _NO_ANSWER as error:
        raise ValueError(f"{target.root}/v1/models does not answer: {error}") from None
    if not found:
        raise ValueError(f"{target.root} lists no model; name one with --model")
    return found


def server_facts(target: Target) -> dict[str, str]:
    """What the server says of itself at /version, flattened; empty where it says nothing."""
    with contextlib.suppress(httpx.HTTPError, ValueError), _client(target) as client:
        said = client.get("/version")
        if said.is_success and isinstance(facts := said.json(), dict):
            return {str(name): str(value) for name, value in facts.items()}
    return {}


def _client(target: Target) -> httpx.Client:
    return httpx.Client(
        base_url=target.root,
        headers=target.headers_of(""),
        timeout=_TIMEOUT_S,
        trust_env=False,
    )


def _data(client: httpx.Client, path: str) -> Sequence[dict[str, Any]]:
    reply = client.get(path)
    reply.raise_for_status()
    cards = reply.json()["data"]
    if not all(isinstance(card, dict) for card in cards):
        raise TypeError("data holds no objects")
    return list(cards)


def _digest_of(client: httpx.Client, name: str, revision: str) -> str | None:
    """A revision's digest; None where the adapter has none of that number."""
    cards = _data(client, f"/v1/adapters/{urllib.parse.quote(name, safe='')}/revisions")
    return next((str(card["digest"]) for card in cards if str(card["revision"]) == revision), None)
