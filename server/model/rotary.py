"""The rotary tables that a step's tokens choose from: the base's, and those of scaled adapters."""

import math
from typing import Protocol

import torch

from server.kernels.fused import rotary_rows

BASE_TABLE = 0


class Scaling(Protocol):
    """How a table differs from the base's: `adapters.rope.RopeScaling`."""

    @property
    def rope_type(self) -> str:
        """linear or yarn."""

    @property
    def factor(self) -> float:
        """How much farther positions reach."""

    @property
    def original_max_position_embeddings(self) -> int:
        """yarn: positions before they were stretched."""

    @property
    def attention_factor(self) -> float:
        """yarn: cosines and sines are multiplied by it."""

    @property
    def beta_fast(self) -> float:
        """yarn: what turns more often over those positions stays."""

    @property
    def beta_slow(self) -> float:
        """yarn: what turns more seldom is stretched in full."""

    @property
    def truncate(self) -> bool:
        """yarn: whether the dimensions where that begins and ends are made whole."""


class RotaryTables:
    """Table 0 is the base's and never changes; the others are written as adapters need them.

    rows  [1 + num_scaled, max_positions, 2, head_dim / 2] fp32
    """

    def __init__(
        self,
        head_dim: int,
        theta: float,
        max_positions: int,
        num_scaled: int,
        device: torch.device,
    ) -> None:
        self._head_dim, self._theta, self._device = head_dim, theta, device
        shape = (1 + num_scaled, max_positions, 2, head_dim // 2)
        self.rows = torch.zeros(shape, dtype=torch.float32, device=device)
        self.rows[BASE_TABLE] = rotary_rows(frequencies(head_dim, theta), max_positions).to(device)
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def write(self, table: int, scaling: Scaling) -> None:
        """Fill a table that no later step reads as it was; done when this returns.

        On a GPU it is copied beside the steps, once those under way are done: they may still read
        what the table held before. Call it from a thread that may wait.
        """
        assert table != BASE_TABLE, "the base's table never changes"
        scaled = scaled_frequencies(self._head_dim, self._theta, scaling)
        rows = rotary_rows(scaled, self.rows.shape[1], scaling.attention_factor)
        if self._stream is None:
            self.rows[table] = rows
            return
        self._stream.wait_stream(torch.cuda.default_stream(self._device))
        with torch.cuda.stream(self._stream):
            self.rows[table].copy_(rows.pin_memory(), non_blocking=True)
        self._stream.synchronize()

    def look_up(self, positions: torch.Tensor, tables: torch.Tensor | None) -> torch.Tensor:
        """Rows of a step's tokens, [num_tokens, 2, head_dim / 2]; no tables: all the base's."""
        return self.rows[BASE_TABLE if tables is None else tables, positions]


def frequencies(head_dim: int, theta: float) -> torch.Tensor:
    """Radians from one position to the next, [head_dim / 2] fp32."""
    return 1.0 / _periods(head_dim, theta)


def scaled_frequencies(head_dim: int, theta: float, scaling: Scaling) -> torch.Tensor:
    """The same with linear or yarn scaling, in the order of transformers' operations."""
    if scaling.rope_type == "linear":  # arXiv:2306.15595
        return frequencies(head_dim, theta) / scaling.factor
    assert scaling.rope_type == "yarn", scaling.rope_type  # arXiv:2309.00071
    periods = _periods(head_dim, theta)
    stretched = 1.0 / (scaling.factor * periods)
    kept = 1.0 - _yarn_ramp(head_dim, theta, scaling)
    return stretched * (1.0 - kept) + (1.0 / periods) * kept


def _periods(head_dim: int, theta: float) -> torch.Tensor:
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return torch.pow(theta, exponents)


def _yarn_ramp(head_dim: int, theta: float, scaling: Scaling) -> torch.Tensor:
    """How far each frequency is stretched, 0 to 1: [head_dim / 2] fp32."""

    def dimension_of(num_turns: float) -> float:
        """Where a frequency turns so often over the original positions."""
        turns = scaling.original_max_position_embeddings / (num_turns * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    places = torch.arange(head_dim // 2, dtype=torch.float32)
    return ((places - low) / (high - low)).clamp(0, 1)
