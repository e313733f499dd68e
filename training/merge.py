"""`turnout merge`: fold an adapter into its base, tensor by tensor, and say what that changed.

What is said, refused and put in place is here; the arithmetic is in merge_pass.py. docs/merging.md
tells an operator all of it.
"""

import contextlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from rich.console import Console
from rich.table import Table

from adapters.manifest import BaseShape
from adapters.store import sync_folder
from server.versions import version_of
from training.folder_lock import scratch
from training.merge_adapter import MergeAdapter, open_adapter
from training.merge_checkpoint import (
    FOUR_BIT_REASON,
    Checkpoint,
    Writer,
    check_is_not_quantized,
    copy_side_files,
)
from training.merge_drift import Drift, DriftMeter, read_probes
from training.merge_pass import Merger, check_layout

PROVENANCE_FILE = "turnout.json"
_PACKAGES = ("bitsandbytes", "peft", "torch", "transformers", "turnout")
MergeBase = Literal["original", "dequantized"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeOptions:
    """What to merge into what, and where to."""

    adapter: str  # a PEFT folder, or what the store calls it: name or name@revision
    base: Path  # a 16- or 32-bit checkpoint folder
    base_name: str
    merge_base: str
    out: Path  # must not exist
    store: Path
    probe: Path | None = None  # texts with blank lines between; None: built-in conversations
    device: str = "auto"  # of the arithmetic; auto is cuda where there is one
    allow_other_base: bool = False

    def __post_init__(self) -> None:
        if self.merge_base not in get_args(MergeBase):
            reason = f"; {FOUR_BIT_REASON}" if "4" in self.merge_base else ""
            raise ValueError(
                f"--merge-base is {self.merge_base!r}; it must be original or dequantized{reason}"
            )
        if self.out.exists() or self.out.is_symlink():
            raise ValueError(f"--out is {str(self.out)!r}, which exists; name a new folder")
        if self.probe is not None and not self.probe.is_file():
            raise ValueError(f"--probe is {str(self.probe)!r}; it must be a text file")
        if self.device not in ("auto", "cuda", "cpu"):
            raise ValueError(f"--device is {self.device!r}; it must be auto, cuda or cpu")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("--device is 'cuda'; torch finds no GPU here")
        check_is_not_quantized(self.base)


def merge(options: MergeOptions, base_digest: str, console: Console) -> dict[str, Any]:
    """Write the merged checkpoint, whole or not at all, and return its provenance.

    Raises AdapterError for an adapter that does not fit, ValueError for a base that cannot be
    merged into, for NaN or Inf in the result, and while another process merges into `out`.
    """
    base = BaseShape.from_config(options.base, options.base_name, base_digest)
    with scratch(options.out.parent / f".{options.out.name}-merging") as folder:
        return _merge_in(folder, options, base, console)


def _merge_in(
    folder: Path, options: MergeOptions, base: BaseShape, console: Console
) -> dict[str, Any]:
    """Make the checkpoint in an empty folder, and put it in place."""
    made = folder / "checkpoint"
    made.mkdir()
    with open_adapter(
        options.adapter,
        base,
        options.store,
        folder / "staged",
        allow_other_base=options.allow_other_base,
    ) as adapter:
        copy_side_files(options.base, made, adapter.manifest.chat_template)
        drifts = _write_weights(options, adapter, base, made, console)
        provenance = _provenance(options, base, adapter, drifts)
    write_json(made / PROVENANCE_FILE, provenance)
    sync_files(made)
    if options.out.exists():
        raise ValueError(f"--out is {str(options.out)!r}, which exists by now")
    made.rename(options.out)
    sync_folder(options.out.parent)
    return provenance


def run(options: MergeOptions, base_digest: str, console: Console) -> None:
    """Merge, and print the drift."""
    provenance = merge(options, base_digest, console)
    table = Table("Probe", "Tokens", "Mean KL", "Max KL", "Same top token")
    for row in provenance["drift"]:
        table.add_row(
            row["probe"],
            str(row["num_tokens"]),
            f"{row['mean_kl']:.2e}",
            f"{row['max_kl']:.2e}",
            f"{row['top1_agreement']:.2%}",
        )
    console.print(table)
    console.print(
        f"Merged into {options.out} ({options.merge_base} base). KL is of the merged model "
        "against base and adapter apart, in nats a token.",
        markup=False,
        highlight=False,
    )


def _write_weights(
    options: MergeOptions, adapter: MergeAdapter, base: BaseShape, made: Path, console: Console
) -> list[Drift]:
    """One pass over the base: the output's weights, and the drift of the probes on their way."""
    device = _device(options.device)
    with contextlib.closing(Checkpoint(options.base)) as source:
        check_layout(source, base, options.out.parent)
        vocab_size = source.info("model.embed_tokens.weight").shape[0]
        probes = read_probes(made, options.probe, vocab_size)
        meter = DriftMeter(source, probes, device)
        with contextlib.closing(Writer(source, made)) as writer:
            to_nf4 = options.merge_base == "dequantized"
            Merger(source, adapter, writer, meter, device, to_nf4=to_nf4).run(base, console)
            writer.finish()
        return meter.drifts()


def _provenance(
    options: MergeOptions, base: BaseShape, adapter: MergeAdapter, drifts: list[Drift]
) -> dict[str, Any]:
    """Where the output comes from. No date and no path: the same merge gives the same bytes."""
    return {
        "format": 1,
        "kind": "merged",
        "base": {"name": base.name, "digest": base.digest},
        "adapter": {"digest": adapter.digest, "revision": adapter.revision},
        "merge_base": options.merge_base,
        "versions": {package: version_of(package) for package in _PACKAGES},
        "drift": [_rounded(drift) for drift in drifts],
    }


def _rounded(drift: Drift) -> dict[str, Any]:
    """Three digits: what another number of threads or another machine does not change."""
    return {
        key: float(f"{value:.2e}") if key.endswith("_kl") else value
        for key, value in asdict(drift).items()
    }


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object for a person to read."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sync_files(folder: Path) -> None:
    """Make every file of the folder survive a power cut."""
    for path in folder.iterdir():
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    sync_folder(folder)
