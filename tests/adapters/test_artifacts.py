"""The artifact store: whole or not there, found by the adapter, gone with it."""

import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from adapters.artifacts import RECORD_FILE, Artifact, ArtifactStore
from adapters.manifest import AdapterNotFound, BaseShape
from adapters.registry import Registry
from tests.adapters.conftest import WriteFolder

ADAPTER, BASE = "a" * 64, "b" * 64


def a_folder(root: Path, text: str = "weights") -> Path:
    folder = root / "made"
    (folder / "more").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "more" / "model.safetensors").write_text(text)
    return folder


def register(store: ArtifactStore, folder: Path, **changes: Any) -> Artifact:
    options = {
        "adapter_digest": ADAPTER,
        "base_digest": BASE,
        "revision": "bot@1",
        "job": "job",
        "settings": {"merge_base": "original"},
        "report": {"passed": True},
    }
    return store.register(folder, **{**options, **changes})


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def test_what_is_registered_is_found_by_its_adapter_and_by_its_digest(
    store: ArtifactStore, tmp_path: Path
) -> None:
    assert store.every() == []
    made = register(store, a_folder(tmp_path))
    assert not (tmp_path / "made").exists()
    assert ArtifactStore(tmp_path).find(ADAPTER) == made
    assert store.get(made.digest) == made
    assert store.find("c" * 64) is None
    assert made.files.keys() == {"config.json", "more/model.safetensors"}
    assert made.num_bytes == 9
    assert (store.path(made.digest) / "more" / "model.safetensors").read_text() == "weights"
    with pytest.raises(AdapterNotFound, match="no artifact 'zzz'"):
        store.get("zzz")


@pytest.mark.parametrize(
    "changes", [{"adapter_digest": "c" * 64}, {"base_digest": "d" * 64}, {"text": "others"}]
)
def test_the_digest_is_of_the_files_the_adapter_and_the_base(
    store: ArtifactStore, tmp_path: Path, changes: dict[str, Any]
) -> None:
    first = register(store, a_folder(tmp_path))
    folder = a_folder(tmp_path, changes.pop("text", "weights"))
    assert register(store, folder, **changes).digest != first.digest


def test_the_same_artifact_is_registered_once_however_it_was_made(
    store: ArtifactStore, tmp_path: Path
) -> None:
    first = register(store, a_folder(tmp_path))
    again = register(store, a_folder(tmp_path), job="another", revision="alias@3")
    assert again == first
    assert not (tmp_path / "made").exists()
    assert len(store.every()) == 1


def test_one_that_was_damaged_makes_room_for_the_same_made_anew(
    store: ArtifactStore, tmp_path: Path
) -> None:
    damaged = register(store, a_folder(tmp_path), settings={"asked": 1})
    (store.path(damaged.digest) / "config.json").write_text("?")
    again = register(store, a_folder(tmp_path), settings={"asked": 2})
    assert again.digest == damaged.digest
    assert store.is_whole(again.digest)
    assert ArtifactStore(tmp_path).every() == [again]


def test_a_kill_while_a_second_one_is_deleted_leaves_no_half_of_it_to_be_registered(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = register(store, a_folder(tmp_path))

    def kill(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", kill)
        with pytest.raises(KeyboardInterrupt):
            register(store, a_folder(tmp_path))
    assert not (tmp_path / "made").exists()
    store.sweep({ADAPTER})
    assert [path.name for path in store.folder.iterdir()] == [first.digest]


def test_a_record_of_a_try_that_was_killed_is_no_part_of_the_digest(
    store: ArtifactStore, tmp_path: Path
) -> None:
    digest = register(store, a_folder(tmp_path)).digest
    store.remove(digest)
    folder = a_folder(tmp_path)
    (folder / RECORD_FILE).write_text("half a rec")
    assert register(store, folder).digest == digest


@pytest.mark.parametrize("name", ["config.json", "more/model.safetensors"])
def test_a_changed_byte_is_noticed(store: ArtifactStore, tmp_path: Path, name: str) -> None:
    digest = register(store, a_folder(tmp_path)).digest
    assert store.is_whole(digest)
    (store.path(digest) / name).write_text("?")
    assert not store.is_whole(digest)


def test_a_file_more_or_less_is_noticed(store: ArtifactStore, tmp_path: Path) -> None:
    digest = register(store, a_folder(tmp_path)).digest
    (store.path(digest) / "more.py").write_text("")
    assert not store.is_whole(digest)
    (store.path(digest) / "more.py").unlink()
    assert store.is_whole(digest)
    (store.path(digest) / "config.json").unlink()
    assert not store.is_whole(digest)
    assert not store.is_whole("nobody")


def test_links_and_a_record_that_is_gone_are_no_errors_of_who_looks(
    store: ArtifactStore, tmp_path: Path
) -> None:
    digest = register(store, a_folder(tmp_path)).digest
    (store.path(digest) / "link").symlink_to("config.json")
    assert not store.is_whole(digest)
    (store.path(digest) / "link").unlink()
    assert store.is_whole(digest)
    (store.path(digest) / RECORD_FILE).unlink()
    assert not store.is_whole(digest)


def test_links_are_not_registered(store: ArtifactStore, tmp_path: Path) -> None:
    folder = a_folder(tmp_path)
    (folder / "model.bin").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match="holds nothing else"):
        register(store, folder)
    assert store.every() == []


def test_an_empty_folder_is_not_registered(store: ArtifactStore, tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    with pytest.raises(ValueError, match="holds no files"):
        register(store, tmp_path / "made")


def test_the_newest_of_an_adapters_artifacts_is_the_one_that_counts(
    store: ArtifactStore, tmp_path: Path
) -> None:
    first = register(store, a_folder(tmp_path, "1"))
    second = register(store, a_folder(tmp_path, "2"))
    assert store.find(ADAPTER) == second
    assert store.remove_of(ADAPTER, but=second.digest) == [first.digest]
    assert store.every() == [second]
    assert store.remove_of(ADAPTER) == [second.digest]
    assert list(store.folder.iterdir()) == []


def test_what_is_demoted_stays_so_until_it_is_restored(
    store: ArtifactStore, tmp_path: Path
) -> None:
    digest = register(store, a_folder(tmp_path)).digest
    assert not store.is_demoted(digest)
    store.demote(digest)
    assert ArtifactStore(tmp_path).is_demoted(digest)
    assert store.is_whole(digest)
    store.restore(digest)
    assert not store.is_demoted(digest)
    store.demote(digest)
    store.remove(digest)
    assert list(store.folder.iterdir()) == []
    with pytest.raises(AdapterNotFound):
        store.demote(digest)


def test_what_was_made_as_asked_is_reused_unless_it_is_damaged(
    store: ArtifactStore, tmp_path: Path
) -> None:
    made = register(store, a_folder(tmp_path), settings={"asked": {"seed": 1}})
    store.demote(made.digest)
    assert not store.reuse(ADAPTER, {"seed": 2})
    assert not store.reuse("c" * 64, {"seed": 1})
    assert store.is_demoted(made.digest)
    assert store.reuse(ADAPTER, {"seed": 1})
    assert not store.is_demoted(made.digest)
    (store.path(made.digest) / "config.json").write_text("?")
    assert not store.reuse(ADAPTER, {"seed": 1})
    assert store.every() == []


def test_a_sweep_leaves_the_newest_of_each_adapter_that_is_named(
    store: ArtifactStore, tmp_path: Path
) -> None:
    old = register(store, a_folder(tmp_path, "1"))
    kept = register(store, a_folder(tmp_path, "2"))
    stranger = register(store, a_folder(tmp_path, "3"), adapter_digest="c" * 64)
    store.demote(kept.digest)
    store.demote(old.digest)
    (store.folder / ".gone-x").mkdir()
    (store.folder / ".gone-x" / "file").touch()
    (store.folder / "half").mkdir()
    swept = store.sweep({ADAPTER})
    assert set(swept) == {
        ".gone-x", "half", old.digest, f"{old.digest}.demoted", stranger.digest
    }  # fmt: skip
    assert {path.name for path in store.folder.iterdir()} == {
        kept.digest, f"{kept.digest}.demoted"
    }  # fmt: skip
    assert ArtifactStore(tmp_path / "nowhere").sweep(set()) == []


def test_one_that_two_delete_at_once_is_gone_for_both(
    store: ArtifactStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = register(store, a_folder(tmp_path))
    mkdtemp = tempfile.mkdtemp

    def mkdtemp_late(**options: Any) -> str:
        monkeypatch.undo()
        ArtifactStore(tmp_path).remove(made.digest)  # the other one, in between
        return str(mkdtemp(**options))

    monkeypatch.setattr(tempfile, "mkdtemp", mkdtemp_late)
    store.remove(made.digest)
    assert list(store.folder.iterdir()) == []


def test_what_another_process_registers_is_seen(store: ArtifactStore, tmp_path: Path) -> None:
    first = register(store, a_folder(tmp_path, "1"))
    assert store.every() == [first]
    long_ago = time.time() - 60
    os.utime(store.folder, (long_ago, long_ago))
    assert store.every() == [first]  # from here on nothing is read again...
    second = register(ArtifactStore(tmp_path), a_folder(tmp_path, "2"))
    assert store.every() == [first, second]  # ...until the folder changes


def test_records_nobody_can_read_are_no_artifacts(store: ArtifactStore, tmp_path: Path) -> None:
    digest = register(store, a_folder(tmp_path)).digest
    (store.folder / "copy").mkdir()
    record = (store.path(digest) / RECORD_FILE).read_text()
    (store.folder / "copy" / RECORD_FILE).write_text(record)  # whose name is not its digest
    assert [each.digest for each in store.every()] == [digest]
    (store.path(digest) / RECORD_FILE).write_text("{}")
    assert ArtifactStore(tmp_path).every() == []


def test_an_adapters_artifact_goes_with_it_and_strays_go_when_the_store_opens(
    tmp_path: Path, one_linear: BaseShape, write_folder: WriteFolder
) -> None:
    root = tmp_path / "store"
    registry = Registry.open(root, one_linear)
    digest = registry.push("bot", write_folder()).digest
    registry.push("alias", write_folder())
    made = register(registry.artifacts, a_folder(tmp_path), adapter_digest=digest)
    registry.delete("bot")
    assert registry.artifacts.find(digest) == made  # another name means it
    lease = registry.lease("alias")
    registry.delete("alias")
    assert registry.artifacts.find(digest) == made  # a request is under way
    lease.release()
    assert registry.artifacts.every() == []
    digest = registry.push("bot", write_folder()).digest
    register(registry.artifacts, a_folder(tmp_path), adapter_digest=digest)
    registry.push("bot", write_folder(value=2.0))
    registry.delete_revision("bot", 1)
    assert registry.artifacts.every() == []
    register(registry.artifacts, a_folder(tmp_path), adapter_digest=digest)
    registry.close()
    with_stray = Registry.open(root, one_linear)
    assert with_stray.artifacts.every() == []
    assert with_stray.root == root
    assert with_stray.base_digest == one_linear.digest
    with_stray.close()
