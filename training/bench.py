"""`python -m training.bench`: what each technique is worth, on a 7B model of random weights."""

import contextlib
import json
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from peft import prepare_model_for_kbit_training
from rich.console import Console
from rich.table import Table
from transformers import MistralConfig

from training.bench_model import full_batches, random_base, shape_7b, short_batches
from training.bench_page import page
from training.config import TrainConfig
from training.fast.flat import flatten
from training.fast.layer import CHOICES
from training.fast.model import FastModel, Options
from training.loss import summed_loss
from training.packing import IGNORED, Batch
from training.qlora import add_adapter, trained
from training.trainer import make_optimizer

LENGTH, MEAN = 2048, 200
CONFIG = TrainConfig(base=Path("-"), data=Path("-"), out=Path("-"), optimizer="paged_adamw_8bit")


@dataclass(frozen=True, slots=True)
class Rung:
    """One row of the ladder: a technique on top of those before it."""

    name: str
    options: Options | None = None  # None: transformers' and PEFT's own modules
    chunked: bool = True
    flat: bool = False


def _options(num_kept: int, *, fused: bool = True, on_host: bool = False) -> Options:
    return Options(fused=fused, on_host=on_host, keep=frozenset(CHOICES[:num_kept]))


LADDER = (
    Rung("tutorial recipe", chunked=False),
    Rung("loss in chunks"),
    Rung("LoRA inside the products, NF4 into one buffer", _options(0, fused=False)),
    Rung("norm, rotation and gate fused", _options(0)),
    Rung("the adapter as one tensor", _options(0), flat=True),
    Rung("what attention gives is kept", _options(2), flat=True),
    Rung("kept in host memory", _options(2, on_host=True), flat=True),
    Rung("q, k, v kept there too", _options(3, on_host=True), flat=True),
)
UNLIMITED = Rung("everything kept on the GPU", _options(4), flat=True)


@dataclass(slots=True)
class Measured:
    """One row's figures."""

    name: str
    num_rows: int
    rows: str  # full, short or packed
    tokens_per_s: float
    peak_gb: float
    reserved_gb: float
    losses: list[float] = field(default_factory=list)


class Bench:
    """Owns the base and its adapter, and runs one rung after the other on them."""

    def __init__(self, shape: MistralConfig, device: torch.device) -> None:
        self.device = device
        self.model = add_adapter(random_base(shape, torch.bfloat16, device), CONFIG)
        self.causal: Any = self.model.base_model.model
        self.weights = trained(self.model)

    def reset(self, *, b_std: float = 0.0) -> None:
        """The adapter as it begins."""
        generator = torch.Generator(self.device).manual_seed(0)
        for name, weight in self.weights.items():
            bound = weight.shape[1] ** -0.5
            fresh = torch.empty_like(weight)
            if "lora_A" in name:
                fresh.uniform_(-bound, bound, generator=generator)
            else:
                fresh.normal_(std=b_std, generator=generator) if b_std else fresh.zero_()
            weight.data = fresh
            weight.grad = None

    @contextlib.contextmanager
    def as_in_tutorials(self) -> Iterator[None]:
        """What `prepare_model_for_kbit_training` does, undone at the end."""
        before = {
            name: weight.data
            for name, weight in self.causal.named_parameters()
            if weight.dtype == torch.bfloat16
        }
        before = {name: tensor.cpu() for name, tensor in before.items()}
        with warnings.catch_warnings(action="ignore"):
            prepare: Any = prepare_model_for_kbit_training
            prepare(self.causal, use_gradient_checkpointing=True)
        for weight in self.weights.values():
            weight.requires_grad_(True)  # it freezes all it finds
        self.model.train()
        try:
            yield
        finally:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                self.causal.gradient_checkpointing_disable()
            self.causal.disable_input_require_grads()
            for name, tensor in before.items():
                self.causal.get_parameter(name).data = tensor.to(self.device)

    def loss_of(self, rung: Rung) -> Callable[[Batch], torch.Tensor]:
        """The mean loss of a batch as this rung works it out."""
        if rung.options is not None:
            fast = FastModel(self.causal, rung.options)
            return lambda batch: fast.summed_loss(batch) / batch.num_learned

        def modules(batch: Batch) -> torch.Tensor:
            near = batch.to(self.device)
            with torch.autocast(self.device.type, torch.bfloat16):
                if rung.chunked:
                    return summed_loss(self.causal, near) / batch.num_learned
                labels = torch.full_like(near.labels, IGNORED)
                labels[:, 1:] = near.labels[:, :-1]
                loss: torch.Tensor = self.causal(
                    input_ids=near.ids, attention_mask=_mask(near), labels=labels
                ).loss
            return loss

        return modules

    def run(self, rung: Rung, batches: list[Batch], rows: str, num_warm: int = 2) -> Measured:
        """Train on the batches; the first few steps are not timed."""
        self.reset()
        has_gpu = self.device.type == "cuda"
        if has_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        recipe = self.as_in_tutorials() if rung.options is None else contextlib.nullcontext()
        with recipe:
            loss_of = self.loss_of(rung)
            weights = list(self.weights.values())
            flat = [flatten(weights)] if rung.flat else weights
            optimizer = make_optimizer(CONFIG, flat)
            losses = []
            started = 0.0
            for number, batch in enumerate(batches):
                if number == num_warm:
                    self._settle()
                    started = time.perf_counter()
                loss = loss_of(batch)
                with torch.autograd.set_multithreading_enabled(rung.options is None):
                    loss.backward()
                torch.nn.utils.clip_grad_norm_(flat, 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=not rung.flat)
                losses.append(loss.detach())
            self._settle()
            seconds = time.perf_counter() - started
        count = sum(sum(map(sum, batch.lengths)) for batch in batches[num_warm:])
        return Measured(
            name=rung.name,
            num_rows=len(batches[0].ids),
            rows=rows,
            tokens_per_s=count / seconds,
            peak_gb=torch.cuda.max_memory_allocated() / 1e9 if has_gpu else 0,
            reserved_gb=torch.cuda.max_memory_reserved() / 1e9 if has_gpu else 0,
            losses=torch.stack(losses).tolist(),
        )

    def _settle(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _mask(batch: Batch) -> torch.Tensor | None:
    """transformers' own: 1 where a row holds a token; None where it is full."""
    if not batch.num_padding:
        return None
    used = torch.tensor([sum(row) for row in batch.lengths], device=batch.ids.device)
    places = torch.arange(batch.ids.shape[1], device=batch.ids.device)
    return (places < used.unsqueeze(1)).long()


def table(found: list[Measured]) -> Table:
    """All rows measured."""
    shown = Table("", "rows", "tok/s", "peak GB", "reserved GB", "loss", box=None)
    for one in found:
        shown.add_row(
            one.name,
            f"{one.num_rows} {one.rows}",
            f"{one.tokens_per_s:,.0f}",
            f"{one.peak_gb:.2f}",
            f"{one.reserved_gb:.2f}",
            f"{one.losses[0]:.3f} to {one.losses[-1]:.3f}",
        )
    return shown


def gpu() -> torch.device:
    """The GPU that is measured. Exits where there is none."""
    if not torch.cuda.is_available():
        raise SystemExit("python -m training.bench measures a GPU, and torch finds none here")
    return torch.device("cuda")


def main(
    out: Annotated[Path, typer.Option(help="JSON for all figures and losses; a .html beside it.")],
    num_rows: Annotated[list[int], typer.Option(help="Rows of 2,048 tokens in a step.")] = [2, 8],  # noqa: B006
    rungs: Annotated[list[int], typer.Option(help="Which of the ladder; all without.")] = [],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Timed steps a row.")] = 6,
    num_layers: Annotated[int, typer.Option(help="Layers of the model.")] = 32,
) -> None:
    """Measure the ladder on this GPU."""
    console = Console(width=140)
    bench = Bench(shape_7b(num_layers), gpu())
    found: list[Measured] = []

    def measure(rung: Rung, batches: list[Batch], rows: str) -> None:
        started = time.perf_counter()
        found.append(bench.run(rung, batches, rows))
        console.print(table(found[-1:]), f"{time.perf_counter() - started:.0f} s in all")
        out.write_text(json.dumps([asdict(one) for one in found], indent=1), encoding="utf-8")

    ladder = [(*LADDER, UNLIMITED)[i] for i in rungs] if rungs else list(LADDER)
    last = ladder[-1]
    for rung in dict.fromkeys((ladder[0], last)):
        measure(rung, short_batches(steps + 2, 8, LENGTH, MEAN, is_packed=False), "short")
    measure(last, short_batches(steps + 2, 8, LENGTH, MEAN, is_packed=True), "packed")
    for count in num_rows:
        batches = full_batches(steps + 2, count, LENGTH)
        for rung in (*ladder, *([] if count > 2 else [UNLIMITED])):
            measure(rung, batches, "full")
    console.print(table(found))
    charts: dict[str, list[tuple[str, list[float]]]] = {}
    for one in found:
        charts.setdefault(f"{one.num_rows} {one.rows} rows", []).append((one.name, one.losses))
    out.with_suffix(".html").write_text(page(charts), encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
