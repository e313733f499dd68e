"""`turnout bench engine`: the engine without HTTP, beside transformers + PEFT in the same run.

Every figure is a median over rounds, and the two systems take turns within a round, so that what
else the machine does strikes both. Random weights serve: speed does not depend on values.
"""

import contextlib
import json
import random
import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from adapters.registry import Registry
from server.adapter_admin import base_shape
from server.bench.baseline import PeftBaseline
from server.bench.driver import Driver
from server.bench.http import HttpSystem
from server.bench.timing import Timing
from server.bench.workload import ADAPTER_RANK, save_random_adapter
from server.config import AdapterConfig, CacheConfig, Config, ModelConfig
from server.engine.messages import EngineInfo
from server.engine.request import AdapterRef
from server.model.spec import read_spec


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What to measure."""

    model: ModelConfig
    batch_sizes: tuple[int, ...] = (1, 4, 16)
    num_adapters: int = 8
    prompt_tokens: int = 64
    new_tokens: int = 64
    rounds: int = 3
    baseline: bool = True  # transformers + PEFT beside it
    http: bool = True  # and the same batches through a server process
    json_file: Path | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """One measured case, medians over rounds, in tokens per second over the whole batch."""

    system: str  # turnout, or transformers + PEFT
    adapters: str  # base, one adapter, 8 mixed
    batch: int
    prefill_tok_s: float
    decode_tok_s: float
    total_tok_s: float  # generated tokens over the whole time


class TurnoutSystem:
    """Our engine, driven in this process."""

    name = "turnout"

    def __init__(self, options: BenchOptions, folders: list[Path], store: Path) -> None:
        bank_rows = max(512, 2 * ADAPTER_RANK * len(folders))
        config = Config(
            model=options.model,
            cache=CacheConfig(prefix_caching=False),
            adapters=AdapterConfig(store=store, bank_rows=bank_rows),
        )
        registry = Registry.open(store, base_shape(options.model))
        revisions = [registry.push(f"a{i}", folder) for i, folder in enumerate(folders)]
        registry.close()
        self.names = [revision.name for revision in revisions]
        self.bank_rows = bank_rows
        self._adapters = [AdapterRef.of(revision) for revision in revisions]
        self._driver = Driver(config)
        self.info = self._driver.info
        self._new_tokens = options.new_tokens

    def run(self, prompts: list[list[int]], choice: list[int | None]) -> Timing:
        """Run one batch: prompts[i] through adapter choice[i], None for the base."""
        for prompt, chosen in zip(prompts, choice, strict=True):
            adapter = None if chosen is None else self._adapters[chosen]
            self._driver.add(adapter, prompt, self._new_tokens)
        trace = self._driver.run()
        return Timing(trace.prefill_s, trace.seconds)


System = TurnoutSystem | PeftBaseline | HttpSystem
_TITLES = {PeftBaseline.name: "PEFT", HttpSystem.name: "HTTP"}  # of columns


def run(options: BenchOptions) -> list[Row]:
    """Measure every case, print the table, and return its rows."""
    console = Console()
    spec = read_spec(options.model.path)
    with (
        tempfile.TemporaryDirectory(prefix="turnout-bench-") as scratch,
        contextlib.ExitStack() as running,
    ):
        store = Path(scratch) / "store"
        with console.status("Loading what is measured"):
            folders = [
                save_random_adapter(Path(scratch) / f"adapter-{i}", spec, seed=i)
                for i in range(options.num_adapters)
            ]
            turnout = TurnoutSystem(options, folders, store)
            systems: list[System] = [turnout]
            if options.baseline:
                systems.append(PeftBaseline(options.model, folders, options.new_tokens))
            if options.http:
                http = HttpSystem(
                    options.model, turnout.names, store, options.new_tokens, turnout.bank_rows
                )
                running.callback(http.close)
                systems.append(http)
        rows = _measure(options, systems, spec.vocab_size, console)
    _print(rows, options, turnout.info, console)
    if options.json_file is not None:
        options.json_file.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    return rows


def _measure(
    options: BenchOptions,
    systems: list[System],
    vocab_size: int,
    console: Console,
) -> list[Row]:
    cases = [
        (label, batch, choice)
        for batch in options.batch_sizes
        for label, choice in _choices(batch, options.num_adapters).items()
    ]
    random_ = random.Random(0)
    timings: dict[tuple[str, str, int], list[Timing]] = {}
    with Progress(console=console, transient=True) as progress:
        bar = progress.add_task("measuring", total=len(cases) * (options.rounds + 1) * len(systems))
        for round_ in range(options.rounds + 1):
            for label, batch, choice in cases:
                prompts = [
                    [random_.randrange(3, vocab_size) for _ in range(options.prompt_tokens)]
                    for _ in range(batch)
                ]
                for system in systems:
                    timing = system.run(prompts, choice)
                    if round_:  # the first round warms up
                        timings.setdefault((system.name, label, batch), []).append(timing)
                    progress.advance(bar)
    return [_row(*case, found, options) for case, found in timings.items()]


def _choices(batch: int, num_adapters: int) -> dict[str, list[int | None]]:
    """Which adapter each request of a batch names."""
    choices: dict[str, list[int | None]] = {"base": [None] * batch, "one adapter": [0] * batch}
    if batch > 1:
        count = min(batch, num_adapters)
        choices[f"{count} mixed"] = [index % count for index in range(batch)]
    return choices


def _row(system: str, label: str, batch: int, timings: list[Timing], options: BenchOptions) -> Row:
    def median(value_of_each: list[float]) -> float:
        return round(statistics.median(value_of_each), 1)

    decoded = batch * (options.new_tokens - 1)
    return Row(
        system,
        label,
        batch,
        median([batch * options.prompt_tokens / t.prefill_s for t in timings]),
        median([decoded / (t.total_s - t.prefill_s) for t in timings]),
        median([batch * options.new_tokens / t.total_s for t in timings]),
    )


def _print(rows: list[Row], options: BenchOptions, info: EngineInfo, console: Console) -> None:
    console.print(
        f"{options.model.name}, {info.quantization}, {info.device} {info.dtype}, "
        f"{torch.get_num_threads()} threads: tokens per second, "
        f"{options.prompt_tokens} in, {options.new_tokens} out",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)
    table.add_column("adapters")
    others = [name for name in _TITLES if any(row.system == name for row in rows)]
    beside_it = [column for other in others for column in (_TITLES[other], "ratio")]
    for column in ("batch", "prefill", "decode", "total", *beside_it):
        table.add_column(column, justify="right")
    found = {(row.system, row.adapters, row.batch): row for row in rows}
    for row in rows:
        if row.system != TurnoutSystem.name:
            continue
        cells = [f"{v:,.0f}" for v in (row.prefill_tok_s, row.decode_tok_s, row.total_tok_s)]
        for other in others:
            cells += _compared(row, found[other, row.adapters, row.batch])
        table.add_row(row.adapters, str(row.batch), *cells)
    console.print(table)
    notes = [f"{_TITLES[other]}: {other}, total" for other in others]
    if notes:
        console.print("; ".join(notes), highlight=False)


def _compared(row: Row, beside: Row) -> list[str]:
    """The other system's figure, and how it and ours relate: ours over PEFT's, HTTP's over ours."""
    ratio = row.total_tok_s / beside.total_tok_s
    if beside.system == HttpSystem.name:
        ratio = 1 / ratio
    return [f"{beside.total_tok_s:,.0f}", f"{ratio:.2f}"]
