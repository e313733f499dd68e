"""Tensors of a checkpoint, read and written one at a time, bit for bit."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from training import merge_checkpoint
from training.merge_checkpoint import Checkpoint, Writer, copy_side_files

TENSORS = {
    "a": torch.arange(12.0).view(3, 4),
    "b": torch.arange(10, dtype=torch.bfloat16).view(5, 2),
    "c": torch.tensor([1.5, -2.0], dtype=torch.float16),
    "empty": torch.zeros(0, 4),
}


def write_config(folder: Path, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards and their index."""
    folder = write_config(tmp_path / "sharded")
    shard_of = {"a": "one", "b": "two", "c": "one", "empty": "two"}
    for shard in ("one", "two"):
        tensors = {name: TENSORS[name] for name in TENSORS if shard_of[name] == shard}
        save_file(tensors, folder / f"{shard}.safetensors", metadata={"format": "pt", "x": shard})
    index = {"weight_map": {name: f"{shard}.safetensors" for name, shard in shard_of.items()}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def checkpoint(sharded: Path) -> Iterator[Checkpoint]:
    opened = Checkpoint(sharded)
    yield opened
    opened.close()


def test_tensors_are_read_from_whichever_shard_holds_them(checkpoint: Checkpoint) -> None:
    assert set(checkpoint) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert checkpoint.tensor(name).dtype == tensor.dtype
    assert checkpoint.num_bytes == 48 + 20 + 4
    assert [name for name, _ in checkpoint.tensors(["c", "a", "b"])] == ["c", "a", "b"]
    for name, tensor in checkpoint.tensors(TENSORS):
        assert torch.equal(tensor, TENSORS[name])


def test_rows_are_read_alone(checkpoint: Checkpoint) -> None:
    assert torch.equal(checkpoint.rows("a", 1, 1), TENSORS["a"][1:2])
    assert torch.equal(checkpoint.rows("b", 3, 99), TENSORS["b"][3:])


def test_a_tensor_that_is_not_there_is_named(checkpoint: Checkpoint) -> None:
    with pytest.raises(ValueError, match=r"tensor model\.x is missing"):
        checkpoint.tensor("model.x")


def test_a_copy_is_the_same_file_bit_for_bit_however_small_the_pieces(
    checkpoint: Checkpoint, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merge_checkpoint, "CHUNK_BYTES", 8)
    monkeypatch.setattr(merge_checkpoint, "_MAX_IO_BYTES", 3)
    out = tmp_path / "out"
    out.mkdir()
    writer = Writer(checkpoint, out)
    writer.write("b", checkpoint.tensor("b"))
    for name in ("empty", "a", "c"):
        writer.copy(name)
    writer.finish()
    writer.close()
    for name in ("one.safetensors", "two.safetensors"):
        assert (out / name).read_bytes() == (sharded / name).read_bytes()


def test_changed_values_land_in_their_place(checkpoint: Checkpoint, tmp_path: Path) -> None:
    writer = Writer(checkpoint, tmp_path)
    writer.write("a", -checkpoint.tensor("a").T.contiguous().T)  # not contiguous
    for name in ("b", "c", "empty"):
        writer.copy(name)
    writer.finish()
    writer.close()
    found = load_file(tmp_path / "one.safetensors")
    assert torch.equal(found["a"], -TENSORS["a"])
    assert torch.equal(found["c"], TENSORS["c"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_refused_by_the_tensors_name(
    value: float, checkpoint: Checkpoint, tmp_path: Path
) -> None:
    writer = Writer(checkpoint, tmp_path)
    bad = checkpoint.tensor("b")
    bad[4, 1] = value
    with pytest.raises(ValueError, match="b would hold NaN or Inf in BF16"):
        writer.write("b", bad)
    writer.close()


def test_a_base_that_holds_nan_itself_is_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "base")
    save_file({"a": torch.tensor([1.0, float("nan")])}, folder / "model.safetensors")
    base = Checkpoint(folder)
    writer = Writer(base, tmp_path)
    with pytest.raises(ValueError, match="NaN"):
        writer.copy("a")
    writer.close()
    base.close()


def test_a_tensor_that_was_forgotten_or_has_another_shape_is_our_own_fault(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    writer = Writer(checkpoint, tmp_path)
    with pytest.raises(AssertionError, match="a"):
        writer.write("a", torch.zeros(4, 3))
    with pytest.raises(AssertionError, match="never written"):
        writer.finish()
    writer.close()


def test_a_failed_write_is_raised(checkpoint: Checkpoint, tmp_path: Path) -> None:
    writer = Writer(checkpoint, tmp_path)
    read_only = (tmp_path / "one.safetensors").open("rb")
    writer._files["one.safetensors"] = read_only.fileno()
    writer.write("a", checkpoint.tensor("a"))
    with pytest.raises(OSError, match="Bad file descriptor"):
        writer.write("c", checkpoint.tensor("c"))
    writer._files.pop("one.safetensors")
    writer.close()
    read_only.close()


@pytest.mark.parametrize(
    ("quantization", "method"),
    [({"quant_method": "gptq", "bits": 4}, "gptq"), ({"load_in_4bit": True}, r"\?")],
)
def test_a_quantized_checkpoint_is_refused_with_the_reason(
    quantization: dict[str, object], method: str, tmp_path: Path
) -> None:
    folder = write_config(tmp_path / "base", quantization_config=quantization)
    with pytest.raises(ValueError, match=f"{method}.*half a step.*would erase it.*16-bit"):
        Checkpoint(folder)


def test_packed_tensors_are_refused_with_the_reason_too(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "base")
    save_file({"a.qweight": torch.zeros(2, 2, dtype=torch.int32)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"qweight.*I32.*would erase it"):
        Checkpoint(folder)


def test_a_checkpoint_without_its_files_is_refused(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "base")
    with pytest.raises(ValueError, match=r"holds no model\.safetensors"):
        Checkpoint(folder)
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ValueError, match="too few for safetensors"):
        Checkpoint(folder)
    index = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": TENSORS["a"]}, tmp_path / "elsewhere.safetensors")
    with pytest.raises(ValueError, match=r"holds no \.\./elsewhere"):
        Checkpoint(folder)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    save_file({"a": TENSORS["a"], "b": TENSORS["b"]}, sharded / "two.safetensors")
    with pytest.raises(ValueError, match=r"a is in two\.safetensors and one\.safetensors"):
        Checkpoint(sharded)


def test_side_files_go_along_and_weights_and_records_do_not(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    along = {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "merges.txt",
        "chat_template.jinja",
        "LICENSE",
        "model.safetensors.index.json",
    }
    left = {
        "turnout.json",
        "adapter_config.json",
        "model.safetensors",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
        "README.md",
    }
    for name in along | left:
        (base / name).write_text(f'{{"is": "{name}", "chat_template": "base"}}')
    (base / "folder.json").mkdir()

    copy_side_files(base, out, None)

    assert {path.name for path in out.iterdir()} == along
    for name in along:
        assert (out / name).read_bytes() == (base / name).read_bytes()


def test_an_adapters_template_takes_the_place_of_the_bases(tmp_path: Path) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    base.mkdir()
    out.mkdir()
    config = {"chat_template": "old", "eos_token": "</s>"}
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    (base / "chat_template.jinja").write_text("older")

    copy_side_files(base, out, "new")

    assert (out / "chat_template.jinja").read_text() == "new"
    assert json.loads((out / "tokenizer_config.json").read_text()) == {"eos_token": "</s>"}
