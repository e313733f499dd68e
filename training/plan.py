"""What a run would do, before it does it: sizes, steps, and a sample with its loss mask."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from adapters.rope import RopeScaling
from training.config import TrainConfig
from training.data import Dataset
from training.fast.choice import Choice
from training.memory import MIB, Setting, estimate
from training.qlora import Linears, count_trainable
from training.render import Example
from training.rope import run_scaling
from training.steps import Steps

_USABLE = 0.9  # of free memory; the rest is for what an estimate leaves out


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What `--dry-run` prints."""

    num_trainable: int
    memory: tuple[tuple[str, int], ...]  # what, bytes
    steps: Steps
    rope: RopeScaling | None  # None: the base's own
    kernels: Choice
    fill: float  # useful share of the tokens that are computed, padding being the rest

    @property
    def total_bytes(self) -> int:
        """The whole estimate."""
        return sum(size for _, size in self.memory)


def make_plan(
    config: TrainConfig,
    dataset: Dataset,
    model_config: Any,
    linears: Linears,
    *,
    is_packed: bool,
    element_bytes: int,
    checkpointing: bool,
    kernels: Choice,
) -> Plan:
    """Count and estimate. `is_packed`: 4-bit weights in memory; else NF4's values, as elements."""
    steps = Steps.plan(config, dataset.training)
    lengths = [len(example.ids) for example in dataset.training]
    longest = max(sum(lengths[i] for i in row) for row in steps.rows)
    num_trainable = count_trainable(config, linears)
    num_rows = min(config.micro_batch, config.batch_size)
    widest = sum(sorted(sum(lengths[i] for i in row) for row in steps.rows)[-num_rows:])
    memory = estimate(
        config,
        model_config,
        linears,
        Setting(
            num_trainable=num_trainable,
            num_tokens=max(widest, min(num_rows, len(steps.rows)) * longest),
            is_packed=is_packed and config.quantization == "nf4",
            element_bytes=element_bytes,
            checkpointing=checkpointing,
            options=kernels.options,
        ),
    )
    return Plan(
        num_trainable=num_trainable,
        memory=tuple(memory),
        steps=steps,
        rope=run_scaling(config),
        kernels=kernels,
        fill=sum(lengths) / (len(steps.rows) * longest),
    )


def first_that_fits(plans: Iterable[Plan], free_bytes: int) -> Plan:
    """The first whose estimate leaves a tenth of the memory free; if none does, the last."""
    for plan in plans:
        if plan.total_bytes <= _USABLE * free_bytes:
            break
    return plan


def show_data(dataset: Dataset, console: Console) -> None:
    """Print the data report and its warnings."""
    for report in dataset.reports:
        console.print(_table(report.path, dict(report.lines())))
    split = {
        "training": f"{len(dataset.training):,} rows",
        "evaluation": f"{len(dataset.evaluation):,} rows",
        "left out of training, being in evaluation": f"{dataset.num_overlapping:,}",
    }
    console.print(_table("split", split))
    for warning in dataset.warnings():
        console.print(f"note: {warning}", style="yellow", markup=False)


def show_plan(
    plan: Plan, config: TrainConfig, sample: Example, tokenizer: Any, console: Console
) -> None:
    """Print steps, memory and a sample with its loss mask."""
    steps = plan.steps
    run = {
        "trainable parameters": f"{plan.num_trainable:,}",
        "rows in an epoch": f"{len(steps.rows):,}, {plan.fill:.0%} of them filled at most",
        "steps": f"{steps.total:,}, {steps.per_epoch:,} in an epoch, {steps.warmup:,} of warm-up",
        "rows in a step": f"{config.batch_size}, {config.micro_batch} in a pass",
        "learning rate": f"{config.learning_rate:g}, {config.schedule}",
        "targets": config.targets if isinstance(config.targets, str) else ", ".join(config.targets),
        "kernels": str(plan.kernels),
        "RoPE": "the base's" if plan.rope is None else str(plan.rope),
    }
    console.print(_table("run", run))
    memory = {what: f"{size / MIB:,.0f} MiB" for what, size in plan.memory}
    memory["together, estimated"] = f"{plan.total_bytes / MIB:,.0f} MiB"
    console.print(_table("memory", memory))
    console.print(mask_in_colour(sample, tokenizer), soft_wrap=True)


def mask_in_colour(example: Example, tokenizer: Any) -> Text:
    """A row's tokens with a bar between; learned ones green and underlined, read ones dim."""
    text = Text("first row; learned tokens are green and underlined\n")
    for index, (token, learned) in enumerate(zip(example.ids, example.is_learned, strict=True)):
        if index:
            text.append("|", style="bright_black")
        style = "green underline" if learned and index else "dim"
        text.append(tokenizer.decode([token]).replace("\n", "⏎\n"), style=style)
    return text


def _table(title: str, rows: Mapping[str, str]) -> Table:
    table = Table(title=Text(title), title_justify="left", show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    for what, value in rows.items():
        table.add_row(Text(what), Text(value))
    return table
