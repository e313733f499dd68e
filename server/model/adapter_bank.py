"""The tensors behind resident adapters: their rank rows, end to end, at true rank."""

from dataclasses import dataclass

import torch

from server.model.spec import FUSED, ModelSpec

GroupKey = tuple[int, str]  # layer, fused group


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
        self.lora_a: dict[GroupKey, torch.Tensor] = {}
        self.lora_b: dict[GroupKey, torch.Tensor] = {}
        for layer in range(spec.num_layers):
            for group, linears in FUSED.items():
                a_shape = (len(linears), num_rows, spec.in_features(group))
                b_shape = (num_rows, sum(spec.out_splits(group)))
                self.lora_a[layer, group] = torch.zeros(a_shape, dtype=dtype, device=device)
                self.lora_b[layer, group] = torch.zeros(b_shape, dtype=dtype, device=device)

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


def bank_row_bytes(spec: ModelSpec, dtype: torch.dtype) -> int:
    """Memory of one rank row over all layers and groups."""
    per_layer = sum(
        len(linears) * spec.in_features(group) + sum(spec.out_splits(group))
        for group, linears in FUSED.items()
    )
    return spec.num_layers * per_layer * dtype.itemsize
