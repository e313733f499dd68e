"""What a run shows while it goes, and what it has taught at its end."""

import resource
from collections.abc import Iterable
from types import TracebackType

import torch
from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from training.checkpoint import RunState
from training.metrics import Generations

_SPEED_S = 600  # of steps that the estimate of the remaining time looks back on
_NUM_LINES = 20  # in a log, where nothing can be live
_NUM_SAMPLES, _WIDTH = 5, 120  # of the table in the end: rows, characters of a cell


class _TwoLines(Progress):
    """A bar, and below it the latest figures."""

    figures = ""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.figures:
            yield Text(self.figures, style="dim")


class Display:
    """The run on a terminal, live; in a log file, a line at each twentieth of it."""

    def __init__(self, console: Console, device: torch.device, num_steps: int) -> None:
        self._console, self._device, self._num_steps = console, device, num_steps
        self._bar = _TwoLines(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            expand=True,
            speed_estimate_period=_SPEED_S,
            disable=not console.is_terminal,
        )
        self._steps = self._bar.add_task("Training", total=num_steps)
        self._answers = self._bar.add_task("Generating", visible=False)

    def __enter__(self) -> "Display":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, style="yellow", markup=False)

    def resumed(self, step: int) -> None:
        """Begin at a step. The steps before it took this process no time."""
        self._console.print(f"Going on after step {step}")
        self._bar.reset(self._steps, completed=step)

    def update(self, state: RunState) -> None:
        """Show the latest step."""
        text = figures(state, self._device)
        self._bar.figures = text
        self._bar.update(self._steps, completed=state.step)
        every = max(1, self._num_steps // _NUM_LINES)
        is_due = state.step % every == 0 or state.step == self._num_steps
        if is_due and not self._console.is_terminal:
            line = f"step {state.step:,}/{self._num_steps:,}  {text}"
            self._console.print(line, markup=False, soft_wrap=True)

    def answered(self, count: int, total: int) -> None:
        """Show that so many more rows of all are answered."""
        self._bar.update(self._answers, advance=count, total=total, visible=True)


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


def show_generations(generations: Generations, console: Console) -> None:
    """Print the scores before and after, and the first few answers."""
    scores = Table("", "base", "adapter", title=generations.rows, title_justify="left", box=None)
    for name, before in generations.before.items():
        scores.add_row(name, f"{before:.3g}", f"{generations.after[name]:.3g}")
    console.print(scores)
    table = Table("question", "base", "adapter", "reference", box=None, expand=True)
    for column in table.columns:
        column.ratio = 1
        column.overflow = "fold"
    for sample in generations.samples[:_NUM_SAMPLES]:
        cells = (sample.question, sample.before, sample.after, sample.reference)
        table.add_row(*(Text(shortened(cell, _WIDTH)) for cell in cells))
    console.print(table)


def shortened(text: str, width: int) -> str:
    """On one line and not over `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else f"{line[: width - 1]}…"
