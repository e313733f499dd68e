"""`turnout quantize`: a merged checkpoint as 4-bit GPTQ or AWQ files, whole or not at all.

The quantizer runs in a process of its own (quantize_run.py). What it needs is made here, and what
it made is checked and put in place here. docs/merging.md tells an operator all of it.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.store import sync_folder
from server.base_digest import INDEX_FILE
from server.versions import version_of
from training.calibration import (
    MAX_SAMPLE_TOKENS,
    Calibration,
    CalibrationOptions,
    load_calibration,
)
from training.folder_lock import empty, locked
from training.merge import PROVENANCE_FILE, sync_files, write_json
from training.merge_checkpoint import Checkpoint, copy_side_files
from training.quantize_check import check_result
from training.quantize_groups import choose_group_size
from training.quantize_run import Event, WorkerFailed, choose_backend, find_python, run_worker

KEY_FILE = "key.json"
_CHECKPOINTS = "checkpoints"  # what the quantizer can go on from
ITERATIONS = 40  # of auto-round, where nobody says
_BATCH_SIZE = 4  # samples that pass a layer together

OnLayer = Callable[[int, int], None]  # layers done, layers in all


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeOptions:
    """What to quantize, how, and where to."""

    model: Path  # a 16- or 32-bit checkpoint, as `turnout merge` makes it
    out: Path
    calibration: CalibrationOptions
    kind: str = "gptq"  # or awq
    group_size: int = 0  # 0: the largest that fits
    desc_act: bool = False  # GPTQ's order of inputs: better, and slower to serve
    iterations: int = ITERATIONS  # of auto-round, for each layer
    device: str = "auto"  # of the quantizer's own torch
    backend: str = "auto"  # gptqmodel, auto-round; auto: gptqmodel where it can
    python: Path | None = None  # the interpreter that has the quantizer
    work: Path | None = None  # where an interrupted run is kept; None: a hidden folder beside out

    def __post_init__(self) -> None:
        if self.kind not in ("gptq", "awq"):
            raise ValueError(f"--format is {self.kind!r}; what is quantized is gptq or awq")
        if self.tool == "auto-round" and self.desc_act:
            raise ValueError("--desc-act is GPTQ's own order of inputs; auto-round has none")
        if self.iterations < 1:
            raise ValueError(f"--iterations is {self.iterations}; it must be 1 or more")
        if self.device not in ("auto", "cuda", "cpu"):
            raise ValueError(f"--device is {self.device!r}; it must be auto, cuda or cpu")
        if not (self.model / "config.json").is_file():
            raise ValueError(f"--model is {str(self.model)!r}; it must be a checkpoint folder")
        if self.out.exists() and not (self.out / PROVENANCE_FILE).is_file():
            raise ValueError(f"--out is {str(self.out)!r}, which exists; name a new folder")

    @property
    def tool(self) -> str:
        """The library that quantizes."""
        return choose_backend(self.backend, self.kind)

    @property
    def work_folder(self) -> Path:
        """Where what an interrupted run did is kept."""
        return self.work or self.out.parent / f".{self.out.name}-unfinished"


def iterations_of(tool: str, iterations: int) -> int | None:
    """What of them takes part in the result: GPTQModel has none."""
    return iterations if tool == "auto-round" else None


def quantize(
    options: QuantizeOptions,
    model_digest: str,
    on_layer: OnLayer = lambda done, of: None,
    calibration: Calibration | None = None,
) -> dict[str, Any]:
    """Put the quantized checkpoint at `out` and return its provenance.

    Run again with the same options, an interrupted run goes on after its last layer, and a finished
    one is recognised. Raises ValueError for what cannot be quantized and WorkerFailed where the
    quantizer gives up; nothing is at `out` then.
    """
    with contextlib.closing(Checkpoint(options.model)) as checkpoint:
        group_size = choose_group_size(checkpoint, options.group_size)
    calibration = calibration or load_calibration(options.calibration, options.model)
    key = _key(options, model_digest, group_size, calibration)
    if options.out.exists():
        found = json.loads((options.out / PROVENANCE_FILE).read_text(encoding="utf-8"))
        if found.get("key") != key:
            raise ValueError(f"--out is {str(options.out)!r}, which exists; name a new folder")
        shutil.rmtree(options.work_folder, ignore_errors=True)  # of a run killed at its very end
        return dict(found)
    python = find_python(options.python, options.tool)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with claim(options.work_folder, key) as work:
        job = _stage(options, group_size, calibration, work)
        events = _run(python, job, work, on_layer)
        provenance = {
            "format": 1,
            "kind": options.kind,
            "backend": options.tool,
            "key": key,
            "source": _source(options.model, model_digest),
            "group_size": group_size,
            "desc_act": options.desc_act,
            "iterations": iterations_of(options.tool, options.iterations),
            "seed": options.calibration.seed,
            "calibration": calibration.report(),
            "versions": {
                **_said(events, "started", "versions", {}),
                "turnout": version_of("turnout"),
            },
            "layers": _layers(_said(events, "errors", "rows", [])),
        }
        finished = work / "finished"
        assemble(options.model, Path(job["out"]), finished)
        provenance["weight_error"] = check_result(options.model, finished, group_size)
        write_json(finished / PROVENANCE_FILE, provenance)
        sync_files(finished)
        finished.rename(options.out)
        sync_folder(options.out.parent)
        shutil.rmtree(work)
    return provenance


@contextlib.contextmanager
def claim(work: Path, key: str) -> Iterator[Path]:
    """Hold the folder of an interrupted run: empty unless that run was this very one.

    Raises ValueError where another process is at it.
    """
    with locked(work):
        key_file = work / KEY_FILE
        if not key_file.is_file() or key_file.read_text(encoding="utf-8") != key:
            empty(work)
            key_file.write_text(key, encoding="utf-8")
        yield work


def assemble(model: Path, made: Path, finished: Path) -> None:
    """The folder that is published: the quantizer's tensors, the model's own everything else.

    The config is the model's with `quantization_config` added; no path of this machine is left.
    """
    shutil.rmtree(finished, ignore_errors=True)
    finished.mkdir()
    copy_side_files(model, finished, None)
    (finished / INDEX_FILE).unlink(missing_ok=True)  # of the model's shards
    for path in made.iterdir():
        if path.suffix == ".safetensors" or path.name.endswith(".safetensors.index.json"):
            _link(path, finished / path.name)
    theirs = json.loads((made / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    settings = without_paths(theirs)
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    write_json(finished / "config.json", config | {"quantization_config": settings})
    write_json(finished / "quantize_config.json", settings)


def _link(path: Path, new: Path) -> None:
    """Give the file a second name; a copy, where the file system has no links or is another one."""
    try:
        os.link(path.resolve(), new)  # symbolic links are refused by GPTQModel
    except OSError:
        shutil.copyfile(path, new)


def without_paths(settings: dict[str, Any]) -> dict[str, Any]:
    """The quantizer's settings without where on this machine it worked."""
    meta = dict(settings.get("meta") or {})
    meta.pop("offload_to_disk_path", None)
    return {**settings, "meta": meta} if meta else dict(settings)


def _key(
    options: QuantizeOptions, model_digest: str, group_size: int, calibration: Calibration
) -> str:
    """What makes two runs the same run."""
    parts = {
        "model": model_digest,
        "kind": options.kind,
        "backend": options.tool,
        "group_size": group_size,
        "desc_act": options.desc_act,
        "iterations": iterations_of(options.tool, options.iterations),
        "calibration": calibration.fingerprint,
        "worker": hashlib.sha256(
            Path(__file__).with_name("quantize_worker.py").read_bytes()
        ).hexdigest(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _stage(
    options: QuantizeOptions, group_size: int, calibration: Calibration, work: Path
) -> dict[str, Any]:
    """Lay out the model as the quantizer takes it, and say what to do with it.

    GPTQModel goes on after a kill for `llama` alone, which is what a Mistral is as long as no
    sample is longer than its sliding window.
    """
    source = work / "source"
    shutil.rmtree(source, ignore_errors=True)
    source.mkdir()
    copy_side_files(options.model, source, None)
    for path in options.model.glob("*.safetensors"):
        _link(path, source / path.name)
    config = json.loads((options.model / "config.json").read_text(encoding="utf-8"))
    window = config.pop("sliding_window", None) or MAX_SAMPLE_TOKENS
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    write_json(source / "config.json", config)
    return {
        "kind": options.kind,
        "backend": options.tool,
        "model": str(source.resolve()),
        "out": str((work / "made").resolve()),
        "checkpoints": str((work / _CHECKPOINTS).resolve()),
        "num_layers": config["num_hidden_layers"],
        "group_size": group_size,
        "desc_act": options.desc_act,
        "iterations": options.iterations,
        "device": options.device,
        "batch_size": _BATCH_SIZE,
        "samples": [
            list(sample[at : at + window])
            for sample in calibration.samples
            for at in range(0, len(sample), window)
        ],
        "seed": options.calibration.seed,
    }


def _run(python: Path, job: dict[str, Any], work: Path, on_layer: OnLayer) -> list[Event]:
    """Run the quantizer; where it cannot go on after an earlier run, once more from the start."""

    def on_event(event: Event) -> None:
        if event["event"] == "layer":
            on_layer(event["done"], event["of"])

    checkpoints, made = Path(job["checkpoints"]), Path(job["out"])
    unfinished = checkpoints.glob("attempt-*")  # GPTQModel copies what it goes on from
    for left in (made, made.with_name(f"{made.name}-parts"), *unfinished):
        shutil.rmtree(left, ignore_errors=True)
    goes_on = checkpoints.exists()
    try:
        return run_worker(python, job, work, on_event)
    except WorkerFailed:
        if not goes_on:
            raise
    shutil.rmtree(checkpoints)
    shutil.rmtree(made, ignore_errors=True)
    return run_worker(python, job, work, on_event)


def _source(model: Path, model_digest: str) -> dict[str, Any]:
    """Where the quantized model's weights come from."""
    file = model / PROVENANCE_FILE
    merged = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
    return {"digest": model_digest, "provenance": merged}


def _layers(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The quantizer's error of each linear, by layer."""
    layers: dict[int, dict[str, float | None]] = {}
    for row in rows:
        layers.setdefault(row["layer"], {})[row["linear"]] = row["error"]
    # Linears too: threads finish them in any order, and the same run writes the same bytes.
    return [
        {"layer": layer, "errors": dict(sorted(layers[layer].items()))} for layer in sorted(layers)
    ]


def _said(events: list[Event], kind: str, field: str, default: Any) -> Any:
    return next((event[field] for event in events if event["event"] == kind), default)
