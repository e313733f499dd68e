"""From an adapter to a model of its own: merge, quantize, gate; whole or not at all.

This is what a promotion runs, in a process of its own. docs/merging.md tells an operator all of it.
"""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from adapters.manifest import BaseShape
from adapters.store import sync_folder
from server.base_digest import base_digest as folder_digest
from training.artifact_stages import SHARES, STAGES, Candidate, Recipe, Stage
from training.calibration import Calibration, CalibrationOptions, load_calibration
from training.folder_lock import scratch
from training.gate import GateReport, Thresholds
from training.merge import sync_files, write_json
from training.merge_adapter import MergeAdapter, open_adapter
from training.merge_checkpoint import Checkpoint
from training.quantize import ITERATIONS, claim, iterations_of
from training.quantize_groups import choose_group_size
from training.quantize_run import choose_backend, find_python

ARTIFACT_FILE = "turnout.json"  # in the artifact's folder: `ArtifactReport.provenance`
MERGE_BASES = ("original", "dequantized")
_HINT = ". Backend auto-round rounds closer, and takes longer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """How far the making of an artifact is."""

    stage: Stage
    merge_base: str  # original or dequantized; with "auto" every stage comes once for each
    total: float  # of the whole call, 0 to 1; never falls
    note: str  # a few words for a person: "quantized layer 3 of 30"


class GateFailed(ValueError):
    """Every candidate fell through the quality gate; nothing was put in place."""

    def __init__(self, report: dict[str, Any]) -> None:
        super().__init__(report["message"])
        self.report = report  # as JSON: "message", "candidates" (merge base -> GateReport's JSON)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactReport:
    """An artifact that is in its place."""

    folder: Path
    digest: str  # sha256 over config.json and weights, as server.base_digest counts them
    adapter_digest: str
    base_digest: str
    merge_base: str  # the one that won
    group_size: int
    num_bytes: int  # of the folder
    provenance: dict[str, Any]  # what turnout.json in the folder holds


def make_artifact(
    adapter: str,
    base: Path,
    out: Path,
    *,
    base_name: str,
    base_digest: str,
    store: Path,
    work: Path,
    merge_base: Literal["auto", "original", "dequantized"] = "auto",
    group_size: int = 0,
    rows: Path | None = None,
    eval_rows: Path | None = None,
    text: Path | None = None,
    text_share: float = 0.5,
    num_tokens: int = 16384,
    gate: Thresholds | Mapping[str, float] | None = None,
    seed: int = 0,
    device: str = "auto",
    backend: str = "auto",
    iterations: int = ITERATIONS,
    quantizer: Path | None = None,
    allow_other_base: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> ArtifactReport:
    """Merge, quantize (GPTQ, 4 bit) and gate; `out` appears by one rename when all has passed.

    adapter       a PEFT folder, or what the store at `store` calls it: name, name@revision
    base          the 16-bit checkpoint; `base_digest` is its digest, `base_name` what it is called
    work          folder, on the file system of `out`, for what finished stages leave. Called again
                  with the same arguments after a kill at any point, those are not done again; gone
                  once `out` is there, kept on any failure (delete it to give up)
    merge_base    "auto" makes both, and the one with the lower loss on the held-out rows wins
    group_size    32, 64 or 128; 0 is the largest that divides every layer's input width
    rows          the adapter's training rows: calibration, and the gate's held-out rows
    eval_rows     held-out rows of a file of their own
    text          general text to calibrate on, beside the rows (`text_share` of the tokens) or
                  instead of them (the gate then holds out some of it)
    gate          training.gate.Thresholds, or some of its fields by name; None is the defaults
    device        of merge, quantizer and gate: auto, cuda or cpu
    backend       auto, gptqmodel or auto-round (slower, and closer on small models; `iterations` is
                  its)
    quantizer     the Python interpreter that has the backend; None is the one that `make quantizer`
                  makes, else this one if it has it
    on_progress   called often, from this thread; what it raises ends the call

    Raises GateFailed, AdapterError for an adapter that does not fit, ValueError for options and
    inputs that cannot be used; nothing is ever at `out` then. An `out` that exists is refused,
    unless it is what this very call would make: then its report is returned at once.
    """
    if merge_base not in ("auto", *MERGE_BASES):
        raise ValueError(f"merge_base is {merge_base!r}; it must be auto, original or dequantized")
    tool = choose_backend(backend, "gptq")
    merge_bases = MERGE_BASES if merge_base == "auto" else (merge_base,)
    thresholds = gate if isinstance(gate, Thresholds) else Thresholds.from_settings(gate or {})
    shape = BaseShape.from_config(base, base_name, base_digest)
    with _opened(adapter, shape, store, work, allow_other_base) as opened:
        options = CalibrationOptions(
            rows=rows,
            eval_rows=eval_rows,
            text=text,
            text_share=text_share,
            num_tokens=num_tokens,
            seed=seed,
            training=opened.training,
        )
        with contextlib.closing(Checkpoint(base)) as checkpoint:
            size = choose_group_size(checkpoint, group_size)
        calibration = load_calibration(options, base, opened.manifest.chat_template)
        means = (tool, iterations_of(tool, iterations))
        key = _key(opened, base_digest, merge_bases, size, means, calibration)
        if out.exists():
            found = _report(out, key)
            shutil.rmtree(work, ignore_errors=True)
            return found
        recipe = Recipe(
            adapter=opened,
            source=adapter,
            base=base,
            base_name=base_name,
            base_digest=base_digest,
            store=store,
            calibration=calibration,
            options=options,
            group_size=size,
            device=device,
            backend=tool,
            iterations=iterations,
            python=find_python(quantizer, tool),
            allow_other_base=allow_other_base,
        )
        with claim(work, key):
            candidates = [Candidate(recipe, name, work / name) for name in merge_bases]
            reports = _make_all(candidates, thresholds, on_progress)
            hint = "" if tool == "auto-round" else _HINT
            winner = _choose(candidates, reports, hint)
            provenance = _provenance(recipe, winner, reports, key)
            _publish(winner.quantized, provenance, out)
            shutil.rmtree(work, ignore_errors=True)
    return _report(out, key)


def _make_all(
    candidates: list[Candidate],
    thresholds: Thresholds,
    on_progress: Callable[[Progress], None],
) -> dict[str, GateReport]:
    """Make each candidate; what the gate says of it, by merge base."""
    reports = {}
    for index, candidate in enumerate(candidates):

        def on_stage(
            stage: Stage, done: float, note: str, index: int = index, at: Candidate = candidate
        ) -> None:
            before = sum(SHARES[each] for each in STAGES[: STAGES.index(stage)])
            total = (index + before + SHARES[stage] * done) / len(candidates)
            on_progress(
                Progress(stage=stage, merge_base=at.merge_base, total=round(total, 6), note=note)
            )

        figures = candidate.make(on_stage)
        reports[candidate.merge_base] = GateReport(figures=figures, thresholds=thresholds)
    return reports


def _choose(candidates: list[Candidate], reports: Mapping[str, GateReport], hint: str) -> Candidate:
    """The candidate that passed with the lowest loss on the held-out rows. Raises GateFailed."""
    passed = [each for each in candidates if reports[each.merge_base].passed]
    if not passed:
        said = [f"{name} base: {'; '.join(each.failures)}" for name, each in reports.items()]
        raise GateFailed(
            {
                "message": f"the quality gate failed. {'. '.join(said)}{hint}",
                "candidates": {name: each.to_json() for name, each in reports.items()},
            }
        )
    return min(passed, key=lambda each: reports[each.merge_base].figures.artifact_loss)


def _provenance(
    recipe: Recipe, winner: Candidate, reports: Mapping[str, GateReport], key: str
) -> dict[str, Any]:
    """Where the artifact comes from. No date and no path: the same making gives the same bytes."""
    return {
        "format": 1,
        "kind": "artifact",
        "key": key,
        "base": {"name": recipe.base_name, "digest": recipe.base_digest},
        "adapter": {"digest": recipe.adapter.digest, "revision": recipe.adapter.revision},
        "merge_base": winner.merge_base,
        "group_size": recipe.group_size,
        "gate": reports[winner.merge_base].to_json(),
        "candidates": {name: each.to_json() for name, each in reports.items()},
        "quantized": winner.provenance(),
    }


def _publish(folder: Path, provenance: dict[str, Any], out: Path) -> None:
    """Give the winner its provenance and its place."""
    part = folder / f".{ARTIFACT_FILE}"
    write_json(part, provenance)
    part.rename(folder / ARTIFACT_FILE)
    sync_files(folder)
    out.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(out)
    sync_folder(out.parent)


def _report(out: Path, key: str) -> ArtifactReport:
    """What is at `out`; ValueError unless it is what `key` makes."""
    file = out / ARTIFACT_FILE
    provenance = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if provenance.get("key") != key:
        raise ValueError(f"--out is {str(out)!r}, which exists; name a new folder")
    return ArtifactReport(
        folder=out,
        digest=folder_digest(out),
        adapter_digest=provenance["adapter"]["digest"],
        base_digest=provenance["base"]["digest"],
        merge_base=provenance["merge_base"],
        group_size=provenance["group_size"],
        num_bytes=sum(path.stat().st_size for path in out.iterdir()),
        provenance=provenance,
    )


@contextlib.contextmanager
def _opened(
    adapter: str, shape: BaseShape, store: Path, work: Path, allow_other_base: bool
) -> Iterator[MergeAdapter]:
    """The adapter, staged beside `work`, so that a folder can change and the call goes on."""
    with (
        scratch(work.parent / f".{work.name}-adapter") as folder,
        open_adapter(
            adapter, shape, store, folder / "staged", allow_other_base=allow_other_base
        ) as opened,
    ):
        yield opened


def _key(
    adapter: MergeAdapter,
    base_digest: str,
    merge_bases: tuple[str, ...],
    group_size: int,
    means: tuple[str, int | None],
    calibration: Calibration,
) -> str:
    """What makes two calls the same. Thresholds are no part of it: figures are measured once."""
    parts = (adapter.digest, base_digest, merge_bases, group_size, means, calibration.fingerprint)
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
