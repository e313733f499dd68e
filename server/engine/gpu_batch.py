"""A step's requests laid out in the GPU's static buffers."""

import numpy as np
import numpy.typing as npt

from server.engine.adapter_cache import AdapterCache
from server.engine.batch import logits_rows
from server.engine.scheduler import Plan
from server.kernels.lora_step import NO_ADAPTER, NO_GAIN
from server.model.gpu_step import KNOWN, GpuStep, StepShape


def fill_step(
    step: GpuStep, plan: Plan, shape: StepShape, adapters: AdapterCache, block_size: int
) -> None:
    """Queue the copies that make the device's buffers hold this plan."""
    _fill_tokens(step, plan, shape, block_size)
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


def _fill_tokens(step: GpuStep, plan: Plan, shape: StepShape, block_size: int) -> None:
    token_ids: list[int] = []
    sources: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for part in plan.decodes:
        request, start = part.request, part.start
        is_known = start < request.num_known_tokens
        token_ids.append(request.known_tokens(start, start + 1)[0] if is_known else 0)
        sources.append(KNOWN if is_known else request.state_row)
        positions.append(start)
        slots.append(request.block_table[start // block_size] * block_size + start % block_size)
    all_positions, all_slots = [_int64(positions)], [_int64(slots)]
    for part in plan.chunks:
        request = part.request
        num_known = min(part.stop, request.num_known_tokens)
        token_ids.extend(request.known_tokens(part.start, num_known))
        sources.extend([KNOWN] * (num_known - part.start))
        if num_known < part.stop:  # at most a part's last token
            token_ids.append(0)
            sources.append(request.state_row)
        at = np.arange(part.start, part.stop)
        blocks = _int64(request.block_table[: -(-part.stop // block_size)])
        all_positions.append(at)
        all_slots.append(blocks[at // block_size] * block_size + at % block_size)
    step.fill(
        shape,
        token_ids,
        sources,
        np.concatenate(all_positions),
        np.concatenate(all_slots),
        logits_rows(plan),
    )


def _chunks(plan: Plan) -> list[tuple[int, int, int, list[int]]]:
    chunks = []
    first = len(plan.decodes)
    for part in plan.chunks:
        chunks.append((first, part.num_tokens, part.start, part.request.block_table))
        first += part.num_tokens
    return chunks


def _int64(values: list[int]) -> npt.NDArray[np.int64]:
    return np.array(values, np.int64)


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
