"""Reads what quantizers write: 4-bit checkpoints in the GPTQ and AWQ layouts, as plain weights."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from training.merge_checkpoint import INDEX_FILE, SINGLE_FILE

_NIBBLES = torch.arange(0, 32, 4, dtype=torch.int32)
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where AWQ keeps the n-th of eight outputs
Read = Callable[[str], torch.Tensor]


class PackedCheckpoint:
    """The tensors of a quantized checkpoint, by name; linears as the numbers they stand for."""

    def __init__(self, folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        settings = config.get("quantization_config") or {}
        method = settings.get("quant_method")
        if method not in _LAYOUTS or settings.get("bits") != 4:
            raise ValueError(f"{folder} is no 4-bit GPTQ or AWQ checkpoint")
        if settings.get("checkpoint_format", "gptq") == "gptq_v2":
            raise ValueError(f"{folder} is in the layout gptq_v2, which is not read here")
        self.folder = folder
        self._unpack = _LAYOUTS[method]
        self._shard_of = _shards(folder)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard_of)

    def __contains__(self, name: str) -> bool:
        return name in self._shard_of

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor as it is stored. ValueError if there is none of this name."""
        if name not in self._shard_of:
            raise ValueError(f"{self.folder}: tensor {name} is missing")
        with safe_open(self.folder / self._shard_of[name], framework="pt") as shard:
            found: torch.Tensor = shard.get_tensor(name)
        return found

    def weight(self, linear: str) -> torch.Tensor:
        """The weight of a quantized linear, named without `.weight`: [out, in] fp32."""
        return self._unpack(lambda part: self.tensor(f"{linear}.{part}"))


def _gptq(read: Read) -> torch.Tensor:
    """qweight [in / 8, out], qzeros [groups, out / 8], scales [groups, out], g_idx [in].

    The layout keeps each zero point less one.
    """
    codes = _unpacked(read("qweight").T).T  # [in, out]
    zeros = (_unpacked(read("qzeros")) + 1) & 15  # [groups, out]
    group_of = read("g_idx").long()
    values = (codes - zeros[group_of]) * read("scales").float()[group_of]
    return values.T.contiguous()


def _awq(read: Read) -> torch.Tensor:
    """qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]; eights shuffled."""
    codes, zeros = (_unpacked(read(part), _AWQ_ORDER) for part in ("qweight", "qzeros"))
    scales = read("scales").float()
    group_size = len(codes) // len(scales)
    values = (codes - zeros.repeat_interleave(group_size, dim=0)) * scales.repeat_interleave(
        group_size, dim=0
    )
    return values.T.contiguous()


_LAYOUTS = {"gptq": _gptq, "awq": _awq}


def _unpacked(packed: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight 4-bit codes from each int32: [n, m] -> [n, 8 m], int32."""
    codes = (packed.unsqueeze(-1) >> _NIBBLES[list(order)]) & 15
    return codes.reshape(len(packed), -1)


def _shards(folder: Path) -> dict[str, str]:
    index = folder / INDEX_FILE
    if index.is_file():
        content: dict[str, Any] = json.loads(index.read_text(encoding="utf-8"))
        return dict(content["weight_map"])
    if not (folder / SINGLE_FILE).is_file():
        raise ValueError(f"{folder} holds no {SINGLE_FILE}")
    with safe_open(folder / SINGLE_FILE, framework="pt") as shard:
        return dict.fromkeys(shard.keys(), SINGLE_FILE)
