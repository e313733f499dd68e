"""The pass over a base that merges: each linear changed in fp32, the rest copied.

Each linear is read, put on the NF4 grid and back where that is asked for, the delta is added in
fp32, and the sum is cast once to the base's dtype. One matrix is in memory at a time, and for the
drift one layer of either model.
"""

import contextlib
import itertools
import shutil
from collections.abc import Iterable
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from adapters.manifest import BaseShape
from server.quant import nf4
from training.merge_adapter import Lora, MergeAdapter
from training.merge_checkpoint import Checkpoint, Writer
from training.merge_drift import DriftMeter


class Merger:
    """One pass over the base, layer by layer."""

    def __init__(
        self,
        source: Checkpoint,
        adapter: MergeAdapter,
        writer: Writer,
        meter: DriftMeter,
        device: torch.device,
        *,
        to_nf4: bool,
    ) -> None:
        self._source, self._adapter, self._writer, self._meter = source, adapter, writer, meter
        self._device, self._to_nf4 = device, to_nf4

    @torch.inference_mode()
    def run(self, base: BaseShape, console: Console) -> None:
        """Write every tensor."""
        linears = {f"{name}.weight" for name in base.linear_names}
        layers = by_layer(self._source, base.num_layers)
        of_layers = [name for names in layers.values() for name in names]
        with (
            contextlib.closing(self._source.tensors(of_layers)) as tensors,
            Progress(console=console, transient=True, disable=not console.is_terminal) as bar,
        ):
            for prefix, names in bar.track(list(layers.items()), description="Merging"):
                self._layer(prefix, itertools.islice(tensors, len(names)), linears)
        for name in set(self._source) - set(of_layers):
            self._writer.copy(name)

    def _layer(
        self, prefix: str, tensors: Iterable[tuple[str, torch.Tensor]], linears: set[str]
    ) -> None:
        loras = {}
        for name, stored in tensors:
            lora = self._adapter.lora(name.removesuffix(".weight"), self._device)
            short = name.removeprefix(prefix)
            if lora is not None:
                loras[short.removesuffix(".weight")] = lora
            self._tensor(name, short, stored, lora, is_linear=name in linears)
        self._meter.run_layer(loras)

    def _tensor(
        self, name: str, short: str, stored: torch.Tensor, lora: Lora | None, *, is_linear: bool
    ) -> None:
        """Change and write one tensor of a layer, and show it to the meter."""
        weight = stored.to(self._device)
        if is_linear and self._to_nf4:
            weight = nf4.quantize(weight).dequantize(torch.float32)
        weight = weight.float()
        self._meter.set_unmerged(short, weight)
        if lora is not None:
            lora.add_to(weight)
        merged = weight.to(stored.dtype)
        self._meter.set_merged(short, merged)
        self._writer.write(name, merged)


def by_layer(source: Checkpoint, num_layers: int) -> dict[str, list[str]]:
    """The names of each layer's tensors, by the prefix that they share."""
    layers: dict[str, list[str]] = {f"model.layers.{layer}.": [] for layer in range(num_layers)}
    for name in sorted(source):
        prefix = ".".join(name.split(".")[:3]) + "."
        if prefix in layers:
            layers[prefix].append(name)
    return layers


def check_layout(source: Checkpoint, base: BaseShape, target: Path) -> None:
    """Refuse before anything is written: tensors that are not there, a disk that is too small."""
    for layer in range(base.num_layers):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            source.info(f"model.layers.{layer}.{norm}.weight")
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        source.info(name)
    for name in base.linear_names:
        shape = base.linears[name.split(".", 3)[3]]
        if source.info(f"{name}.weight").shape != shape:
            found = list(source.info(f"{name}.weight").shape)
            raise ValueError(f"{source.folder}: {name} has shape {found}, not {list(shape)}")
    free = shutil.disk_usage(target).free
    if source.num_bytes > free:
        raise ValueError(
            f"the merged checkpoint needs {source.num_bytes} bytes; {target} has {free}"
        )
