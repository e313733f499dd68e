"""Config as bytes, for the engine process's standard input."""

from pathlib import Path
from typing import Any

import msgspec

from server.config import Config


def encode_config(config: Config) -> bytes:
    """JSON, paths as absolute strings."""
    return msgspec.json.encode(config, enc_hook=_path_to_string)


def decode_config(data: bytes) -> Config:
    """What `encode_config` wrote; its checks run again."""
    return msgspec.json.decode(data, type=Config, dec_hook=_string_to_path)


def _path_to_string(value: Any) -> str:
    assert isinstance(value, Path), f"config holds a {type(value)}"
    return str(value.absolute())


def _string_to_path(kind: type, value: Any) -> Path:
    assert kind is Path, f"config wants a {kind}"
    return Path(value)
