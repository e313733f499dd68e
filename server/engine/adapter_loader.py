"""A stored adapter as the bank takes it: stacked by fused group, scaling folded in."""

from collections import defaultdict
from pathlib import Path
from typing import Protocol

import msgspec
import torch
from safetensors import SafetensorError, safe_open

from adapters.manifest import AdapterManifest, ModuleEntry
from adapters.rope import scaling_of
from server.engine.request import AdapterRef
from server.model.adapter_bank import PackedAdapter
from server.model.linear import Linear, PackedLinear
from server.model.spec import FUSED, ModelSpec


class ResidentBase(Protocol):
    """What the loader needs of the base, whichever decoder holds it."""

    spec: ModelSpec

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""

    def linear(self, layer: int, group: str) -> Linear | PackedLinear:
        """One of its fused linears."""


class AdapterLoader:
    """Reads stored objects for one resident base."""

    def __init__(
        self, objects: Path, base: ResidentBase, dtype: torch.dtype, max_rank: int
    ) -> None:
        self._objects = objects
        self._base = base
        self._dtype = dtype
        self._max_rank = max_rank
        device = base.device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.inference_mode()
    def read(self, adapter: AdapterRef) -> PackedAdapter:
        """Read one adapter; OSError for no object or no memory.

        ValueError for a damaged object, and for one registered when higher ranks were served.
        """
        path = self._objects / f"{adapter.digest}.safetensors"
        if not path.exists():
            raise FileNotFoundError(f"adapter object {adapter.digest} is not in the store")
        try:
            with torch.cuda.stream(self._stream):  # on a GPU, beside the steps
                return self._read_object(path, adapter)
        except (SafetensorError, msgspec.DecodeError, KeyError, TypeError) as error:
            raise ValueError(f"adapter object {adapter.digest} is damaged: {error}") from error

    def _read_object(self, path: Path, adapter: AdapterRef) -> PackedAdapter:
        with safe_open(path, framework="pt") as stored:
            manifest = AdapterManifest.from_json(stored.metadata()["manifest"])
            if manifest.num_rank_rows != adapter.num_rank_rows:
                raise ValueError(
                    f"adapter object {adapter.digest} needs {manifest.num_rank_rows} rows"
                )
            if manifest.max_rank > self._max_rank:
                raise ValueError(
                    f"adapter object {adapter.digest} has rank {manifest.max_rank}; this server "
                    f"takes {self._max_rank} (serve --max-rank)"
                )
            if scaling_of(manifest.rope) != adapter.rope:
                raise ValueError(f"adapter object {adapter.digest} has RoPE {manifest.rope}")
            is_pinned = self._stream is not None
            try:
                packed = _empty(manifest, self._base.spec, self._dtype, is_pinned=is_pinned)
            except (MemoryError, RuntimeError) as error:  # torch's words for the same
                text = f"no host memory for adapter object {adapter.digest}: {error}"
                raise OSError(text) from error
            for module in manifest.modules:
                self._place(module, stored, packed)
        return packed

    def _place(self, module: ModuleEntry, stored: safe_open, packed: PackedAdapter) -> None:
        """Copy one module's matrices to where they belong, each in one pass."""
        group, index = _place_of(module.linear)
        lora_a = stored.get_tensor(f"{module.prefix}.lora_a")  # [rank, in]
        lora_b = stored.get_tensor(f"{module.prefix}.lora_b")  # [out, rank]
        columns = _columns(self._base.spec, group, index)
        placed = packed.lora_a[group][module.layer, index, : module.rank]
        scaled = packed.lora_b[group][module.layer, columns, : module.rank]
        if (lora_a.shape, lora_b.shape) != (placed.shape, scaled.shape):
            raise TypeError(f"{module.prefix} has another shape")
        placed.copy_(lora_a)
        exact = torch.promote_types(lora_b.dtype, scaled.dtype)  # rounded once, at the end
        torch.mul(lora_b.to(exact), module.scaling, out=scaled)
        if module.use_dora:
            assert packed.gain_row is not None, "a DoRA module outside a DoRA adapter"
            magnitude = stored.get_tensor(f"{module.prefix}.magnitude").float()
            linear = self._base.linear(module.layer, group)
            lora_a, lora_b = lora_a.float(), lora_b.float().T * module.scaling
            gain = dora_gain(linear, columns, lora_a, lora_b, magnitude, self._base.dtype)
            packed.lora_b[group][module.layer, columns, packed.gain_row] = gain - 1


def dora_gain(
    linear: Linear | PackedLinear,
    columns: slice,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    magnitude: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """magnitude / ||W + BA|| for each output (DoRA, arXiv:2402.09353), without unpacking W.

        ||W + BA||^2 = ||W||^2 + 2 <W, BA> + ||BA||^2,  <W, BA>[o] = sum_r B[o, r] (A W^T)[r, o]

    lora_a   [rank, in] fp32
    lora_b   [rank, out] fp32, scaling folded in
    returns  [out] fp32, in host memory
    """
    device = linear.row_norms_squared.device
    lora_a, lora_b, magnitude = (t.to(device) for t in (lora_a, lora_b, magnitude))
    a_times_w = linear(lora_a.to(dtype))[:, columns].float()  # [rank, out]
    cross = (lora_b * a_times_w).sum(dim=0)
    delta = (lora_b * (lora_a @ lora_a.T @ lora_b)).sum(dim=0)
    norm = (linear.row_norms_squared[columns] + 2 * cross + delta).clamp_min(0).sqrt()
    return (magnitude / norm).cpu()


def _empty(
    manifest: AdapterManifest,
    spec: ModelSpec,
    dtype: torch.dtype,
    *,
    is_pinned: bool,
) -> PackedAdapter:
    """Memory for each fused group that the adapter touches: zeros, unless it fills all of it."""
    num_rows = manifest.num_rank_rows
    lora_a: dict[str, torch.Tensor] = {}
    lora_b: dict[str, torch.Tensor] = {}
    ranks = defaultdict[str, list[int]](list)
    for module in manifest.modules:
        ranks[_place_of(module.linear)[0]].append(module.rank)
    for group, found in ranks.items():
        num_layers, width = spec.num_layers, sum(spec.out_splits(group))
        is_filled = found == [num_rows] * (num_layers * len(FUSED[group]))
        make = torch.empty if is_filled else torch.zeros
        shape_a = (num_layers, len(FUSED[group]), num_rows, spec.in_features(group))
        lora_a[group] = make(shape_a, dtype=dtype, pin_memory=is_pinned)
        shape_b = (num_layers, width, num_rows)
        lora_b[group] = make(shape_b, dtype=dtype, pin_memory=is_pinned)
    gain_row = num_rows - 1 if manifest.use_dora else None
    return PackedAdapter(lora_a, lora_b, num_rows, gain_row)


def _place_of(linear: str) -> tuple[str, int]:
    """The fused group of a linear, and its place in the stack."""
    for group, names in FUSED.items():
        if linear in names:
            return group, names.index(linear)
    raise ValueError(f"no linear is called {linear}")


def _columns(spec: ModelSpec, group: str, index: int) -> slice:
    """The output columns of one stacked linear."""
    widths = spec.out_splits(group)
    first = sum(widths[:index])
    return slice(first, first + widths[index])
