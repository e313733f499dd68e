"""What an operator sees while the engine starts, and where the time went."""

import itertools
import sys
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import Progress

_FIRST = "starting the engine"


class StartDisplay(Progress):
    """A progress bar of the engine's stages; each lasts until the next one is heard of."""

    def __init__(self, console: Console, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._began = {_FIRST: now()}
        # What is written to a terminal meanwhile goes above the bar; a file's lines stay its own.
        goes_above = sys.stderr.isatty()
        super().__init__(console=console, transient=True, redirect_stderr=goes_above)
        self._task = self.add_task(_FIRST, total=1.0)

    def on_progress(self, stage: str, fraction: float) -> None:
        """Show how far a stage is."""
        self._began.setdefault(stage, self._now())
        self.update(self._task, description=stage, completed=fraction)

    def took(self) -> str:
        """Seconds until now, in all and for each stage."""
        times = [*self._began.values(), self._now()]
        spans = (after - before for before, after in itertools.pairwise(times))
        stages = (f"{stage} {span:.1f}" for stage, span in zip(self._began, spans, strict=True))
        return f"Started in {times[-1] - times[0]:.1f} s: {', '.join(stages)}"
