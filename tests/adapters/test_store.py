"""The store: one holder, whole objects only, and folders that try to trick it."""

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapters.manifest import AdapterNotFound, AdapterRefused, BaseShape, Limits, StoreBusy
from adapters.store import Store, object_path

WriteFolder = Callable[..., Path]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(tmp_path / "store")
    yield store
    store.close()


def test_a_held_store_says_where_its_holder_serves(tmp_path: Path) -> None:
    held = Store.open(tmp_path, "http://127.0.0.1:8000")

    with pytest.raises(StoreBusy) as caught:
        Store.open(tmp_path)

    assert caught.value.url == "http://127.0.0.1:8000"
    assert "http://127.0.0.1:8000" in str(caught.value)
    held.close()
    Store.open(tmp_path).close()


def test_a_holder_that_serves_nothing_or_has_not_said_yet_has_no_url(tmp_path: Path) -> None:
    held = Store.open(tmp_path)
    for said in (None, "", "garbage", "[]", '{"url": 5}'):
        if said is not None:
            (tmp_path / "lock").write_text(said)
        with pytest.raises(StoreBusy) as caught:
            Store.open(tmp_path)
        assert caught.value.url is None
    held.close()


def test_the_lock_file_names_the_process(tmp_path: Path) -> None:
    store = Store.open(tmp_path, "http://somewhere-with-a-long-name:8000")
    store.close()
    store = Store.open(tmp_path, "u")

    assert json.loads((tmp_path / "lock").read_text()) == {"pid": os.getpid(), "url": "u"}
    store.close()
    store.close()  # harmless


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time, pathlib; from adapters.store import Store;"
            "s = Store.open(pathlib.Path(sys.argv[1]), 'child'); print('held', flush=True);"
            "time.sleep(60)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"held\n"
    with pytest.raises(StoreBusy, match="child"):
        Store.open(tmp_path)

    child.kill()
    child.wait()
    child.stdout.close()

    Store.open(tmp_path).close()


def test_open_sweeps_what_was_being_written(tmp_path: Path) -> None:
    Store.open(tmp_path).close()
    (tmp_path / "tmp" / "half").write_bytes(b"half")

    Store.open(tmp_path).close()

    assert not list((tmp_path / "tmp").iterdir())


def test_sweep_deletes_every_object_that_is_not_kept(store: Store) -> None:
    for name in ("a.safetensors", "b.safetensors", "a.tmp", "b"):
        (store.objects / name).write_bytes(b"")

    assert sorted(store.sweep({"a"})) == ["a.tmp", "b", "b.safetensors"]
    assert [path.name for path in store.objects.iterdir()] == ["a.safetensors"]


def test_put_moves_the_object_and_putting_it_again_makes_a_damaged_one_whole(
    store: Store, write_folder: WriteFolder, one_linear: BaseShape
) -> None:
    folder = write_folder()
    first = store.stage(folder, one_linear, Limits())
    second = store.stage(folder, one_linear, Limits())
    assert not store.has(first.digest)

    store.put(first)
    object_path(store.root, first.digest).write_bytes(b"damaged")
    store.put(second)

    assert store.is_whole(first.digest)
    assert not list((store.root / "tmp").iterdir())
    assert store.manifest(first.digest) == first.manifest
    store.remove(first.digest)
    store.remove(first.digest)
    assert not store.has(first.digest)
    with pytest.raises(AdapterNotFound, match="holds no object"):
        store.manifest(first.digest)


def test_an_object_is_synced_before_it_lands_and_its_folder_after(
    store: Store,
    write_folder: WriteFolder,
    one_linear: BaseShape,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[str] = []
    real_sync, real_rename = os.fsync, Path.rename

    def fsync(handle: int) -> None:
        events.append("sync " + Path(f"/proc/self/fd/{handle}").readlink().parent.name)
        real_sync(handle)

    def rename(path: Path, target: Path) -> Path:
        events.append("rename")
        return real_rename(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)

    store.put(store.stage(write_folder(), one_linear, Limits()))

    assert events == ["sync tmp", "rename", "sync store"]  # objects/ lies in store/


def refusal(store: Store, base: BaseShape, folder: Path, limits: Limits | None = None) -> str:
    with pytest.raises(AdapterRefused) as caught:
        store.stage(folder, base, limits or Limits())
    return str(caught.value)


def test_a_pickle_is_refused_whatever_its_name(
    store: Store, write_folder: WriteFolder, one_linear: BaseShape
) -> None:
    folder = write_folder(raw=pickle.dumps({"a": 1}))
    assert "pickle" in refusal(store, one_linear, folder)

    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")
    assert "adapter_model.bin: is a pickle" in refusal(store, one_linear, folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
def test_a_folder_without_its_files_is_not_found(
    store: Store, write_folder: WriteFolder, one_linear: BaseShape, name: str
) -> None:
    folder = write_folder()
    (folder / name).unlink()

    with pytest.raises(AdapterNotFound, match=name):
        store.stage(folder, one_linear, Limits())
    with pytest.raises(AdapterNotFound):
        store.stage(folder / "nowhere", one_linear, Limits())


@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "turnout.json"]
)
def test_a_pipe_or_folder_in_place_of_a_file_is_refused_at_once(
    store: Store, write_folder: WriteFolder, one_linear: BaseShape, name: str
) -> None:
    folder = write_folder()
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    assert "is not a plain file" in refusal(store, one_linear, folder)

    (folder / name).unlink()
    (folder / name).mkdir()
    assert "is not a plain file" in refusal(store, one_linear, folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "turnout.json"])
def test_json_over_a_megabyte_is_refused(
    store: Store, write_folder: WriteFolder, one_linear: BaseShape, name: str
) -> None:
    folder = write_folder()
    (folder / name).write_bytes(b" " * ((1 << 20) + 1))

    assert f"{name}: is over 1048576 bytes" in refusal(store, one_linear, folder)


def test_weights_over_the_size_limit_are_refused_with_both_numbers(
    store: Store, write_folder: WriteFolder, one_linear: BaseShape
) -> None:
    folder = write_folder()
    size = (folder / "adapter_model.safetensors").stat().st_size

    message = refusal(store, one_linear, folder, Limits(max_bytes=size - 1))

    assert f"has {size} bytes; the limit is {size - 1}" in message
    store.stage(folder, one_linear, Limits(max_bytes=size)).discard()


def test_an_adapter_too_large_for_the_bank_is_refused_before_its_weights_are_read(
    store: Store, write_folder: WriteFolder, one_linear: BaseShape
) -> None:
    limits = Limits(max_bank_rows=16, page_rows=8)
    folder = write_folder(r=16, use_dora=True)

    message = refusal(store, one_linear, folder, limits)

    assert message == (
        "bank_rows: the adapter needs 17 bank rows, 24 in pages of 8; the bank holds 16"
    )
    assert "shape" in refusal(store, one_linear, write_folder(r=16), limits)  # fits the bank


@pytest.mark.parametrize(
    ("sidecar", "field"),
    [
        ([], "turnout.json"),
        ({}, "format"),
        ({"format": 2}, "format"),
        ({"format": 1, "rope": {"rope_theta": 1e6}}, "rope"),
        ({"format": 1, "rope": "x"}, "rope"),
        ({"format": 1, "chat_template": ""}, "chat_template"),
        ({"format": 1, "chat_template": 5}, "chat_template"),
        ({"format": 1, "chat_template": "x" * 65_537}, "chat_template"),
        ({"format": 1, "training": "yes"}, "training"),
        ({"format": 1, "stop": ["</s>"]}, "stop"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_sidecar_that_cannot_be_honoured_is_refused_by_field(
    store: Store,
    write_folder: WriteFolder,
    one_linear: BaseShape,
    sidecar: object,
    field: str,
) -> None:
    assert refusal(store, one_linear, write_folder(sidecar=sidecar)).startswith(f"{field}: ")


def test_rope_settings_equal_to_the_bases_are_kept(
    store: Store, make_adapter: Callable[..., Path], base_shape: BaseShape
) -> None:
    folder = make_adapter()
    rope = {"rope_type": "default", "rope_theta": 10000}
    (folder / "turnout.json").write_text(
        json.dumps({"format": 1, "rope": rope, "chat_template": "{{ x }}"})
    )

    manifest = store.stage(folder, base_shape, Limits()).manifest

    assert manifest.rope == rope
    assert manifest.chat_template == "{{ x }}"
