"""`turnout bench --gpu-table`: the reference on this GPU, each figure beside what bytes allow."""

import itertools
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from adapters.registry import Registry
from server.adapter_admin import base_shape
from server.bench.reference import save_adapters, save_reference_base
from server.config import AdapterConfig, CacheConfig, Config, ModelConfig
from server.engine.build import build_engine
from server.engine.gpu_runner import GpuRunner
from server.engine.request import AdapterRef, Request, SamplingParams
from server.model.spec import ModelSpec

PROMPT_TOKENS = NEW_TOKENS = 256
NUM_ADAPTERS, RANK = 32, 16
MIXED_RANKS = (64, 16, 8, 8, 8, 8, 8, 8)  # 16 on average
BANK_ROWS = 2 * NUM_ADAPTERS * RANK

# batch -> ms that a step's bytes take at 3.0 TB/s, the bandwidth measured on an H100
STEP_FLOOR = {1: 1.3, 8: 1.6, 32: 2.7, 64: 3.2}


@dataclass(frozen=True, slots=True)
class Figure:
    """One measured line of the table."""

    name: str
    value: float
    unit: str
    floor: float | None = None
    note: str = ""


class Bench:
    """The engine over the reference, driven in this process."""

    def __init__(self, base: Path, store: Path, cache: CacheConfig, bank_rows: int) -> None:
        self.model = ModelConfig(path=base, name="reference", device="cuda")
        config = Config(
            model=self.model,
            cache=cache,
            adapters=AdapterConfig(store=store, bank_rows=bank_rows, host_bytes=16 << 30),
        )
        began = time.perf_counter()
        self.engine, self.info = build_engine(config, lambda stage, fraction: None)
        self.start_s = time.perf_counter() - began
        self._ids = itertools.count()
        self._random = random.Random(0)

    def add(
        self,
        adapter: AdapterRef | None,
        prompt_tokens: int = PROMPT_TOKENS,
        new_tokens: int = NEW_TOKENS,
    ) -> str:
        """Queue a request with a random prompt; returns its id."""
        request_id = str(next(self._ids))
        self.engine.add(
            Request(
                request_id=request_id,
                prompt_ids=[self._random.randrange(3, 32000) for _ in range(prompt_tokens)],
                sampling=SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True),
                adapter=adapter,
                tenant="",
                arrival_time=time.monotonic(),
                seed=0,
            )
        )
        return request_id

    def run(self, on_step: Callable[[float], None] | None = None) -> "Trace":
        """Step until nothing is left to do; `on_step` gets the seconds since the start."""
        trace = Trace(time.perf_counter(), [], {})
        while self.engine.has_work:
            outputs = self.engine.step()
            now = time.perf_counter()
            for output in outputs:
                assert output.error is None, output.error
                trace.times.setdefault(output.request_id, []).append(now)
            if outputs:
                trace.steps.append((now, len(outputs)))
            if self.engine.is_stalled:
                time.sleep(0.0002)
            if on_step is not None:
                on_step(now - trace.began)
        return trace

    def replay_ms(self) -> float:
        """What the last step's graph takes on the GPU."""
        assert isinstance(self.engine.runner, GpuRunner), "the bench is for the GPU's own kernels"
        return self.engine.runner.replay_ms()

    def load(self, adapters: list[AdapterRef]) -> None:
        """Bring adapters into the bank."""
        for adapter in adapters:
            self.add(adapter, prompt_tokens=8, new_tokens=1)
        self.run()


@dataclass(slots=True)
class Trace:
    """When tokens came, on the clock of time.perf_counter."""

    began: float
    steps: list[tuple[float, int]]  # end of each step that gave tokens, and how many
    times: dict[str, list[float]]  # by request

    def step_ms(self, batch: int) -> float:
        """Mean time between two steps in a row that both served the whole batch."""
        spans = [
            after[0] - before[0]
            for before, after in itertools.pairwise(self.steps)
            if before[1] == after[1] == batch
        ]
        return statistics.mean(spans) * 1e3

    def first_token_ms(self) -> float:
        """Mean time from the start to a request's first token."""
        return statistics.mean(times[0] - self.began for times in self.times.values()) * 1e3

    def gaps_ms(self, requests: list[str]) -> list[float]:
        """Times between two tokens of a stream, of all these streams."""
        return [
            (after - before) * 1e3
            for request in requests
            for before, after in itertools.pairwise(self.times[request])
        ]


def run(json_file: Path | None, *, quick: bool = False) -> list[Figure]:
    """Measure everything, print the table, and return its lines."""
    console = Console(width=110)
    device = torch.device("cuda")
    figures: list[Figure] = []

    def note(
        name: str, value: float, unit: str, floor: float | None = None, text: str = ""
    ) -> None:
        figures.append(Figure(name, round(value, 3), unit, floor, text))
        console.print(f"{name}: {value:.3f} {unit} {text}", highlight=False)

    with tempfile.TemporaryDirectory(prefix="turnout-bench-") as scratch:
        root = Path(scratch)
        spec = save_reference_base(root / "base", device)
        uniform, mixed = _register(root, spec, quick=quick)
        bench = Bench(root / "base", root / "store", CacheConfig(prefix_caching=False), BANK_ROWS)
        note("start to ready", bench.start_s, "s", None, "kernels compiled or cached, graphs")
        bench.load(uniform)
        _decode(bench, uniform, note)
        _first_tokens(bench, uniform, note)
        _prefill(bench, uniform, note)
        _beside_long_prompts(bench, uniform, note)
        _beside_loads(bench, uniform, note)
        if mixed:
            _mixed_ranks(bench, mixed, note)
    _print(figures, console)
    if json_file is not None:
        versions = {"torch": torch.__version__, "gpu": torch.cuda.get_device_name()}
        rows = {**versions, "figures": [asdict(figure) for figure in figures]}
        json_file.write_text(json.dumps(rows, indent=1))
    return figures


Note = Callable[..., None]


def _register(
    root: Path, spec: ModelSpec, *, quick: bool
) -> tuple[list[AdapterRef], list[AdapterRef]]:
    """Uniform and mixed adapters, pushed into a store."""
    ranks = [RANK] * NUM_ADAPTERS
    if not quick:
        ranks += [MIXED_RANKS[index % len(MIXED_RANKS)] for index in range(NUM_ADAPTERS)]
    folders = save_adapters(root / "adapters", spec, ranks)
    registry = Registry.open(root / "store", base_shape(ModelConfig(path=root / "base")))
    found = []
    for index, folder in enumerate(folders):
        revision = registry.push(f"a{index}", folder)
        found.append(AdapterRef(revision.digest, revision.num_rank_rows))
    registry.close()
    return found[:NUM_ADAPTERS], found[NUM_ADAPTERS:]


def _decode(bench: Bench, adapters: list[AdapterRef], note: Note) -> None:
    for batch, count in ((1, 1), (8, 8), (32, 32), (64, 32)):
        for index in range(batch):
            bench.add(adapters[index % count])
        measured = bench.run().step_ms(batch)
        gpu = bench.replay_ms()
        text = f"GPU alone {gpu:.2f} ms, {batch * 1e3 / measured:,.0f} tok/s"
        note(f"decode, batch {batch}, {count} adapters", measured, "ms", STEP_FLOOR[batch], text)
    base = {}
    for label, first in (("no adapter", None), ("one row with an adapter", adapters[0])):
        for index in range(32):
            bench.add(first if index == 0 else None)
        base[label] = bench.run().step_ms(32)
        note(f"decode, batch 32, {label}", base[label], "ms")
    note("one LoRA row among 32", base["one row with an adapter"] - base["no adapter"], "ms more")


def _mixed_ranks(bench: Bench, adapters: list[AdapterRef], note: Note) -> None:
    bench.load(adapters)
    for adapter in adapters:
        bench.add(adapter)
    note("decode, batch 32, ranks 8 to 64, mean 16", bench.run().step_ms(32), "ms")


def _first_tokens(bench: Bench, adapters: list[AdapterRef], note: Note) -> None:
    for batch in (1, 8, 32, 64):
        for index in range(batch):
            bench.add(adapters[index % len(adapters)], new_tokens=4)
        name = f"mean time to first token, {batch} prompts of {PROMPT_TOKENS} at once"
        note(name, bench.run().first_token_ms(), "ms")


def _prefill(bench: Bench, adapters: list[AdapterRef], note: Note) -> None:
    for index in range(8):
        bench.add(adapters[index], prompt_tokens=2048, new_tokens=1)
    trace = bench.run()
    note("prefill of 8 x 2,048 tokens", max(t for t, _ in trace.steps) - trace.began, "s", 0.3)


def _beside_long_prompts(bench: Bench, adapters: list[AdapterRef], note: Note) -> None:
    streams = [bench.add(adapters[index], new_tokens=1000) for index in range(32)]
    next_due = 1

    def add_prompt(seconds: float) -> None:
        nonlocal next_due
        if seconds > next_due:
            bench.add(adapters[next_due % len(adapters)], prompt_tokens=2048, new_tokens=1)
            next_due += 1

    trace = bench.run(add_prompt)
    gaps = sorted(trace.gaps_ms(streams))
    note(
        "p99 inter-token, 32 streams, 2,048-token prompts every second",
        gaps[int(0.99 * len(gaps))],
        "ms",
        None,
        f"median {statistics.median(gaps):.2f}, largest {gaps[-1]:.1f}",
    )


def _beside_loads(bench: Bench, adapters: list[AdapterRef], note: Note) -> None:
    """Loads at 5 a second of adapters that were dropped from the bank, while 8 others decode."""
    running, loaded = adapters[:8], adapters[8:]
    p99 = {}
    for is_loading in (False, True):
        for adapter in loaded:
            bench.engine.adapters.drop(adapter.digest)
        streams = [bench.add(adapter, new_tokens=1000) for adapter in running]
        due = [(0.5 + 0.2 * index, adapter) for index, adapter in enumerate(loaded)]

        def load_due(seconds: float, due: list[tuple[float, AdapterRef]] = due) -> None:
            if due and seconds > due[0][0]:
                bench.engine.adapters.prefetch(due.pop(0)[1])

        gaps = sorted(bench.run(load_due if is_loading else None).gaps_ms(streams))
        p99[is_loading] = gaps[int(0.99 * len(gaps))]
        events = [e for e in bench.engine.adapters.take_events() if e.event == "loaded"]
        if is_loading and events:
            seconds = [event.seconds for event in events]
            note("disk to bank, rank 16", statistics.median(seconds) * 1e3, "ms")
    note("p99 inter-token of 8 streams, no loads", p99[False], "ms")
    note("p99 inter-token of 8 streams, 5 loads a second", p99[True], "ms")


def _print(figures: list[Figure], console: Console) -> None:
    table = Table(title=f"Mistral-7B shape, NF4, {torch.cuda.get_device_name()}")
    for column in ("", "measured", "floor", ""):
        table.add_column(column, justify="left" if not column else "right")
    for figure in figures:
        floor = "" if figure.floor is None else f"{figure.floor:g}"
        table.add_row(figure.name, f"{figure.value:.2f} {figure.unit}", floor, figure.note)
    console.print(table)
