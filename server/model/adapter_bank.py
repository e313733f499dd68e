"""The tensors behind resident adapters: their rank rows, end to end, at true rank."""

from dataclasses import dataclass

import torch

from server.kernels.lora import LoraRows, rows_index
from server.model.spec import FUSED, ModelSpec

GroupKey = tuple[int, str]  # layer, fused group

_MAX_KEPT_SETS = 4  # of rows, over all linears; a batch has the same ones for many steps
_MAX_STACKED_ROWS = 32


@dataclass(frozen=True, slots=True)
class PackedAdapter:
    """One adapter at its true rank in host memory (pinned for a GPU), ready for the bank.

    lora_a     fused group -> [num_layers, num_sublinears, num_rows, in]
    lora_b     fused group -> [num_layers, out, num_rows], scaling folded in: the way adapters are
               stored, for the bank's device turns it around faster than the host
    num_rows   the highest rank, and one more for DoRA's gain
    gain_row   which of the rows holds DoRA's gain - 1 in lora_b; None without DoRA
    A group that the adapter leaves alone is absent.
    """

    lora_a: dict[str, torch.Tensor]
    lora_b: dict[str, torch.Tensor]
    num_rows: int
    gain_row: int | None

    @property
    def num_bytes(self) -> int:
        """Host memory that it takes: torch pins it by powers of two."""
        tensors = [*self.lora_a.values(), *self.lora_b.values()]
        return sum(
            1 << (tensor.nbytes - 1).bit_length() if tensor.is_pinned() else tensor.nbytes
            for tensor in tensors
        )


class AdapterBank:
    """Rank rows for every layer and fused group, handed out in pages by the adapter cache.

    lora_a[layer, group]  [num_sublinears, num_rows, in]
    lora_b[layer, group]  [num_rows, out]
    """

    def __init__(
        self, spec: ModelSpec, num_rows: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_rows = num_rows
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._out_splits = {group: spec.out_splits(group) for group in FUSED}
        self._kept: dict[tuple[GroupKey, int, int], LoraRows] = {}
        self._all_a: dict[str, torch.Tensor] = {}  # of all layers, in one tensor a group
        self._all_b: dict[str, torch.Tensor] = {}
        for group, linears in FUSED.items():
            a_shape = (spec.num_layers, len(linears), num_rows, spec.in_features(group))
            b_shape = (spec.num_layers, num_rows, sum(spec.out_splits(group)))
            self._all_a[group] = torch.zeros(a_shape, dtype=dtype, device=device)
            self._all_b[group] = torch.zeros(b_shape, dtype=dtype, device=device)
        keys = [(layer, group) for layer in range(spec.num_layers) for group in FUSED]
        self.lora_a = {(layer, group): self._all_a[group][layer] for layer, group in keys}
        self.lora_b = {(layer, group): self._all_b[group][layer] for layer, group in keys}

    def rows(self, key: GroupKey, rows: slice | torch.Tensor) -> LoraRows:
        """A step's rows of one linear, for `add_lora`; kept for the next step if they are few."""
        if not isinstance(rows, slice):
            return self._select(key, rows)
        name = (key, rows.start, rows.stop)
        found = self._kept.get(name)
        if found is None:
            if len(self._kept) >= _MAX_KEPT_SETS * len(self.lora_a):
                self._kept.clear()
            is_small = rows.stop - rows.start <= _MAX_STACKED_ROWS
            found = self._stack(key, rows) if is_small else self._select(key, rows)
            self._kept[name] = found
        return found

    def _select(self, key: GroupKey, rows: slice | torch.Tensor) -> LoraRows:
        """One product for each sublinear: views of the bank if the rows are neighbours."""
        lora_a, lora_b = self.lora_a[key], self.lora_b[key]
        found: LoraRows = []
        first = 0
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

    def write(self, rows: list[int], adapter: PackedAdapter) -> None:
        """Copy an adapter into rows that no later step reads; done when this returns.

        Rows past the adapter's own, to the end of its last page, become zero.
        On a GPU it goes on beside the steps, once those under way are done: they may still read
        what these rows held before. Call it from a thread that may wait.
        """
        if self._stream is None:
            self._copy(rows, adapter)
        else:
            self._stream.wait_stream(torch.cuda.default_stream(self._device))
            with torch.cuda.stream(self._stream):
                self._copy(rows, adapter)
            self._stream.synchronize()
        self._kept.clear()  # stacked copies of what these rows held; no step used them meanwhile

    def _copy(self, rows: list[int], adapter: PackedAdapter) -> None:
        index = rows_index(rows, self._device)
        own = rows_index(rows[: adapter.num_rows], self._device)
        for group, bank_a in self._all_a.items():
            bank_b = self._all_b[group]
            if group not in adapter.lora_a or adapter.num_rows < len(rows):
                bank_a[:, :, index] = 0
                bank_b[:, index] = 0
            if group in adapter.lora_a:
                bank_a[:, :, own] = adapter.lora_a[group].to(self._device, non_blocking=True)
                lora_b = adapter.lora_b[group].to(self._device, non_blocking=True)
                bank_b[:, own] = lora_b.transpose(1, 2)


def bank_row_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Memory of one rank row over all layers and groups."""
    per_layer = sum(
        len(linears) * spec.in_features(group) + sum(spec.out_splits(group))
        for group, linears in FUSED.items()
    )
    return spec.num_layers * per_layer * dtype.itemsize
