"""Reads what quantizers write: 4-bit checkpoints in the GPTQ and AWQ layouts, as plain weights."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from server.base_digest import SINGLE_FILE, read_index

_NIBBLES = torch.arange(0, 32, 4, dtype=torch.int32)
_INPUTS_AT_A_TIME = 64
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
    packed, zeros = read("qweight"), (_unpacked(read("qzeros")) + 1) & 15

    def codes(inputs: slice) -> torch.Tensor:
        words = packed[inputs.start // 8 : inputs.stop // 8]
        return ((words.unsqueeze(1) >> _NIBBLES[:, None]) & 15).flatten(0, 1)

    return _values(codes, zeros, read("scales").float(), read("g_idx").long())


def _awq(read: Read) -> torch.Tensor:
    """qweight [in, out / 8], qzeros [groups, out / 8], scales [groups, out]; eights shuffled."""
    packed, zeros = read("qweight"), _unpacked(read("qzeros"), _AWQ_ORDER)
    scales = read("scales").float()
    group_of = torch.arange(len(packed)) // (len(packed) // len(scales))
    return _values(lambda inputs: _unpacked(packed[inputs], _AWQ_ORDER), zeros, scales, group_of)


def _values(
    codes: Callable[[slice], torch.Tensor],
    zeros: torch.Tensor,
    scales: torch.Tensor,
    group_of: torch.Tensor,
) -> torch.Tensor:
    """(code - zero) * scale: [out, in] fp32, some inputs at a time, which stay in the caches.

    codes     gives those of a slice of inputs: [inputs, out]
    group_of  [in]: the row of zeros and scales, [groups, out]
    """
    weight = torch.empty(scales.shape[1], len(group_of))
    for first in range(0, len(group_of), _INPUTS_AT_A_TIME):
        inputs = slice(first, first + _INPUTS_AT_A_TIME)
        group = group_of[inputs]
        weight[:, inputs] = ((codes(inputs) - zeros[group]) * scales[group]).T
    return weight


_LAYOUTS = {"gptq": _gptq, "awq": _awq}


def _unpacked(packed: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
    """Eight 4-bit codes from each int32: [n, m] -> [n, 8 m], int32."""
    codes = (packed.unsqueeze(-1) >> _NIBBLES[list(order)]) & 15
    return codes.reshape(len(packed), -1)


def _shards(folder: Path) -> dict[str, str]:
    found = read_index(folder)
    if found is not None:
        return found
    if not (folder / SINGLE_FILE).is_file():
        raise ValueError(f"{folder} holds no {SINGLE_FILE}")
    with safe_open(folder / SINGLE_FILE, framework="pt") as shard:
        return dict.fromkeys(shard.keys(), SINGLE_FILE)
