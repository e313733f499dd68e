"""Read a safetensors header that a stranger wrote: nothing is believed before it is checked."""

import math
import os
import struct
from dataclasses import dataclass
from typing import Any, BinaryIO

from adapters.manifest import AdapterRefused, show
from adapters.strict_json import parse_json_object

MAX_HEADER_BYTES = 8 << 20
MAX_TENSORS = 1 << 14
MAX_DIMS = 4
DTYPE_BYTES = {"F32": 4, "F16": 2, "BF16": 2}
_PICKLE_MAGICS = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"\x1f\x8b")


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a safetensors file."""

    name: str
    dtype: str  # F32, F16 or BF16
    shape: tuple[int, ...]
    start: int  # first byte, from the start of the file
    num_bytes: int

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Header:
    """What a safetensors file holds: its tensors cover it exactly, without gap or overlap."""

    tensors: dict[str, TensorInfo]
    metadata: dict[str, str]


def read_header(file: BinaryIO, name: str, *, max_bytes: int) -> Header:
    """Read and check the header of an open file; `name` names it in refusals."""
    size = os.fstat(file.fileno()).st_size
    if size > max_bytes:
        raise AdapterRefused(name, f"has {size} bytes; the limit is {max_bytes}")
    file.seek(0)
    prefix = file.read(8)
    if len(prefix) < 8:
        raise AdapterRefused(name, f"has {len(prefix)} bytes, too few for safetensors")
    (num_header_bytes,) = struct.unpack("<Q", prefix)
    limit = min(MAX_HEADER_BYTES, size - 8)
    text = file.read(num_header_bytes) if num_header_bytes <= limit else b""
    # only now: a header of 640 bytes begins a file like a pickle of protocol 2 does
    if not text.startswith(b"{") and prefix.startswith(_PICKLE_MAGICS):
        raise AdapterRefused(name, "is a pickle or an archive, not safetensors, whatever its name")
    if num_header_bytes > limit:
        raise AdapterRefused(
            name, f"claims a header of {num_header_bytes} bytes; at most {limit} are possible"
        )
    if not text.startswith(b"{"):
        raise AdapterRefused(name, "has a header that does not begin with '{'")
    return _parse(text, name, start=8 + num_header_bytes, end=size)


def _parse(text: bytes, name: str, *, start: int, end: int) -> Header:
    entries = parse_json_object(text, name)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise AdapterRefused(name, "has a __metadata__ that does not map strings to strings")
    if len(entries) > MAX_TENSORS:
        raise AdapterRefused(name, f"has {len(entries)} tensors; the limit is {MAX_TENSORS}")
    tensors = [_tensor(key, entry, start) for key, entry in entries.items()]
    _check_cover(tensors, name, start, end)
    return Header({tensor.name: tensor for tensor in tensors}, metadata)


def _tensor(name: str, entry: Any, start: int) -> TensorInfo:
    field = f"tensor {show(name)}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise AdapterRefused(field, "is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise AdapterRefused(field, f"has dtype {show(dtype)}, not one of {', '.join(DTYPE_BYTES)}")
    if not _are_sizes(shape) or len(shape) > MAX_DIMS:
        raise AdapterRefused(field, f"has shape {show(shape)}, not up to {MAX_DIMS} sizes")
    if not _are_sizes(offsets) or len(offsets) != 2:
        raise AdapterRefused(field, f"has data_offsets {show(offsets)}, not [begin, end]")
    num_bytes = math.prod(shape) * DTYPE_BYTES[dtype]
    if offsets[1] - offsets[0] != num_bytes:
        raise AdapterRefused(
            field,
            f"has data_offsets {show(offsets)}; {dtype} of shape {show(shape)} takes "
            f"{show(num_bytes)} bytes",
        )
    return TensorInfo(name, dtype, tuple(shape), start + offsets[0], num_bytes)


def _are_sizes(value: Any) -> bool:
    """Whether this is a list of integers that a file offset can hold."""
    return isinstance(value, list) and all(
        isinstance(size, int) and not isinstance(size, bool) and 0 <= size < 1 << 48
        for size in value
    )


def _check_cover(tensors: list[TensorInfo], name: str, start: int, end: int) -> None:
    """Refuse gaps, overlaps, and bytes past the last tensor."""
    at = start
    for tensor in sorted(tensors, key=lambda tensor: (tensor.start, tensor.num_bytes)):
        if tensor.start != at:
            raise AdapterRefused(
                f"tensor {show(tensor.name)}",
                f"begins at byte {tensor.start}; the one before it ends at {at}",
            )
        at += tensor.num_bytes
    if at != end:
        raise AdapterRefused(name, f"has {end} bytes; its tensors end at {at}")
