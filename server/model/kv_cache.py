"""The tensors behind KV blocks."""

import torch

from server.model.spec import ModelSpec


class KVCache:
    """`k[layer]` and `v[layer]` are [num_blocks, block_size, num_kv_heads, head_dim]."""

    def __init__(
        self,
        spec: ModelSpec,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (spec.num_layers, num_blocks, block_size, spec.num_kv_heads, spec.head_dim)
        # Zeros: attention multiplies masked values by 0, and 0 * garbage may be NaN.
        self.k = torch.zeros(shape, dtype=dtype, device=device).unbind()
        self.v = torch.zeros(shape, dtype=dtype, device=device).unbind()


def block_bytes(spec: ModelSpec, block_size: int, dtype: torch.dtype) -> int:
    """Memory of one block over all layers."""
    per_token = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * dtype.itemsize
    return per_token * block_size
