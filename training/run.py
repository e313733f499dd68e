"""`turnout train`: settings in, a folder with an adapter out."""

import resource
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from adapters.manifest import AdapterRefused
from adapters.registry import NAME
from training.checkpoint import CHECKPOINTS, RunState
from training.config import TrainConfig, make_config, parse_options, read_settings
from training.data import Dataset, load_dataset
from training.old_names import field_of
from training.plan import Plan, make_plan, show_data, show_plan
from training.qlora import add_adapter, find_linears, load_base, pick_device, pick_dtype, skeleton
from training.render import Renderer, end_ids
from training.report import html_report
from training.result import REPORT_FILE, RESULT_FILES, Outcome, write_adapter
from training.trainer import Trainer


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """All that is known before the weights are loaded."""

    config: TrainConfig
    renderer: Renderer
    dataset: Dataset
    plan: Plan
    device: torch.device
    dtype: torch.dtype


def settings_of(
    file: Path | None, given: dict[str, Any], words: list[str], default_base: Callable[[], Path]
) -> TrainConfig:
    """The config: the file's settings, over them the command line's; hints go to stderr."""
    over = {name: value for name, value in given.items() if value is not None}
    over |= parse_options(words)
    is_over = {field_of(name) for name in over}
    from_file = read_settings(file) if file else {}
    settings = {name: value for name, value in from_file.items() if field_of(name) not in is_over}
    settings |= over
    if "base" not in map(field_of, settings):
        settings["base"] = default_base()
    config, hints = make_config(settings)
    for hint in hints:
        Console(stderr=True).print(f"hint: {hint}", style="yellow", markup=False)
    return config


def prepare(config: TrainConfig) -> Prepared:
    """Read base and data and plan the run; nothing is written and no weight is loaded."""
    empty = skeleton(config.base)
    device = pick_device()
    dtype = pick_dtype(config.dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(config.base)
    renderer = Renderer(tokenizer, end_ids(config.base, tokenizer), config.loss)
    dataset = load_dataset(config, renderer)
    checkpointing = config.gradient_checkpointing
    plan = make_plan(
        config,
        dataset,
        empty.config,
        find_linears(empty),
        is_packed=device.type == "cuda",
        element_bytes=dtype.itemsize,
        checkpointing=device.type == "cuda" if checkpointing is None else checkpointing,
    )
    return Prepared(
        config=config, renderer=renderer, dataset=dataset, plan=plan, device=device, dtype=dtype
    )


def show(prepared: Prepared, console: Console) -> None:
    """Print the data report and the plan."""
    show_data(prepared.dataset, console)
    sample, tokenizer = prepared.dataset.training[0], prepared.renderer.tokenizer
    show_plan(prepared.plan, prepared.config, sample, tokenizer, console)


def train(
    prepared: Prepared, base_digest: str, console: Console, *, resume: bool, overwrite: bool
) -> Outcome:
    """Run to the end and write the result into the config's `out`."""
    config = prepared.config
    claim(config.out, resume=resume, overwrite=overwrite)
    disable_progress_bar()  # transformers' own
    tokenizer = prepared.renderer.tokenizer
    with console.status("Loading the base"):
        base = load_base(config.base, config.quantization, prepared.dtype, prepared.device)
        model = add_adapter(base, config)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TextColumn("{task.fields[figures]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    with progress:
        bar = progress.add_task("Training", total=prepared.plan.steps.total, figures="")
        trainer = Trainer(
            config,
            model,
            prepared.dataset,
            pad_id=tokenizer.pad_token_id or 0,
            device=prepared.device,
            say=lambda text: console.print(text, style="yellow", markup=False),
            on_step=lambda state: progress.update(
                bar, completed=state.step, figures=figures(state, prepared.device)
            ),
        )
        if resume and trainer.resume():
            console.print(f"Going on after step {trainer.state.step}")
            progress.update(bar, completed=trainer.state.step)
        state = trainer.run()
    if state.is_stopped:
        console.print(f"Stopped at step {state.step}: no better since step {state.best_step}")
    outcome = Outcome(
        config=config,
        dataset=prepared.dataset,
        state=state,
        base_digest=base_digest,
        dtype=str(prepared.dtype).removeprefix("torch."),
        estimated_bytes=prepared.plan.total_bytes,
        peak_bytes=peak_bytes(prepared.device),
    )
    write_adapter(model, outcome, prepared.renderer)
    (config.out / REPORT_FILE).write_text(html_report(outcome), encoding="utf-8")
    return outcome


def claim(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Make `out` ready for a run. Raises ValueError where it holds what the run must not touch."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {str(out)!r}, which is no folder")
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    foreign = sorted(held - {CHECKPOINTS, *RESULT_FILES})
    if foreign:
        raise ValueError(f"{out} holds {foreign[0]}, which no run wrote; choose another folder")
    if held and not resume:
        if not overwrite:
            raise ValueError(f"{out} holds a run; --resume goes on there, --overwrite replaces it")
        shutil.rmtree(out / CHECKPOINTS, ignore_errors=True)
        for name in held - {CHECKPOINTS}:
            (out / name).unlink()
    out.mkdir(parents=True, exist_ok=True)


def figures(state: RunState, device: torch.device) -> str:
    """The latest step in a few words."""
    last = state.history[-1]
    recent = state.history[-10:]
    speed = sum(r["tokens"] for r in recent) / max(1e-9, sum(r["seconds"] for r in recent))
    text = f"loss {last['loss']:.3f}"
    if state.evaluations:
        text += f" (held out {state.evaluations[-1]['loss']:.3f})"
    memory = peak_bytes(device) / 2**30
    return f"{text}  lr {last['learning_rate']:.1e}  {speed:,.0f} tok/s  {memory:.1f} GiB"


def peak_bytes(device: torch.device) -> int:
    """The most memory held so far: the GPU's, or this process's."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def check_name(name: str | None) -> None:
    """Refuse a name that could not be registered before hours go into it."""
    if name is not None and not NAME.fullmatch(name):
        raise AdapterRefused("name", f"{name!r} does not match {NAME.pattern}")


def show_settings(console: Console) -> None:
    """Print every setting of a run."""
    table = Table("setting", "default", "", box=None)
    for name, field in TrainConfig.model_fields.items():
        default = "" if field.is_required() else str(field.get_default(call_default_factory=True))
        table.add_row(name, Text(default), Text(field.description or ""))
    console.print(table)
