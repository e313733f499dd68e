"""Adapter folders written by hand, quick and wrong in any way a test wants."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from adapters.manifest import BaseShape

PREFIX = "base_model.model.model.layers"
WriteFolder = Callable[..., Path]


@pytest.fixture(scope="session")
def base_shape(tiny_base: Path) -> BaseShape:
    """The shape of `tiny_base`, under the name `base`."""
    return BaseShape.from_config(tiny_base, "base", "b" * 64)


@pytest.fixture(scope="session")
def one_linear() -> BaseShape:
    """A base of two layers with q_proj [8, 8] alone, for quick adapters."""
    return BaseShape(
        name="base", digest="b" * 64, num_layers=2, linears={"self_attn.q_proj": (8, 8)}
    )


@pytest.fixture
def write_folder(tmp_path: Path) -> WriteFolder:
    """Write a valid rank-2 adapter for `one_linear`; keywords change its config or its tensors.

    `tensors` replaces or, with None, removes tensors by name; `value` fills them all; `raw`
    replaces the weights file's bytes; `sidecar` is turnout.json; the rest goes into the config.
    """

    def write(
        name: str = "adapter",
        *,
        value: float = 1.0,
        tensors: dict[str, Any] | None = None,
        raw: bytes | None = None,
        sidecar: object = None,
        **config: Any,
    ) -> Path:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        fields = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps({**fields, **config}))
        arrays: dict[str, Any] = {}
        for layer in range(2):
            prefix = f"{PREFIX}.{layer}.self_attn.q_proj"
            arrays[f"{prefix}.lora_A.weight"] = np.full((2, 8), value, np.float32)
            arrays[f"{prefix}.lora_B.weight"] = np.full((8, 2), value, np.float32)
        arrays.update(tensors or {})
        weights = folder / "adapter_model.safetensors"
        if raw is None:
            save_file({key: item for key, item in arrays.items() if item is not None}, weights)
        else:
            weights.write_bytes(raw)
        if sidecar is not None:
            (folder / "turnout.json").write_text(json.dumps(sidecar))
        return folder

    return write


def safetensors_bytes(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file from any header at all; `length` is what it claims to be."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


@pytest.fixture(scope="session")
def make_bytes() -> Callable[..., bytes]:
    """See `safetensors_bytes`."""
    return safetensors_bytes
