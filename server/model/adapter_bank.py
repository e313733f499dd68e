"""The tensors behind resident adapters: their rank rows, end to end, at true rank."""

from dataclasses import dataclass

import torch

from server.kernels.lora import LoraRows
from server.model.spec import FUSED, ModelSpec

GroupKey = tuple[int, str]  # layer, fused group

_MAX_KEPT = 4096  # selections: about 30 sets of rows over 30 layers
_MAX_STACKED_ROWS = 32


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """One adapter in the bank's layout, in host memory, padded to whole pages.

    lora_a     (layer, group) -> [num_sublinears, num_rows, in]
    lora_b     (layer, group) -> [num_rows, out], scaling folded in
    gain_row   which of the rows holds DoRA's gain - 1 in lora_b; None without DoRA
    A group that the adapter leaves alone is absent.
    """

    lora_a: dict[GroupKey, torch.Tensor]
    lora_b: dict[GroupKey, torch.Tensor]
    num_rows: int
    gain_row: int | None

    @property
    def num_bytes(self) -> int:
        """Host memory that it takes."""
        tensors = [*self.lora_a.values(), *self.lora_b.values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class AdapterBank:
    """Rank rows for every layer and fused group, handed out in pages by the adapter cache.

    lora_a[layer, group]  [num_sublinears, num_rows, in]
    lora_b[layer, group]  [num_rows, out]
    """

    def __init__(
        self, spec: ModelSpec, num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_rows = num_rows
        self._out_splits = {group: spec.out_splits(group) for group in FUSED}
        self._kept: dict[tuple[GroupKey, int, int], LoraRows] = {}
        self.lora_a: dict[GroupKey, torch.Tensor] = {}
        self.lora_b: dict[GroupKey, torch.Tensor] = {}
        for layer in range(spec.num_layers):
            for group, linears in FUSED.items():
                a_shape = (len(linears), num_rows, spec.in_features(group))
                b_shape = (num_rows, sum(spec.out_splits(group)))
                self.lora_a[layer, group] = torch.zeros(a_shape, dtype=dtype, device=device)
                self.lora_b[layer, group] = torch.zeros(b_shape, dtype=dtype, device=device)

    def rows(self, key: GroupKey, rows: slice | torch.Tensor) -> LoraRows:
        """A step's rows of one linear, for `add_lora`; kept for the next step if they are few."""
        if not isinstance(rows, slice):
            return self._select(key, rows)
        name = (key, rows.start, rows.stop)
        if name not in self._kept:
            if len(self._kept) >= _MAX_KEPT:
                self._kept.clear()
            is_small = rows.stop - rows.start <= _MAX_STACKED_ROWS
            self._kept[name] = self._stack(key, rows) if is_small else self._select(key, rows)
        return self._kept[name]

    def _select(self, key: GroupKey, rows: slice | torch.Tensor) -> LoraRows:
        """One product for each sublinear: views of the bank if the rows are neighbours."""
        lora_a, lora_b = self.lora_a[key], self.lora_b[key]
        found, first = [], 0
        for sublinear, width in enumerate(self._out_splits[key[1]]):
            columns = slice(first, first + width)
            found.append((lora_a[sublinear, rows].T, lora_b[rows, columns], columns))
            first += width
        return found

    def _stack(self, key: GroupKey, rows: slice) -> LoraRows:
        """One product for all sublinears: for few rows fewer calls outweigh B's zeros."""
        parts = self._select(key, rows)
        lora_b = torch.block_diag(*(b for _, b, _ in parts))
        return [(torch.cat([a for a, _, _ in parts], dim=1), lora_b, None)]

    def write(self, rows: slice | torch.Tensor, adapter: PackedAdapter) -> None:
        """Copy an adapter into rows that no step reads: a slice, or [num_rows] int64."""
        for key, bank_a in self.lora_a.items():
            bank_b = self.lora_b[key]
            if key not in adapter.lora_a:
                bank_a[:, rows] = 0
                bank_b[rows] = 0
                continue
            bank_a[:, rows] = adapter.lora_a[key].to(bank_a.device, non_blocking=True)
            bank_b[rows] = adapter.lora_b[key].to(bank_b.device, non_blocking=True)
        self._kept.clear()  # stacked copies of what these rows held; no step used them meanwhile


def bank_row_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Memory of one rank row over all layers and groups."""
    per_layer = sum(
        len(linears) * spec.in_features(group) + sum(spec.out_splits(group))
        for group, linears in FUSED.items()
    )
    return spec.num_layers * per_layer * dtype.itemsize
