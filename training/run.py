"""`turnout train`: settings in, a folder with an adapter out."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from adapters.manifest import AdapterRefused
from adapters.registry import NAME
from training.checkpoint import CHECKPOINTS, RunState
from training.config import TrainConfig, make_config, parse_options, read_settings
from training.data import Dataset, load_dataset
from training.distributed import Group, start
from training.fast.choice import choices
from training.folder_lock import locked
from training.metrics import Generations, compare, missing_libraries
from training.old_names import field_of
from training.plan import Plan, first_that_fits, make_plan, show_data, show_plan
from training.progress import Display, peak_bytes, show_generations
from training.qlora import add_adapter, find_linears, load_base, pick_device, pick_dtype, skeleton
from training.render import Renderer, end_ids
from training.report import html_report
from training.result import REPORT_FILE, RESULT_FILES, Outcome, write_adapter
from training.rope import apply_scaling
from training.tracking import TENSORBOARD, Tracking, chosen
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
    file: Path | None,
    given: dict[str, Any],
    words: list[str],
    default_base: Callable[[], Path],
    console: Console,
) -> TrainConfig:
    """The config: the file's settings, over them the command line's; hints go to the console."""
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
        console.print(f"hint: {hint}", style="yellow", markup=False)
    return config


def prepare(config: TrainConfig) -> Prepared:
    """Read base and data and plan the run; nothing is written and no weight is loaded."""
    chosen(config)  # refuses a tracker that is not installed
    empty = skeleton(config.base)
    device = pick_device()
    dtype = pick_dtype(config.dtype, device)
    tokenizer = AutoTokenizer.from_pretrained(config.base)
    renderer = Renderer(tokenizer, end_ids(config.base, tokenizer), config.loss)
    dataset = load_dataset(config, renderer)
    checkpointing = config.gradient_checkpointing
    plans = (
        make_plan(
            config,
            dataset,
            empty.config,
            find_linears(empty),
            is_packed=device.type == "cuda",
            element_bytes=dtype.itemsize,
            checkpointing=device.type == "cuda" if checkpointing is None else checkpointing,
            kernels=choice,
        )
        for choice in choices(config, empty.config, dtype, device)
    )
    free_bytes = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    plan = first_that_fits(plans, free_bytes)
    return Prepared(
        config=config, renderer=renderer, dataset=dataset, plan=plan, device=device, dtype=dtype
    )


def show(prepared: Prepared, console: Console) -> None:
    """Print the data report and the plan."""
    show_data(prepared.dataset, console)
    sample, tokenizer = prepared.dataset.training[0], prepared.renderer.tokenizer
    show_plan(prepared.plan, prepared.config, sample, tokenizer, console)
    if prepared.config.eval_generations:
        for missing in missing_libraries():
            console.print(f"note: {missing}", style="yellow", markup=False)
    if prepared.config.report_to == "auto" and not chosen(prepared.config):
        console.print("note: no TensorBoard files: it is not installed", style="yellow")


def train(
    prepared: Prepared,
    base_digest: str,
    console: Console,
    *,
    resume: bool,
    overwrite: bool,
    group: Group = Group(),  # noqa: B008  frozen
) -> Outcome:
    """Run to the end and write the result into the config's `out`."""
    if not group.is_first:
        return _train(prepared, base_digest, console, resume=resume, group=group)
    out = prepared.config.out
    _check_is_folder(out)
    with locked(out):
        claim(out, resume=resume, overwrite=overwrite)
        return _train(prepared, base_digest, console, resume=resume, group=group)


def _train(
    prepared: Prepared, base_digest: str, console: Console, *, resume: bool, group: Group
) -> Outcome:
    config = prepared.config
    disable_progress_bar()  # transformers' own
    with Tracking(config, chosen(config) if group.is_first else ()) as tracking:
        for where in tracking.where:
            console.print(where, markup=False, soft_wrap=True)
        with console.status("Loading the base"):
            model = _model(prepared)
        with Display(console, prepared.device, prepared.plan.steps.total) as display:
            trainer = _trainer(model, prepared, base_digest, group, display, tracking)
            if resume and trainer.resume():
                display.resumed(trainer.state.step)
            state = trainer.run()
            group.leave()  # the first process has a while to go
            tracking.update(state)  # all of it, where a run was resumed at its end
            peak = peak_bytes(prepared.device)
            generations = _generations(model, prepared, display) if group.is_first else None
        if generations is not None:
            tracking.log({f"eval/{k}": v for k, v in generations.after.items()}, state.step)
    outcome = Outcome(
        config=config,
        dataset=prepared.dataset,
        state=state,
        generations=generations,
        base_digest=base_digest,
        dtype=str(prepared.dtype).removeprefix("torch."),
        estimated_bytes=prepared.plan.total_bytes,
        peak_bytes=peak,
    )
    if group.is_first:
        write_adapter(model, outcome, prepared.renderer)
        (config.out / REPORT_FILE).write_text(html_report(outcome), encoding="utf-8")
    if generations is not None:
        show_generations(generations, console)
    return outcome


def _model(prepared: Prepared) -> PeftModel:
    """The base with a new adapter over it."""
    config = prepared.config
    base = load_base(config.base, config.quantization, prepared.dtype, prepared.device)
    apply_scaling(base, prepared.plan.rope)
    return add_adapter(base, config)


def _trainer(
    model: PeftModel,
    prepared: Prepared,
    base_digest: str,
    group: Group,
    display: Display,
    tracking: Tracking,
) -> Trainer:
    """A trainer whose steps are shown and tracked."""

    def on_step(state: RunState) -> None:
        display.update(state)
        tracking.update(state)

    return Trainer(
        prepared.config,
        model,
        prepared.dataset,
        pad_id=prepared.renderer.tokenizer.pad_token_id or 0,
        device=prepared.device,
        kernels=prepared.plan.kernels,
        say=display.say,
        on_step=on_step,
        group=group,
        base_digest=base_digest,
    )


def train_in_processes(
    num_processes: int, config: TrainConfig, base_digest: str, *, resume: bool, overwrite: bool
) -> None:
    """The same in several processes of this host, with a GPU each where there are any."""
    start(num_processes, _train_one, config, base_digest, resume, overwrite)


def _train_one(
    group: Group, config: TrainConfig, base_digest: str, resume: bool, overwrite: bool
) -> None:
    console = Console(quiet=not group.is_first)
    prepared = prepare(config)
    train(prepared, base_digest, console, resume=resume, overwrite=overwrite, group=group)


def _generations(model: PeftModel, prepared: Prepared, display: Display) -> Generations | None:
    """What base and adapter answer, if anything is to be asked."""
    config = prepared.config
    if not config.eval_generations:
        return None
    return compare(
        model,
        prepared.renderer,
        prepared.dataset,
        count=config.eval_generations,
        max_tokens=config.generation_tokens,
        seed=config.seed,
        on_answer=display.answered,
    )


def _check_is_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise ValueError(f"out is {str(out)!r}, which is no folder")


def claim(out: Path, *, resume: bool, overwrite: bool) -> None:
    """Make `out` ready for a run. Raises ValueError where it holds what the run must not touch."""
    _check_is_folder(out)
    held = {path.name for path in out.iterdir()} if out.is_dir() else set()
    folders = {CHECKPOINTS, TENSORBOARD}
    foreign = sorted(held - {*folders, *RESULT_FILES})
    if foreign:
        raise ValueError(f"{out} holds {foreign[0]}, which no run wrote; choose another folder")
    if held and not resume:
        if not overwrite:
            raise ValueError(f"{out} holds a run; --resume goes on there, --overwrite replaces it")
        for name in folders:
            shutil.rmtree(out / name, ignore_errors=True)
        for name in held - folders:
            (out / name).unlink()
    out.mkdir(parents=True, exist_ok=True)


def check_name(name: str | None) -> None:
    """Refuse a name that could not be registered before hours go into it."""
    if name is not None and not NAME.fullmatch(name):
        raise AdapterRefused("name", f"{name!r} does not match {NAME.pattern}")


def show_settings(console: Console) -> None:
    """Print every setting of a run."""
    table = Table("setting", "default", "", box=None)
    for row in listed_settings():
        table.add_row(*(Text(cell) for cell in row))
    console.print(table)


def listed_settings() -> Iterator[tuple[str, str, str]]:
    """Name, default as a YAML file would have it (blank: none), and description of each setting."""
    for name, field in TrainConfig.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        match default:
            case None | {} if not default:
                spelled = ""
            case bool():
                spelled = str(default).lower()
            case float():
                spelled = f"{default:g}"
            case _:
                spelled = str(default)
        yield name, spelled, field.description or ""
