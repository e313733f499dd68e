"""The base's digest follows what changes answers, and nothing else."""

import json
import shutil
from pathlib import Path

import pytest

from server.base_digest import base_digest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of one file."""
    made = tmp_path / "base"
    made.mkdir()
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(b"weights")
    return made


def test_the_same_bytes_elsewhere_are_the_same_base(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "copy")
    assert base_digest(tmp_path / "copy") == base_digest(folder)
    assert len(base_digest(folder)) == 64


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_other_bytes_are_another_base(folder: Path, name: str) -> None:
    before = base_digest(folder)
    (folder / name).write_bytes((folder / name).read_bytes() + b" ")
    assert base_digest(folder) != before


def test_a_file_that_is_not_loaded_changes_nothing(folder: Path) -> None:
    before = base_digest(folder)
    (folder / "README.md").write_text("words")
    (folder / "other.safetensors").write_bytes(b"not in the index")
    assert base_digest(folder) == before


def test_every_shard_of_the_index_counts(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    (folder / "model-2.safetensors").write_bytes(b"more")
    index = {"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    before = base_digest(folder)
    for shard in ("model-1.safetensors", "model-2.safetensors"):
        kept = (folder / shard).read_bytes()
        (folder / shard).write_bytes(b"other")
        assert base_digest(folder) != before
        (folder / shard).write_bytes(kept)


@pytest.mark.parametrize(
    "index", ["{}", "[]", "no JSON", '{"weight_map": {}}', '{"weight_map": {"a": 1}}', b"\xff"]
)
def test_an_index_that_is_damaged_is_refused_by_name(folder: Path, index: str | bytes) -> None:
    content = index.encode() if isinstance(index, str) else index
    (folder / "model.safetensors.index.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"index\.json is damaged: it does not say which file"):
        base_digest(folder)


def test_a_shard_outside_the_folder_is_refused(folder: Path) -> None:
    (folder.parent / "far.safetensors").write_bytes(b"weights")
    index = {"weight_map": {"a": "../far.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"holds no \.\./far\.safetensors"):
        base_digest(folder)


def test_a_folder_without_weights_is_refused_by_name(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        base_digest(folder)
