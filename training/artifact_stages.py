"""One candidate for an artifact, stage by stage; each leaves something that a restart finds."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console

from server.base_digest import base_digest
from training.calibration import Calibration, CalibrationOptions
from training.gate import Figures, run_gate
from training.merge import PROVENANCE_FILE, MergeOptions, merge, write_json
from training.merge_adapter import MergeAdapter
from training.quantize import QuantizeOptions, quantize

Stage = Literal["merge", "quantize", "gate"]
STAGES: tuple[Stage, ...] = ("merge", "quantize", "gate")
SHARES = {"merge": 0.1, "quantize": 0.8, "gate": 0.1}  # of the time that a candidate takes

OnStage = Callable[[Stage, float, str], None]  # stage, how far it is (0 to 1), a few words


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What all candidates of one artifact have in common."""

    adapter: MergeAdapter
    source: str  # what the adapter was asked for as
    base: Path
    base_name: str
    base_digest: str
    store: Path
    calibration: Calibration
    options: CalibrationOptions
    group_size: int
    device: str
    backend: str
    iterations: int
    python: Path
    allow_other_base: bool


class Candidate:
    """The adapter merged into one of the two bases, quantized and measured, in a folder of its own.

    folder/merged      the merged checkpoint; gone once it is quantized
    folder/quantized   the artifact
    folder/gate.json   what the gate measured: the last thing to appear
    """

    def __init__(self, recipe: Recipe, merge_base: str, folder: Path) -> None:
        self.merge_base, self.quantized = merge_base, folder / "quantized"
        self._recipe, self._folder = recipe, folder
        self._merged, self._gate = folder / "merged", folder / "gate.json"

    def make(self, on_stage: OnStage) -> Figures:
        """Do what is left to do, and return the gate's figures."""
        self._folder.mkdir(exist_ok=True)
        if not self.quantized.exists():
            on_stage("merge", 0.0, f"merging into the {self.merge_base} base")
            self._merge()
            on_stage("quantize", 0.0, "starting the quantizer")
            self._quantize(on_stage)
        shutil.rmtree(self._merged, ignore_errors=True)
        if not self._gate.exists():
            on_stage("gate", 0.0, "comparing with the adapter path")
            self._measure(on_stage)
        on_stage("gate", 1.0, "compared with the adapter path")
        stored = json.loads(self._gate.read_text(encoding="utf-8"))
        return Figures(**{each.name: stored[each.name] for each in fields(Figures)})

    def provenance(self) -> dict[str, Any]:
        """What the quantizer's stage wrote down, the merge's inside it."""
        found = json.loads((self.quantized / PROVENANCE_FILE).read_text(encoding="utf-8"))
        # Of an artifact already, where a call was killed just before it was put in place.
        return dict(found["quantized"] if found["kind"] == "artifact" else found)

    def _merge(self) -> None:
        if not self._merged.exists():
            self._merge_anew()
        recipe = self._recipe
        made = json.loads((self._merged / PROVENANCE_FILE).read_text(encoding="utf-8"))
        if made["adapter"]["digest"] != recipe.adapter.digest:
            shutil.rmtree(self._merged)  # or the next call would take it for this adapter's
            raise ValueError(f"the adapter {recipe.source} was changed while it was being merged")

    def _merge_anew(self) -> None:
        recipe = self._recipe
        options = MergeOptions(
            adapter=recipe.adapter.revision or recipe.source,
            base=recipe.base,
            base_name=recipe.base_name,
            merge_base=self.merge_base,
            out=self._merged,
            store=recipe.store,
            device=recipe.device,
            allow_other_base=recipe.allow_other_base,
        )
        merge(options, recipe.base_digest, Console(quiet=True))

    def _quantize(self, on_stage: OnStage) -> None:
        recipe = self._recipe
        options = QuantizeOptions(
            model=self._merged,
            out=self.quantized,
            calibration=recipe.options,
            group_size=recipe.group_size,
            iterations=recipe.iterations,
            device=recipe.device,
            backend=recipe.backend,
            python=recipe.python,
            work=self._folder / "quantizing",
        )

        def on_layer(done: int, of: int) -> None:
            on_stage("quantize", done / of, f"quantized layer {done} of {of}")

        quantize(options, base_digest(self._merged), on_layer, recipe.calibration)

    def _measure(self, on_stage: OnStage) -> None:
        recipe = self._recipe

        def on_layer(done: int, of: int) -> None:
            on_stage("gate", done / of, f"compared layer {done} of {of}")

        figures = run_gate(
            recipe.base,
            recipe.adapter,
            self.quantized,
            recipe.calibration.held_out,
            device=pick_device(recipe.device),
            on_layer=on_layer,
        )
        part = self._gate.with_suffix(".part")
        write_json(part, asdict(figures))
        part.rename(self._gate)


def pick_device(name: str) -> torch.device:
    """auto is the GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)
