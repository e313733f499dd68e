"""The registry's database: one that an earlier version wrote is read."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest

from adapters.manifest import BaseShape
from adapters.registry import Registry

COLUMNS = {  # that a version was the first to have
    2: (("revisions", "rope"), ("usage", "recent"), ("usage", "as_of")),
    3: (("adapters", "last_deleted"),),
}


@pytest.mark.parametrize("version", [1, 2])
def test_a_store_of_an_earlier_version_is_read_and_written_on(
    version: int, one_linear: BaseShape, write_folder: Callable[..., Path], tmp_path: Path
) -> None:
    registry = Registry.open(tmp_path / "store", one_linear)
    before = registry.push("a", write_folder())
    registry.add_usage({before.digest: 7})
    registry.close()
    with sqlite3.connect(tmp_path / "store" / "registry.sqlite") as rows:
        for table, column in sum((COLUMNS[later] for later in range(version + 1, 4)), ()):
            rows.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
        rows.execute(f"PRAGMA user_version = {version}")
    rows.close()

    for _ in range(2):  # it is brought up to date once
        registry = Registry.open(tmp_path / "store", one_linear)
        assert registry.revisions("a")[0] == before
        assert registry.usage() == {before.digest: 7}
        assert registry.push("a", write_folder(value=2.0)).number == 2
        registry.close()


def test_a_store_of_a_version_yet_to_come_is_refused(tmp_path: Path) -> None:
    Registry.open(tmp_path / "store").close()
    with sqlite3.connect(tmp_path / "store" / "registry.sqlite") as rows:
        rows.execute("PRAGMA user_version = 99")
    rows.close()

    with pytest.raises(ValueError, match="version 99"):
        Registry.open(tmp_path / "store")
