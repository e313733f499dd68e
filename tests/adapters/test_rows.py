"""The registry's database: one that an earlier version wrote is read."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.manifest import BaseShape
from adapters.registry import Registry


def test_a_store_of_version_1_is_read_and_written_on(
    one_linear: BaseShape, write_folder: Callable[..., Path], tmp_path: Path
) -> None:
    registry = Registry.open(tmp_path / "store", one_linear)
    before = registry.push("a", write_folder())
    registry.close()
    with sqlite3.connect(tmp_path / "store" / "registry.sqlite") as rows:
        for table, column in (("revisions", "rope"), ("usage", "recent"), ("usage", "as_of")):
            rows.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        rows.execute("PRAGMA user_version = 1")
    rows.close()

    registry = Registry.open(tmp_path / "store", one_linear)
    assert registry.revisions("a") == (before,)
    assert registry.push("a", write_folder(value=2.0)).number == 2
    registry.close()


def test_a_store_of_a_version_yet_to_come_is_refused(tmp_path: Path) -> None:
    Registry.open(tmp_path / "store").close()
    with sqlite3.connect(tmp_path / "store" / "registry.sqlite") as rows:
        rows.execute("PRAGMA user_version = 99")
    rows.close()

    with pytest.raises(ValueError, match="version 99"):
        Registry.open(tmp_path / "store")
