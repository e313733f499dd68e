"""Linears that read the same input, as one matrix product with their LoRA inside it.

A group's matrix holds its weights in 16 bits and LoRA beside them, in memory that all groups share:

        in columns    width columns
      +-------------+---------------+
  out |   weights   | scaling * B   |     y  = [x | h] @ upper.T,    h = x @ A.T
      +-------------+---------------+     dx = [dy | g] @ left,      g = dy @ (scaling * B)
width |      A      |   not read    |     dA = g.T @ x,  dB = scaling * dy.T @ h
      +-------------+---------------+

So LoRA costs four thin products and no pass over y or dx of its own. `x` and `dy` live in rows that
leave room for h and g (`roomy`). Where q, k and v have adapters of rank 16, width is 64: three
blocks of 16 columns, each used by its own rows, and padding.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from server.quant.nf4 import NF4Tensor
from training.fast.ops import PLAIN, Ops

WIDTH_STEP = 64  # rows of a matrix begin at multiples of 128 bytes


@dataclass(frozen=True, slots=True)
class Part:
    """One linear of a group."""

    weight: NF4Tensor | torch.Tensor  # [out, in]
    lora_a: torch.Tensor | None  # [rank, in] fp32
    lora_b: torch.Tensor | None  # [out, rank] fp32
    scaling: float

    @classmethod
    def of(cls, module: Any) -> "Part":
        """From PEFT's module around a linear, or from the bare linear."""
        base = getattr(module, "base_layer", module)
        if base is module:
            return cls(_weight(base), None, None, 0.0)
        (name,) = module.active_adapters
        return cls(
            _weight(base),
            module.lora_A[name].weight,
            module.lora_B[name].weight,
            float(module.scaling[name]),
        )

    @property
    def rank(self) -> int:
        """LoRA's r, 0 without."""
        return 0 if self.lora_a is None else self.lora_a.shape[0]


class Group:
    """Linears side by side: y of one follows y of the other."""

    def __init__(self, modules: Iterable[Any], *, is_widest: bool = False) -> None:
        self.is_widest = is_widest
        self.parts = [Part.of(module) for module in modules]
        self.out_features = sum(part.weight.shape[0] for part in self.parts)
        self.in_features = self.parts[0].weight.shape[1]
        ranks = sum(part.rank for part in self.parts)
        self.width = -(-ranks // WIDTH_STEP) * WIDTH_STEP

    @property
    def num_elements(self) -> int:
        """Of the group's matrix."""
        return (self.out_features + self.width) * (self.in_features + self.width)

    def parameters(self) -> list[torch.nn.Parameter]:
        """What is trained: A and B of each part that has them."""
        found: list[Any] = []
        for part in self.parts:
            found += [] if part.lora_a is None else [part.lora_a, part.lora_b]
        return found

    def fill(self, ops: Ops, matrix: torch.Tensor) -> None:
        """Write weights and LoRA into the matrix."""
        row, column = 0, 0
        for number, part in enumerate(self.parts):
            is_last = number == len(self.parts) - 1
            lora = None
            if part.lora_a is not None and part.lora_b is not None:
                lora = part.lora_a.detach(), part.lora_b.detach(), part.scaling
            write = ops.fill if isinstance(part.weight, NF4Tensor) else PLAIN.fill
            write(
                part.weight,
                lora,
                matrix,
                first_row=row,
                first_a_row=self.out_features + column,
                first_b_column=column,
                num_a_rows=self.width - column if is_last else part.rank,
            )
            row, column = row + part.weight.shape[0], column + part.rank

    def shrink(self, matrix: torch.Tensor, x: torch.Tensor) -> None:
        """Put h beside x: [num_tokens, in + width]."""
        if self.width:
            lora_a = matrix[self.out_features :, : self.in_features]
            torch.mm(x[:, : self.in_features], lora_a.t(), out=x[:, self.in_features :])

    def forward(
        self,
        matrix: torch.Tensor,
        x: torch.Tensor,
        *,
        residual: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """y [num_tokens, out], from x with h beside it."""
        upper = matrix[: self.out_features].t()
        if residual is not None:
            return torch.addmm(residual, x, upper)
        return torch.mm(x, upper) if out is None else torch.mm(x, upper, out=out)

    def backward(
        self, matrix: torch.Tensor, dy: torch.Tensor, *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """dx [num_tokens, in]; puts g beside dy [num_tokens, out + width]."""
        if self.width:
            lora_b = matrix[: self.out_features, self.in_features :]
            torch.mm(dy[:, : self.out_features], lora_b, out=dy[:, self.out_features :])
        left = matrix[:, : self.in_features]
        return torch.mm(dy, left) if out is None else torch.mm(dy, left, out=out)

    def gradients(self, dy: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor]:
        """Of `parameters()`, fp32, from dy with g and x with h beside them."""
        return self.gradients_apart(dy, x[:, : self.in_features], x[:, self.in_features :])

    def gradients_apart(
        self, dy: torch.Tensor, x: torch.Tensor, h: torch.Tensor
    ) -> list[torch.Tensor]:
        """The same where x and h are not side by side."""
        if not self.width:
            return []
        d_a = _product(dy[:, self.out_features :].t(), x)
        d_b = _product(dy[:, : self.out_features].t(), h)
        found = []
        row, column = 0, 0
        for part in self.parts:
            rows, columns = part.weight.shape[0], part.rank
            if columns:  # copies, or the thin gradients would keep the wide ones alive
                found.append(d_a[column : column + columns].clone())
                found.append(
                    (d_b[row : row + rows, column : column + columns] * part.scaling).contiguous()
                )
            row, column = row + rows, column + columns
        return found


class Workspace:
    """Memory for two matrices: one of the widest groups, and one of the others."""

    def __init__(
        self, groups: list[Group], ops: Ops, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.ops = ops
        self._memory = [
            torch.empty(
                max(group.num_elements for group in groups if group.is_widest == is_widest),
                dtype=dtype,
                device=device,
            )
            for is_widest in (False, True)
        ]
        self._held: list[Group | None] = [None, None]

    def forget(self) -> None:
        """What is trained has changed: write every matrix again."""
        self._held = [None, None]

    def matrix(self, group: Group) -> torch.Tensor:
        """The group's matrix, written again unless it is still there."""
        which = int(group.is_widest)
        shape = (group.out_features + group.width, group.in_features + group.width)
        matrix = self._memory[which][: group.num_elements].view(shape)
        if self._held[which] is not group:
            group.fill(self.ops, matrix)
            self._held[which] = group
        return matrix


def roomy(like: torch.Tensor, features: int, group: Group) -> torch.Tensor:
    """Memory for [num_tokens, features] that is `group`'s x or dy, with room for its h or g."""
    return like.new_empty(like.shape[0], features + group.width)


def with_room(dy: torch.Tensor, group: Group) -> torch.Tensor:
    """The same dy with room for g: its own memory if it came from `roomy`, else a copy."""
    num_tokens, features = dy.shape
    stride = features + group.width
    end = (dy.storage_offset() + num_tokens * stride) * dy.element_size()
    if dy.stride() == (stride, 1) and end <= dy.untyped_storage().nbytes():
        return dy.as_strided((num_tokens, stride), (stride, 1))
    copy = roomy(dy, features, group)
    copy[:, :features] = dy
    return copy


def _product(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """one @ other in fp32."""
    if one.is_cuda and one.dtype != torch.float32:
        return torch.mm(one, other, out_dtype=torch.float32)
    return torch.mm(one, other).float()


def _weight(linear: Any) -> NF4Tensor | torch.Tensor:
    """A linear's weight as it is held."""
    weight: torch.Tensor = linear.weight.detach()
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return weight
    out_features, in_features = linear.out_features, linear.in_features
    return NF4Tensor(
        qweight=weight.view(out_features, in_features // 2),
        absmax_codes=state.absmax,
        absmax_scales=state.state2.absmax,
        absmax_levels=state.state2.code,
        absmax_offset=state.offset,
        levels=state.code,
    )
