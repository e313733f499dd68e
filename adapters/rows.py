"""The registry's rows in SQLite, durable at each commit."""

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from adapters.catalog import Entry, Revision, Usage
from adapters.rope import RopeScaling

_VERSION = 3
_SCHEMA = f"""
BEGIN IMMEDIATE;
CREATE TABLE adapters (
    name TEXT PRIMARY KEY,
    created REAL NOT NULL,
    pinned INTEGER NOT NULL DEFAULT 0,
    last_deleted INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE revisions (
    name TEXT NOT NULL REFERENCES adapters ON DELETE CASCADE,
    number INTEGER NOT NULL,
    digest TEXT NOT NULL,
    created REAL NOT NULL,
    max_rank INTEGER NOT NULL,
    num_rank_rows INTEGER NOT NULL,
    num_parameters INTEGER NOT NULL,
    num_bytes INTEGER NOT NULL,
    chat_template TEXT,
    base_digest TEXT NOT NULL,
    base_fingerprint TEXT NOT NULL,
    source TEXT NOT NULL,
    rope TEXT,
    PRIMARY KEY (name, number),
    UNIQUE (name, digest)
);
CREATE INDEX revisions_by_digest ON revisions (digest);
CREATE TABLE publications (
    name TEXT NOT NULL REFERENCES adapters ON DELETE CASCADE,
    position INTEGER NOT NULL,
    number INTEGER NOT NULL,
    PRIMARY KEY (name, position),
    FOREIGN KEY (name, number) REFERENCES revisions (name, number)
);
CREATE TABLE idempotency_keys (
    key TEXT PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    name TEXT NOT NULL,
    number INTEGER NOT NULL,
    created REAL NOT NULL,
    FOREIGN KEY (name, number) REFERENCES revisions (name, number) ON DELETE CASCADE
);
CREATE TABLE usage (
    digest TEXT PRIMARY KEY,
    tokens INTEGER NOT NULL,
    recent REAL NOT NULL DEFAULT 0,
    as_of REAL NOT NULL DEFAULT 0
);
PRAGMA user_version = {_VERSION};
COMMIT;
"""
_FROM_1 = """
BEGIN IMMEDIATE;
ALTER TABLE revisions ADD COLUMN rope TEXT;
ALTER TABLE usage ADD COLUMN recent REAL NOT NULL DEFAULT 0;
ALTER TABLE usage ADD COLUMN as_of REAL NOT NULL DEFAULT 0;
PRAGMA user_version = 2;
COMMIT;
"""
_FROM_2 = """
BEGIN IMMEDIATE;
ALTER TABLE adapters ADD COLUMN last_deleted INTEGER NOT NULL DEFAULT 0;
PRAGMA user_version = 3;
COMMIT;
"""
_STEPS = {0: (_SCHEMA,), 1: (_FROM_1, _FROM_2), 2: (_FROM_2,), _VERSION: ()}


class Rows:
    """Owns the database. Not for two threads at once: the registry's writer lock sees to that."""

    def __init__(self, path: Path) -> None:
        """Open the database, made or brought to this version if needed. Raises ValueError."""
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._prepare(path)
        except BaseException as error:
            self._db.close()
            if isinstance(error, sqlite3.Error):
                raise ValueError(f"{path} cannot be opened: {error}") from error
            raise

    def _prepare(self, path: Path) -> None:
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute("PRAGMA foreign_keys = ON")
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version not in _STEPS:
            raise ValueError(f"{path} has version {version}; this Turnout reads {_VERSION}")
        for step in _STEPS[version]:
            self._db.executescript(step)

    def close(self) -> None:
        """Fold the log into the database and close it."""
        self._db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit everything inside, or nothing."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def adapters(self) -> list[Entry]:
        """Every name, with neither revisions nor publications yet."""
        rows = self._db.execute(
            "SELECT name, created, pinned, last_deleted FROM adapters ORDER BY name"
        )
        return [
            Entry(name=name, created=created, pinned=bool(pinned), last_deleted=last_deleted)
            for name, created, pinned, last_deleted in rows
        ]

    def revisions(self) -> list[Revision]:
        """Every revision, oldest first within a name."""
        cursor = self._db.execute("SELECT * FROM revisions ORDER BY name, number")
        columns = [column[0] for column in cursor.description]
        found = []
        for row in cursor:
            fields = dict(zip(columns, row, strict=True))
            fields["source"] = json.loads(fields["source"])
            if fields["rope"] is not None:
                fields["rope"] = msgspec.json.decode(fields["rope"], type=RopeScaling)
            found.append(Revision(**fields))
        return found

    def publications(self) -> list[tuple[str, int]]:
        """(name, number) of every publication still on the stack, oldest first within a name."""
        rows = self._db.execute("SELECT name, number FROM publications ORDER BY name, position")
        return rows.fetchall()

    def add_adapter(self, name: str, created: float) -> None:
        """Add a name that has no revisions yet."""
        self._db.execute("INSERT INTO adapters (name, created) VALUES (?, ?)", (name, created))

    def remove_adapter(self, name: str) -> None:
        """Remove a name with its revisions, keys, and usage that no other name shares."""
        self._db.execute("DELETE FROM publications WHERE name = ?", (name,))
        self._db.execute("DELETE FROM adapters WHERE name = ?", (name,))
        self._remove_idle_usage()

    def remove_revision(self, name: str, number: int, published: Sequence[int]) -> None:
        """Remove a revision with its keys and its usage; `published` is what the stack is then."""
        self._db.execute("DELETE FROM publications WHERE name = ?", (name,))
        self._db.execute("DELETE FROM revisions WHERE name = ? AND number = ?", (name, number))
        for position, each in enumerate(published):
            self.add_publication(name, position, each)
        self._db.execute(
            "UPDATE adapters SET last_deleted = max(last_deleted, ?) WHERE name = ?", (number, name)
        )
        self._remove_idle_usage()

    def set_pinned(self, name: str, pinned: bool) -> None:
        """Write the pin."""
        self._db.execute("UPDATE adapters SET pinned = ? WHERE name = ?", (pinned, name))

    def put_revision(self, revision: Revision) -> None:
        """Add a revision, or write anew which base an existing one was checked against."""
        self._db.execute(
            "INSERT INTO revisions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (name, number) DO UPDATE SET base_digest = excluded.base_digest,"
            " base_fingerprint = excluded.base_fingerprint, source = excluded.source",
            (
                revision.name,
                revision.number,
                revision.digest,
                revision.created,
                revision.max_rank,
                revision.num_rank_rows,
                revision.num_parameters,
                revision.num_bytes,
                revision.chat_template,
                revision.base_digest,
                revision.base_fingerprint,
                json.dumps(revision.source),
                None if revision.rope is None else msgspec.json.encode(revision.rope).decode(),
            ),
        )

    def add_publication(self, name: str, position: int, number: int) -> None:
        """Push onto the name's stack of publications."""
        self._db.execute("INSERT INTO publications VALUES (?, ?, ?)", (name, position, number))

    def remove_publication(self, name: str, position: int) -> None:
        """Pop from the name's stack of publications."""
        self._db.execute(
            "DELETE FROM publications WHERE name = ? AND position = ?", (name, position)
        )

    def key(self, key: str) -> tuple[str, str, int] | None:
        """(fingerprint, name, number) that an idempotency key was answered with."""
        row: tuple[str, str, int] | None = self._db.execute(
            "SELECT fingerprint, name, number FROM idempotency_keys WHERE key = ?", (key,)
        ).fetchone()
        return row

    def add_key(self, key: str, fingerprint: str, revision: Revision, created: float) -> None:
        """Remember what an idempotency key was answered with."""
        self._db.execute(
            "INSERT INTO idempotency_keys VALUES (?, ?, ?, ?, ?)",
            (key, fingerprint, revision.name, revision.number, created),
        )

    def remove_keys(self, before: float) -> None:
        """Forget the idempotency keys added before this time."""
        self._db.execute("DELETE FROM idempotency_keys WHERE created < ?", (before,))

    def usage(self) -> dict[str, Usage]:
        """Tokens served, by digest."""
        rows = self._db.execute("SELECT digest, tokens, recent, as_of FROM usage")
        return {digest: Usage(*counts) for digest, *counts in rows}

    def put_usage(self, digest: str, usage: Usage) -> None:
        """Write a digest's tokens."""
        self._db.execute(
            "INSERT OR REPLACE INTO usage (digest, tokens, recent, as_of) VALUES (?, ?, ?, ?)",
            (digest, usage.tokens, usage.recent, usage.as_of),
        )

    def _remove_idle_usage(self) -> None:
        self._db.execute("DELETE FROM usage WHERE digest NOT IN (SELECT digest FROM revisions)")
