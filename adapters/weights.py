"""From PEFT's tensors to a stored object: match names, check shapes, copy finite values, digest.

A stored object is one safetensors file. Its tensors are `layers.{i}.{linear}.lora_a` [rank, in],
`.lora_b` [out, rank] and, with DoRA, `.magnitude` [out], in the dtype they came in; its metadata
holds the manifest. The digest covers the manifest and each tensor's name, dtype, shape and bytes.
"""

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec
import numpy as np

from adapters.header import DTYPE_BYTES, Header, TensorInfo, read_header
from adapters.manifest import (
    FORMAT,
    AdapterManifest,
    AdapterRefused,
    BaseShape,
    ModuleEntry,
    show,
)

MANIFEST_KEY = "manifest"
CHUNK_BYTES = 1 << 20  # a multiple of every dtype's size
_PEFT_NAME = re.compile(
    r"base_model\.model\.model\.layers\.(0|[1-9][0-9]{0,5})\.((?:self_attn|mlp)\.[a-z]+_proj)\."
    r"(lora_A\.weight|lora_B\.weight|lora_magnitude_vector(?:\.weight)?)"
)
_PARTS = {"lora_A.weight": "lora_a", "lora_B.weight": "lora_b"}  # anything else is the magnitude
# Tensors that PEFT writes for what is not served: a part of the name, and why.
_NOT_SERVED = (
    ("lora_embedding_", "LoRA on embeddings is not served"),
    ("lora_B.bias", "a bias on lora_B is not served (lora_bias)"),
    ("modules_to_save", "fully trained modules are not served (modules_to_save)"),
    ("token_adapter", "trained tokens are not served (trainable_token_indices)"),
    ("trainable_tokens", "trained tokens are not served (trainable_token_indices)"),
    ("embed_tokens", "a changed vocabulary or embedding is not served"),
    ("lm_head", "a changed output head is not served"),
    (".bias", "trained biases are not served (bias)"),
)
_EXPONENT: dict[str, tuple[str, int]] = {  # bits that are all set in infinity and NaN
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
}


@dataclass(frozen=True, slots=True)
class Copy:
    """One tensor of the upload and what it is called in the stored object."""

    name: str
    source: TensorInfo


def match_tensors(
    header: Header, modules: tuple[ModuleEntry, ...], base: BaseShape
) -> tuple[Copy, ...]:
    """Pair every uploaded tensor with its module: none missing, none over, every shape right."""
    wanted = _wanted_shapes(modules, base)
    found: dict[str, Copy] = {}
    for tensor in header.tensors.values():
        field = f"tensor {show(tensor.name)}"
        name = _object_name(tensor.name)
        if name not in wanted:
            raise AdapterRefused(field, "belongs to no module and part that the config targets")
        if name in found:
            raise AdapterRefused(field, f"is there twice, as {show(found[name].source.name)} too")
        if tensor.shape != wanted[name]:
            raise AdapterRefused(
                field, f"has shape {list(tensor.shape)}; this base needs {list(wanted[name])}"
            )
        found[name] = Copy(name, tensor)
    for name in wanted:
        if name not in found:
            raise AdapterRefused(f"tensor {name}", "is missing, though the config targets it")
    return tuple(found[name] for name in sorted(found))


def _wanted_shapes(modules: tuple[ModuleEntry, ...], base: BaseShape) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for module in modules:
        num_out, num_in = base.linears[module.linear]
        shapes[f"{module.prefix}.lora_a"] = (module.rank, num_in)
        shapes[f"{module.prefix}.lora_b"] = (num_out, module.rank)
        if module.use_dora:
            shapes[f"{module.prefix}.magnitude"] = (num_out,)
    return shapes


def _object_name(name: str) -> str:
    """What a stored object calls the tensor that PEFT calls `name`."""
    match = _PEFT_NAME.fullmatch(name)
    if match:
        layer, linear, part = match.groups()
        return f"layers.{layer}.{linear}.{_PARTS.get(part, 'magnitude')}"
    for part, reason in _NOT_SERVED:
        if part in name:
            raise AdapterRefused(f"tensor {show(name)}", reason)
    raise AdapterRefused(f"tensor {show(name)}", "is not a LoRA tensor of a decoder layer's linear")


def write_object(
    source: BinaryIO, copies: tuple[Copy, ...], manifest: AdapterManifest, target: BinaryIO
) -> str:
    """Stream the tensors of `source` into `target`, refuse NaN and Inf, return the digest.

    The bytes that are checked are the bytes that are written. Equal adapters give equal files.
    """
    # widest dtype first, so that each tensor starts at a multiple of its element size
    ordered = sorted(copies, key=lambda copy: (-DTYPE_BYTES[copy.source.dtype], copy.name))
    target.write(_object_header(ordered, manifest))
    hashes: dict[str, str] = {}
    for copy in ordered:
        hasher = hashlib.sha256()
        for chunk in _chunks(source, copy.source):
            _check_finite(chunk, copy.source)
            hasher.update(chunk)
            target.write(chunk)
        hashes[copy.name] = hasher.hexdigest()
    tensors = {copy.name: copy.source for copy in copies}
    return _digest(manifest, tensors, hashes)


def read_object(path: Path) -> tuple[AdapterManifest, dict[str, TensorInfo]]:
    """Manifest and tensors of a stored object. Raises AdapterRefused when it is not one."""
    with path.open("rb") as file:
        return _read_object(file, path.name)


def object_digest(path: Path) -> str:
    """Work out a stored object's digest from its bytes, every one of them."""
    with path.open("rb") as file:
        manifest, tensors = _read_object(file, path.name)
        hashes = {}
        for name, tensor in tensors.items():
            hasher = hashlib.sha256()
            for chunk in _chunks(file, tensor):
                hasher.update(chunk)
            hashes[name] = hasher.hexdigest()
    return _digest(manifest, tensors, hashes)


def _read_object(file: BinaryIO, name: str) -> tuple[AdapterManifest, dict[str, TensorInfo]]:
    header = read_header(file, name, max_bytes=1 << 48)
    try:
        manifest = AdapterManifest.from_json(header.metadata.get(MANIFEST_KEY, ""))
    except msgspec.MsgspecError as error:
        raise AdapterRefused(name, f"holds no manifest: {show(str(error))}") from None
    if manifest.format != FORMAT:
        raise AdapterRefused(name, f"has format {manifest.format}; this version reads {FORMAT}")
    return manifest, header.tensors


def _object_header(ordered: list[Copy], manifest: AdapterManifest) -> bytes:
    entries: dict[str, object] = {"__metadata__": {MANIFEST_KEY: manifest.to_json()}}
    at = 0
    for copy in ordered:
        end = at + copy.source.num_bytes
        entries[copy.name] = {
            "dtype": copy.source.dtype,
            "shape": copy.source.shape,
            "data_offsets": [at, end],
        }
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # as safetensors does, so that the data is aligned
    return struct.pack("<Q", len(text)) + text


def _chunks(file: BinaryIO, tensor: TensorInfo) -> Iterator[bytes]:
    file.seek(tensor.start)
    left = tensor.num_bytes
    while left:
        chunk = file.read(min(left, CHUNK_BYTES))
        if len(chunk) < min(left, CHUNK_BYTES):
            raise AdapterRefused(f"tensor {show(tensor.name)}", "ends early: the file was cut")
        left -= len(chunk)
        yield chunk


def _check_finite(chunk: bytes, tensor: TensorInfo) -> None:
    dtype, exponent = _EXPONENT[tensor.dtype]
    bits = np.frombuffer(chunk, dtype=dtype)
    if ((bits & exponent) == exponent).any():
        raise AdapterRefused(f"tensor {show(tensor.name)}", "holds NaN or Inf")


def _digest(
    manifest: AdapterManifest, tensors: dict[str, TensorInfo], hashes: dict[str, str]
) -> str:
    """The identity: sha256 of the manifest and of every tensor's name, dtype, shape and hash."""
    identity = {
        "manifest": manifest.to_json(),
        "tensors": [
            [name, tensors[name].dtype, list(tensors[name].shape), hashes[name]]
            for name in sorted(tensors)
        ],
    }
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
