"""A step's requests laid out in the GPU's static buffers."""

from server.engine.adapter_cache import AdapterCache
from server.engine.batch import (
    logits_rows,
    positions_and_slots,
    rotary_tables,
    tokens_and_sources,
)
from server.engine.scheduler import Plan
from server.kernels.lora_step import NO_ADAPTER, NO_GAIN
from server.model.gpu_step import GpuStep, StepShape


def fill_step(
    step: GpuStep, plan: Plan, shape: StepShape, adapters: AdapterCache, block_size: int
) -> None:
    """Queue the copies that make the device's buffers hold this plan."""
    positions, slots = positions_and_slots(plan, block_size)
    tables = rotary_tables(plan, adapters)
    step.fill(shape, *tokens_and_sources(plan), positions, tables, slots, logits_rows(plan))
    step.attention.fill(
        [part.stop for part in plan.decodes],
        [part.request.block_table for part in plan.decodes],
        _chunks(plan),
    )
    if shape.with_lora:
        _fill_lora(step, plan, shape, adapters)


def has_lora(plan: Plan) -> bool:
    """Whether any row of the step has an adapter."""
    return any(part.request.adapter is not None for part in plan.parts)


def _chunks(plan: Plan) -> list[tuple[int, int, int, list[int]]]:
    chunks = []
    first = len(plan.decodes)
    for part in plan.chunks:
        chunks.append((first, part.num_tokens, part.start, part.request.block_table))
        first += part.num_tokens
    return chunks


def _fill_lora(step: GpuStep, plan: Plan, shape: StepShape, adapters: AdapterCache) -> None:
    places: dict[str, int] = {}  # digest -> its place among the step's adapters
    adapter_of_token: list[int] = []
    for part in plan.parts:
        adapter = part.request.adapter
        place = NO_ADAPTER if adapter is None else places.setdefault(adapter.digest, len(places))
        adapter_of_token.extend([place] * part.num_tokens)
    adapter_of_token.extend([NO_ADAPTER] * (shape.num_tokens - len(adapter_of_token)))
    pages = [adapters.pages(digest) for digest in places]
    gain_rows = [adapters.gain_row(digest) for digest in places]
    step.lora.fill(adapter_of_token, pages, [NO_GAIN if row is None else row for row in gain_rows])
