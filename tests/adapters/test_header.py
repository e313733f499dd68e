"""Hostile safetensors headers: each is refused by name, and none raises anything else."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from adapters.header import Header, read_header
from adapters.manifest import AdapterError, AdapterRefused

MakeBytes = Callable[..., bytes]
FOUR = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def read(folder: Path, content: bytes, *, max_bytes: int = 1 << 20) -> Header:
    path = folder / "weights"
    path.write_bytes(content)
    with path.open("rb") as file:
        return read_header(file, "weights", max_bytes=max_bytes)


def refusal(folder: Path, content: bytes, **options: Any) -> str:
    with pytest.raises(AdapterRefused) as caught:
        read(folder, content, **options)
    return str(caught.value)


def test_a_file_written_by_safetensors_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "good"
    arrays: dict[str, Any] = {"a": np.zeros((2, 3), np.float32), "b": np.ones(5, np.float16)}
    save_file(arrays, path, metadata={"format": "pt"})

    with path.open("rb") as file:
        header = read_header(file, "good", max_bytes=1 << 20)

    assert header.metadata == {"format": "pt"}
    assert header.tensors["a"].shape == (2, 3)
    assert header.tensors["b"].num_elements == 5
    content = path.read_bytes()
    for name, tensor in header.tensors.items():
        data = content[tensor.start : tensor.start + tensor.num_bytes]
        assert data == arrays[name].tobytes()


@pytest.mark.parametrize("length", [0x280, 0x380, 0x480, 0x580])
def test_a_header_whose_length_looks_like_a_pickle_is_read(
    tmp_path: Path, make_bytes: MakeBytes, length: int
) -> None:
    text = json.dumps({"a": FOUR}).encode().ljust(length)

    assert read(tmp_path, make_bytes(text, b"\0" * 4)).tensors.keys() == {"a"}


@pytest.mark.parametrize(
    "content",
    [b"PK\x03\x04" + b"\0" * 60, b"\x80\x02}q\x00." + b"\0" * 60, b"\x80\x04\x95" + b"\0" * 60],
)
def test_a_pickle_is_refused_by_content(tmp_path: Path, content: bytes) -> None:
    assert "pickle" in refusal(tmp_path, content)


def test_a_file_over_the_limit_is_refused_with_both_numbers(
    tmp_path: Path, make_bytes: MakeBytes
) -> None:
    message = refusal(tmp_path, make_bytes({"a": FOUR}, b"\0" * 4), max_bytes=10)

    assert "the limit is 10" in message


@pytest.mark.parametrize("content", [b"", b"abc", b"\0" * 7])
def test_a_file_too_short_for_a_header_is_refused(tmp_path: Path, content: bytes) -> None:
    assert "too few" in refusal(tmp_path, content)


@pytest.mark.parametrize("length", [3, 1 << 20, 1 << 40, (1 << 64) - 1])
def test_a_header_longer_than_the_file_is_refused(
    tmp_path: Path, make_bytes: MakeBytes, length: int
) -> None:
    message = refusal(tmp_path, make_bytes(b"{}", length=length))

    assert f"claims a header of {length} bytes; at most 2" in message


def test_a_header_over_its_own_limit_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.write((1 << 34).to_bytes(8, "little"))
        os.ftruncate(file.fileno(), 1 << 35)

    with path.open("rb") as file, pytest.raises(AdapterRefused, match="claims a header"):
        read_header(file, "sparse", max_bytes=1 << 40)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (b"[]", "does not begin"),
        (b" {}", "does not begin"),
        (b"{", "not valid JSON"),
        (b'{"a": NaN}', "not valid JSON"),
        (b'{"\xff": 1}', "not valid JSON"),
        (b'{"\\ud800": 1}', "not valid JSON"),
        (b'{"a": ' + b"9" * 5000 + b"}", "not valid JSON"),
        (b'{"a":' * 50_000, "nested too deeply"),
        (b'{"a": 1, "a": 2}', "occurs twice"),
        (b'{"a": {"dtype": "F32", "dtype": "F16"}}', "occurs twice"),
        (b'{"__metadata__": []}', "__metadata__"),
        (b'{"__metadata__": {"a": 1}}', "__metadata__"),
    ],
)
def test_text_that_is_not_a_header_is_refused(
    tmp_path: Path, make_bytes: MakeBytes, text: bytes, word: str
) -> None:
    assert word in refusal(tmp_path, make_bytes(text))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"dtype": "F64"}, "dtype 'F64'"),
        ({"dtype": "I8"}, "dtype"),
        ({"dtype": ["F32"]}, "dtype"),
        ({"shape": [-1]}, "shape"),
        ({"shape": [True]}, "shape"),
        ({"shape": [1.0]}, "shape"),
        ({"shape": 1}, "shape"),
        ({"shape": [1] * 5}, "shape"),
        ({"shape": [1 << 62, 1 << 62]}, "shape"),
        ({"shape": [1 << 40, 1 << 40, 1 << 40]}, "takes"),
        ({"shape": [2]}, "takes 8 bytes"),
        ({"data_offsets": [0, 8]}, "takes 4 bytes"),
        ({"data_offsets": [4, 0]}, "takes"),
        ({"data_offsets": [0]}, "data_offsets"),
        ({"data_offsets": [0, 4, 8]}, "data_offsets"),
        ({"data_offsets": ["0", "4"]}, "data_offsets"),
        ({"data_offsets": [-4, 0]}, "data_offsets"),
        ({"extra": 1}, "is not described by"),
    ],
)
def test_a_wrong_tensor_entry_is_refused_by_its_name(
    tmp_path: Path, make_bytes: MakeBytes, change: dict[str, Any], word: str
) -> None:
    message = refusal(tmp_path, make_bytes({"the.tensor": {**FOUR, **change}}, b"\0" * 4))

    assert "the.tensor" in message
    assert word in message


@pytest.mark.parametrize("entry", [None, 1, [], "x", {}, {"dtype": "F32", "shape": [1]}])
def test_an_entry_that_is_not_a_tensor_is_refused(
    tmp_path: Path, make_bytes: MakeBytes, entry: object
) -> None:
    assert "the.tensor" in refusal(tmp_path, make_bytes({"the.tensor": entry}))


@pytest.mark.parametrize(
    ("first", "second", "size", "word"),
    [
        ([0, 4], [0, 4], 4, "begins at byte"),  # overlap
        ([0, 4], [2, 6], 6, "begins at byte"),
        ([0, 4], [8, 12], 12, "begins at byte"),  # gap
        ([4, 8], [8, 12], 12, "begins at byte"),  # gap at the start
        ([0, 4], [4, 8], 9, "its tensors end at"),  # bytes after the end
        ([0, 4], [4, 8], 7, "its tensors end at"),  # cut short
    ],
)
def test_tensors_must_cover_the_file_exactly(
    tmp_path: Path,
    make_bytes: MakeBytes,
    first: list[int],
    second: list[int],
    size: int,
    word: str,
) -> None:
    header = {"a": {**FOUR, "data_offsets": first}, "b": {**FOUR, "data_offsets": second}}

    assert word in refusal(tmp_path, make_bytes(header, b"\0" * size))


def test_too_many_tensors_are_refused(tmp_path: Path, make_bytes: MakeBytes) -> None:
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = {str(number): empty for number in range((1 << 14) + 1)}

    assert "the limit is 16384" in refusal(tmp_path, make_bytes(header), max_bytes=1 << 30)


def test_names_of_tensors_are_made_harmless_in_messages(
    tmp_path: Path, make_bytes: MakeBytes
) -> None:
    message = refusal(tmp_path, make_bytes({"\x1b[2J\n\u202e" + "x" * 10_000: 1}))

    assert message.isprintable()
    assert message.isascii()
    assert len(message) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64"]) | JSON,
        "shape": st.lists(st.integers(-1, 1 << 70), max_size=5) | JSON,
        "data_offsets": st.lists(st.integers(-1, 1 << 70), max_size=3) | JSON,
    }
)


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    header=st.binary(max_size=200)
    | st.dictionaries(st.text(max_size=8) | st.just("__metadata__"), ENTRY | JSON, max_size=4),
    data=st.binary(max_size=64),
    length=st.none() | st.integers(0, (1 << 64) - 1),
)
def test_any_bytes_are_read_or_refused(
    tmp_path: Path,
    make_bytes: MakeBytes,
    header: object,
    data: bytes,
    length: int | None,
) -> None:
    content = make_bytes(header, data, length=length)

    with contextlib.suppress(AdapterError):
        found = read(tmp_path, content)
        held = sum(tensor.num_bytes for tensor in found.tensors.values())
        assert len(content) - held >= 8


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 200), byte=st.integers(0, 255))
def test_a_good_file_with_one_byte_changed_is_read_or_refused(
    tmp_path: Path, make_bytes: MakeBytes, at: int, byte: int
) -> None:
    content = bytearray(make_bytes({"a": FOUR, "__metadata__": {"k": "v"}}, b"\0" * 4))
    content[at % len(content)] = byte

    with contextlib.suppress(AdapterError):
        read(tmp_path, bytes(content))
