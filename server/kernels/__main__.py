"""`python -m server.kernels`: the tables of docs/performance.md, on this machine's GPU.

All linears of the Mistral-7B shape with random weights, in one CUDA graph, so that every layer's
weights come from device memory. Speed does not depend on values.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from rich.console import Console
from rich.table import Table

from server.kernels import lora_gpu, nf4_linear
from server.kernels.lora_step import NO_ADAPTER, NO_GAIN, PAGE_ROWS, LoraGpuStep
from server.kernels.nf4_pack import INT4, NF4, Format, PackedWeight, pack

LAYERS = 32
GROUPS = (  # outputs of each sublinear; inputs
    ((4096, 1024, 1024), 4096),
    ((4096,), 4096),
    ((14336, 14336), 4096),
    ((4096,), 14336),
)
GATE_UP = 2
WITH_RESIDUAL = (1, 3)
RANK, NUM_ADAPTERS = 16, 32
REPLAYS = 9
LINEAR_ROWS = (1, 2, 4, 8, 16, 32, 48, 64, 128, 256, 384, 512)
BATCHES = {
    "1 row, 1 adapter": [0],
    "8 rows, 8 adapters": list(range(8)),
    "32 rows, 32 adapters": list(range(32)),
    "64 rows, 32 adapters": [row % 32 for row in range(64)],
    "32 rows, 1 adapter": [0] * 32,
    "32 rows, 1 of them with an adapter": [0] + [NO_ADAPTER] * 31,
    "32 rows, none with an adapter": [NO_ADAPTER] * 32,
}
PREFILLS = {"512 tokens, 2 adapters": [0] * 256 + [1] * 256, "2,048 tokens, 1 adapter": [0] * 2048}


@dataclass(frozen=True, slots=True)
class Linear:
    """One fused group of one layer, with its LoRA banks."""

    group: int
    weight: PackedWeight
    a_bank: torch.Tensor
    b_bank: torch.Tensor

    @property
    def out_splits(self) -> tuple[int, ...]:
        return GROUPS[self.group][0]


def main() -> None:
    """Measure and print. Exits where there is no GPU."""
    if not torch.cuda.is_available():
        raise SystemExit("python -m server.kernels measures a GPU, and torch finds none here")
    console = Console()
    console.print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    model = make_model(NF4)
    merged = make_model(INT4[128])
    table = Table("rows", NF4.name, INT4[128].name, title="all linears, ms a step")
    for rows in LINEAR_ROWS:
        table.add_row(str(rows), *(f"{time_linears(one, rows):.2f}" for one in (model, merged)))
    console.print(table)
    del merged
    table = Table("batch", "linears", "with LoRA", "shrink", "expand", title="ms a step")
    for name, adapters in BATCHES.items():
        table.add_row(name, *(f"{ms:.2f}" for ms in time_decode(model, adapters)))
    console.print(table)
    table = Table("prefill", "linears", "LoRA, residual, SiLU", title="ms")
    for name, adapters in PREFILLS.items():
        table.add_row(name, *(f"{ms:.2f}" for ms in time_prefill(model, adapters)))
    console.print(table)


def make_model(format: Format) -> list[Linear]:
    """The linears of all layers, in their order."""
    return [make_linear(group, format) for _ in range(LAYERS) for group in range(len(GROUPS))]


def make_linear(group: int, format: Format = NF4) -> Linear:
    """Random codes, scales and banks."""
    splits, in_features = GROUPS[group]
    out_features = sum(splits)
    rows = NUM_ADAPTERS * RANK
    shape = (out_features, in_features // 2)
    qweight = torch.randint(0, 256, shape, dtype=torch.uint8, device="cuda")
    scales = torch.rand(out_features, in_features // format.group_size, device="cuda") * 0.05 + 0.01
    a_bank = torch.randn(rows, len(splits), in_features, device="cuda").bfloat16()
    b_bank = torch.randn(rows, out_features, device="cuda").bfloat16()
    return Linear(group, pack(qweight, scales, format), a_bank, b_bank)


def time_linears(model: Sequence[Linear], rows: int) -> float:
    """Milliseconds of all linears alone."""
    inputs = make_inputs(rows)

    def run() -> None:
        for linear in model:
            nf4_linear.nf4_linear(inputs[linear.group], linear.weight)

    return measure(run)


def time_decode(model: Sequence[Linear], adapters: Sequence[int]) -> tuple[float, ...]:
    """Milliseconds of the linears; with LoRA, residuals and SiLU; of shrink and expand alone."""
    inputs, step = make_inputs(len(adapters)), make_step(adapters)
    residual = make_inputs(len(adapters))[0]
    outputs = [residual.new_empty(len(adapters), sum(splits)) for splits, _ in GROUPS]
    h = [lora_gpu.shrink(inputs[linear.group], linear.a_bank, step) for linear in model[:4]]

    def with_lora() -> None:
        for linear, following in pairwise((*model, model[0])):
            x = inputs[linear.group]
            shrunk = lora_gpu.shrink(x, linear.a_bank, step)
            lora_gpu.finish(
                nf4_linear.partial_sums(x, linear.weight, following.weight),
                nf4_linear.split_of(linear.weight),
                shrunk,
                linear.b_bank,
                linear.out_splits,
                step,
                residual=residual if linear.group in WITH_RESIDUAL else None,
                with_silu=linear.group == GATE_UP,
            )

    def shrink() -> None:
        for linear in model:
            lora_gpu.shrink(inputs[linear.group], linear.a_bank, step)

    def expand() -> None:
        for linear in model:
            group = linear.group
            lora_gpu.expand(outputs[group], h[group], linear.b_bank, linear.out_splits, step)

    linears = time_linears(model, len(adapters))
    return linears, measure(with_lora), measure(shrink), measure(expand)


def time_prefill(model: Sequence[Linear], adapters: Sequence[int]) -> tuple[float, ...]:
    """Milliseconds of the linears, and of LoRA with the residuals and SiLU after them."""
    inputs, step = make_inputs(len(adapters)), make_step(adapters)
    residual = make_inputs(len(adapters))[0]
    outputs = [residual.new_zeros(len(adapters), sum(splits)) for splits, _ in GROUPS]

    def lora() -> None:
        for linear in model:
            h = lora_gpu.shrink(inputs[linear.group], linear.a_bank, step)
            y = outputs[linear.group]
            if linear.group == GATE_UP:
                lora_gpu.expand_silu(y, h, linear.b_bank, step)
            else:
                added = residual if linear.group in WITH_RESIDUAL else None
                lora_gpu.expand(y, h, linear.b_bank, linear.out_splits, step, residual=added)

    return time_linears(model, len(adapters)), measure(lora)


def make_inputs(rows: int) -> list[torch.Tensor]:
    """One random input for each group."""
    return [torch.randn(rows, size, device="cuda").bfloat16() for _, size in GROUPS]


def make_step(adapters: Sequence[int]) -> LoraGpuStep:
    """A step whose adapters have rank `RANK`, their pages scattered over the banks."""
    step = LoraGpuStep(
        max_tokens=len(adapters),
        max_adapters=NUM_ADAPTERS,
        max_pages=8,
        device=torch.device("cuda", 0),
    )
    num_pages = RANK // PAGE_ROWS
    order = torch.randperm(NUM_ADAPTERS * num_pages).tolist()
    count = max(adapters) + 1
    pages = [order[i * num_pages : (i + 1) * num_pages] for i in range(count)]
    step.fill(adapters, pages, [NO_GAIN] * count)
    return step


def measure(run: Callable[[], None]) -> float:
    """Median milliseconds of a captured graph's replay."""
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    times = []
    for _ in range(REPLAYS):
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return float(statistics.median(times))


if __name__ == "__main__":
    main()
