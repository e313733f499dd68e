"""The files of an adapter folder, as a stranger uploaded them."""

import contextlib
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from adapters.manifest import AdapterNotFound, AdapterRefused, BaseShape, show
from adapters.mismatch import find_mismatches
from adapters.rope import RopeScaling
from adapters.strict_json import parse_json_object

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
SIDECAR_FILE = "turnout.json"
MAX_JSON_BYTES = 1 << 20
MAX_TEMPLATE_CHARS = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Sidecar:
    """turnout.json: what PEFT's config cannot say."""

    rope: dict[str, Any] | None = None
    chat_template: str | None = None
    training: dict[str, Any]
    mismatches: dict[str, str] = field(default_factory=dict)  # what the pusher chose to overlook


@contextlib.contextmanager
def open_regular(folder: Path, name: str) -> Iterator[BinaryIO]:
    """Open a plain file of an adapter folder: never a pipe or a device, which could block."""
    path = folder / name
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if name == WEIGHTS_FILE and (folder / "adapter_model.bin").exists():
            raise AdapterRefused(
                "adapter_model.bin", f"is a pickle; only {WEIGHTS_FILE} is read"
            ) from None
        raise AdapterNotFound(
            f"The adapter folder has no readable {name}: {error.strerror}."
        ) from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise AdapterRefused(name, "is not a plain file")
    with os.fdopen(handle, "rb") as file:
        yield file


def read_small(folder: Path, name: str) -> bytes:
    """Read a JSON file of the folder, up to a bound."""
    with open_regular(folder, name) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise AdapterRefused(name, f"is over {MAX_JSON_BYTES} bytes")
    return text


def read_sidecar(folder: Path, base: BaseShape, *, allow_mismatch: bool = False) -> Sidecar:
    """Read turnout.json where there is one: {"format": 1, "rope", "chat_template", "training"}.

    An adapter that was trained on another base, template or tokenizer is refused, unless
    `allow_mismatch` says that whoever pushes it knows.
    """
    if not (folder / SIDECAR_FILE).exists():
        return Sidecar(training={})
    fields = parse_json_object(read_small(folder, SIDECAR_FILE), SIDECAR_FILE)
    for name in fields.keys() - {"format", "rope", "chat_template", "training"}:
        raise AdapterRefused(show(name)[1:-1], f"is not a field of {SIDECAR_FILE}")
    if fields.get("format") != 1:
        raise AdapterRefused("format", f"of {SIDECAR_FILE} is {show(fields.get('format'))}, not 1")
    rope, template = fields.get("rope"), fields.get("chat_template")
    training = fields.get("training") or {}
    if template is not None and not (
        isinstance(template, str) and 0 < len(template) <= MAX_TEMPLATE_CHARS
    ):
        raise AdapterRefused("chat_template", f"is not a text of up to {MAX_TEMPLATE_CHARS} chars")
    if not isinstance(training, dict):
        raise AdapterRefused("training", f"{show(training)} is not an object")
    mismatches = find_mismatches(training, template, base)
    for name, difference in mismatches.items():
        if not allow_mismatch:
            raise AdapterRefused(name, f"{difference}; allow_mismatch takes it as it is")
    return Sidecar(
        rope=_rope(rope, base), chat_template=template, training=training, mismatches=mismatches
    )


def _rope(rope: object, base: BaseShape) -> dict[str, Any] | None:
    """RoPE settings in their one spelling: the base's own, or a scaling that is served."""
    if rope is None:
        return None
    if not isinstance(rope, dict):
        raise AdapterRefused("rope", f"{show(rope)} is not an object")
    if rope == base.rope:
        return rope
    kind = base.rope.get("rope_type", "default")
    if kind != "default":
        raise AdapterRefused("rope", f"{show(rope)} is not the base's, which has {kind} scaling")
    theta = float(base.rope.get("rope_theta", 10000.0))
    if rope.get("rope_type", rope.get("type", "default")) == "default":
        raise AdapterRefused("rope", f"{show(rope)} is not the base's ({show(dict(base.rope))})")
    return RopeScaling.read(rope, theta=theta).as_parameters(theta)
