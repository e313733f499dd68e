"""`turnout quantize`, as it was asked for: one of its outputs, and no option that does nothing."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from adapters.manifest import BaseShape
from server.base_digest import base_digest
from training import artifact
from training.artifact import ArtifactReport, make_artifact
from training.calibration import CalibrationOptions
from training.gate import Thresholds
from training.gguf_export import export
from training.gguf_lora import export_adapter
from training.merge_adapter import open_adapter
from training.quantize import ITERATIONS, QuantizeOptions, quantize
from training.quantize_run import choose_backend

Format = Literal["gptq", "awq", "gguf-f16", "gguf-q8_0", "gguf-lora"]
_ALWAYS = {"out", "kind", "model", "adapter"}
_CALIBRATION = {"rows", "eval_rows", "text", "text_share", "tokens", "seed"}
_QUANTIZER = {"group_size", "device", "backend", "quantizer"}
_BASE = {"base", "base_name", "store", "allow_other_base"}
# What each output is told, by whether it is made from a checkpoint or from an adapter.
_TAKES: dict[tuple[str, str], set[str]] = {
    ("gptq", "model"): {*_CALIBRATION, *_QUANTIZER, "desc_act", "iterations"},
    ("gptq", "adapter"): {*_CALIBRATION, *_QUANTIZER, *_BASE, "merge_base", "gate", "iterations"},
    ("awq", "model"): {*_CALIBRATION, *_QUANTIZER, "iterations"},
    ("gguf-f16", "model"): set(),
    ("gguf-q8_0", "model"): set(),
    ("gguf-lora", "adapter"): _BASE,
}

_WANTS = {
    "adapter": "is made from a merged checkpoint: `turnout merge` first, then --model",
    "model": "is made from an adapter: --adapter, not --model",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """The command line. None is an option that was not given."""

    out: Path
    kind: str = "gptq"
    model: Path | None = None
    adapter: str | None = None
    base: Path | None = None  # of the adapter
    base_name: str | None = None
    store: Path
    given: frozenset[str] = frozenset()  # options that stand on the command line
    allow_other_base: bool = False
    merge_base: str = "auto"
    group_size: int = 0
    desc_act: bool = False
    iterations: int = ITERATIONS
    rows: Path | None = None
    eval_rows: Path | None = None
    text: Path | None = None
    text_share: float = 0.5
    tokens: int = 16384
    seed: int = 0
    gate: tuple[str, ...] = ()  # name=value
    device: str = "auto"
    backend: str = "auto"
    quantizer: Path | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Format):
            known = ", ".join(get_args(Format))
            raise ValueError(f"--format is {self.kind!r}; it must be one of {known}")
        if (self.model is None) == (self.adapter is None):
            raise ValueError("name one of --model (a merged checkpoint) and --adapter")
        if self.kind in ("gptq", "awq"):
            tool = choose_backend(self.backend, self.kind)
            if tool != "auto-round" and "iterations" in self.given:
                raise ValueError(f"--iterations does nothing with {tool}; --backend auto-round has")
        takes = _TAKES.get((self.kind, self.source))
        if takes is None:
            raise ValueError(f"--format {self.kind} {_WANTS[self.source]}")
        for name in sorted(self.given - takes - _ALWAYS):
            option = name.replace("_", "-")
            raise ValueError(f"--{option} does nothing with --{self.source} and {self.kind}")
        if "text_share" in self.given and None in (self.rows, self.text):
            raise ValueError("--text-share does nothing without both --rows and --text")

    @property
    def source(self) -> str:
        """What it is made from."""
        return "model" if self.model is not None else "adapter"


def run(request: Request, console: Console) -> None:
    """Make what is asked for, with a progress bar, and print what it came to."""
    if request.kind == "gguf-lora":
        _gguf_lora(request)
    elif request.kind.startswith("gguf-"):
        assert request.model is not None
        export(request.model, request.out, request.kind.removeprefix("gguf-"), console)
    elif request.model is not None:
        _quantize(request, request.model, console)
        return
    else:
        _artifact(request, console)
        return
    console.print(f"Wrote {request.out}", markup=False, highlight=False, soft_wrap=True)


def _quantize(request: Request, model: Path, console: Console) -> None:
    options = QuantizeOptions(
        model=model,
        out=request.out,
        calibration=CalibrationOptions(
            rows=request.rows,
            eval_rows=request.eval_rows,
            text=request.text,
            text_share=request.text_share,
            num_tokens=request.tokens,
            seed=request.seed,
        ),
        kind=request.kind,
        group_size=request.group_size,
        desc_act=request.desc_act,
        iterations=request.iterations,
        device=request.device,
        backend=request.backend,
        python=request.quantizer,
    )
    digest = base_digest(model)
    with _bar(console) as bar:
        task = bar.add_task("Quantizing", total=None)
        made = quantize(
            options, digest, lambda done, of: bar.update(task, completed=done, total=of)
        )
    _print_errors(made, console)
    console.print(f"Wrote {request.out}", markup=False, highlight=False, soft_wrap=True)


def _artifact(request: Request, console: Console) -> None:
    assert request.adapter is not None
    assert request.base is not None
    assert request.base_name is not None
    digest = base_digest(request.base)
    with _bar(console) as bar:
        task = bar.add_task("Starting", total=1.0)

        def on_progress(progress: artifact.Progress) -> None:
            said = f"{progress.note} ({progress.merge_base})"
            bar.update(task, completed=progress.total, description=said)

        report = make_artifact(
            request.adapter,
            request.base,
            request.out,
            base_name=request.base_name,
            base_digest=digest,
            store=request.store,
            work=request.out.parent / f".{request.out.name}-unfinished",
            merge_base=request.merge_base,  # type: ignore[arg-type]  # it is checked there
            group_size=request.group_size,
            rows=request.rows,
            eval_rows=request.eval_rows,
            text=request.text,
            text_share=request.text_share,
            num_tokens=request.tokens,
            gate=thresholds(request.gate),
            seed=request.seed,
            device=request.device,
            backend=request.backend,
            iterations=request.iterations,
            quantizer=request.quantizer,
            allow_other_base=request.allow_other_base,
            on_progress=on_progress,
        )
    _print_errors(report.provenance["quantized"], console)
    _print_gate(report, console)


def _gguf_lora(request: Request) -> None:
    assert request.adapter is not None
    assert request.base is not None
    assert request.base_name is not None
    shape = BaseShape.from_config(request.base, request.base_name, base_digest(request.base))
    with (
        tempfile.TemporaryDirectory() as scratch,
        open_adapter(
            request.adapter,
            shape,
            request.store,
            Path(scratch) / "staged",
            allow_other_base=request.allow_other_base,
        ) as adapter,
    ):
        export_adapter(adapter, request.base, request.out)


def thresholds(words: Iterable[str]) -> Thresholds:
    """The gate's thresholds from `name=value`, the rest by default."""
    settings = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            settings[name] = float(value)
        except ValueError:
            raise ValueError(f"--gate is {word!r}; it must be name=number") from None
    return Thresholds.from_settings(settings)


def _print_errors(made: dict[str, Any], console: Console) -> None:
    """Tokens that were looked at, and the error of each layer."""
    table = Table("Layer", "Error", "Worst linear")
    for row in made["layers"]:
        errors = {name: error for name, error in row["errors"].items() if error is not None}
        if errors:
            worst = max(errors, key=errors.__getitem__)
            table.add_row(str(row["layer"]), f"{sum(errors.values()):.2e}", worst)
    if table.row_count:
        console.print(table)
    used, error = made["calibration"], made["weight_error"]
    console.print(
        f"Calibrated on {used['num_tokens']:,} tokens in {used['num_samples']:,} samples "
        f"({used['num_text_tokens']:,} of general text), group size {made['group_size']}; weights "
        f"are {error['mean']:.1%} of their norm away, at most {error['max']:.1%}",
        markup=False,
        highlight=False,
    )


def _print_gate(report: ArtifactReport, console: Console) -> None:
    table = Table("Merge base", "Mean KL", "Same top token", "Loss", "Adapter path's", "Gate")
    for name, each in report.provenance["candidates"].items():
        figures = each["figures"]
        table.add_row(
            f"{name} *" if name == report.merge_base else name,
            f"{figures['mean_kl']:.4f}",
            f"{figures['top1_agreement']:.2%}",
            f"{figures['artifact_loss']:.4f}",
            f"{figures['adapter_loss']:.4f}",
            "passed" if each["passed"] else "; ".join(each["failures"]),
        )
    console.print(table)
    tokens = report.provenance["gate"]["figures"]["num_tokens"]
    console.print(
        f"Wrote {report.folder}, {report.num_bytes / 2**20:,.0f} MiB, from the {report.merge_base} "
        f"base. KL, in nats a token, and loss are over {tokens:,} tokens that were held out.",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
