"""A step's requests flattened into tensors."""

import numpy as np
import numpy.typing as npt
import torch

from server.engine.adapter_cache import AdapterCache
from server.engine.scheduler import Plan, Scheduled
from server.kernels.lora import LoraStep, rows_index
from server.kernels.paged_attention import AttentionStep, DecodeRows, PrefillChunk
from server.model.decoder import ModelInput
from server.model.gpu_step import KNOWN
from server.model.rotary import BASE_TABLE

Int64Array = npt.NDArray[np.int64]


def build_input(
    plan: Plan,
    adapters: AdapterCache,
    last_tokens: torch.Tensor,  # [max_running] int64: newest token of each state row, on the device
    block_size: int,
) -> ModelInput:
    """Lay out every token of a step: decode rows first, then prompt chunks, each end to end."""
    device = last_tokens.device
    positions, slots = positions_and_slots(plan, block_size)
    tables = rotary_tables(plan, adapters)
    return ModelInput(
        token_ids=_token_ids(plan, last_tokens),
        positions=torch.from_numpy(positions).to(device, non_blocking=True),
        tables=None if tables is None else torch.from_numpy(tables).to(device, non_blocking=True),
        slot_mapping=torch.from_numpy(slots).to(device, non_blocking=True),
        attention=_attention(plan, block_size, device),
        lora=_lora(plan, adapters, device),
        logits_rows=_int64(logits_rows(plan), device),
    )


def num_logits(part: Scheduled) -> int:
    """How many of a part's tokens need logits: all for prompt logprobs, else the sampled one."""
    if part.request.sampling.prompt_logprobs is not None and not part.request.output_ids:
        return part.num_tokens
    return int(part.samples)


def logits_rows(plan: Plan) -> list[int]:
    """The tokens of the step whose next token is wanted."""
    rows: list[int] = []
    end = 0
    for part in plan.parts:
        end += part.num_tokens
        rows.extend(range(end - num_logits(part), end))
    return rows


def tokens_and_sources(plan: Plan) -> tuple[list[int], list[int]]:
    """The step's tokens, and KNOWN or, for a pending one, the state row that has it on the device.

    A pending token, at most a part's last, is 0 here.
    """
    token_ids: list[int] = []
    sources: list[int] = []
    for part in plan.parts:
        num_known = min(part.stop, part.request.num_known_tokens)
        token_ids.extend(part.request.known_tokens(part.start, num_known))
        sources.extend([KNOWN] * (num_known - part.start))
        if num_known < part.stop:
            token_ids.append(0)
            sources.append(part.request.state_row)
    return token_ids, sources


def positions_and_slots(plan: Plan, block_size: int) -> tuple[Int64Array, Int64Array]:
    """Where each token stands in its request, and where its keys and values go.

    A slot is block * block_size + offset.
    """
    decoded = [(part.start, part.request.block_table) for part in plan.decodes]
    positions = [np.array([at for at, _ in decoded], np.int64)]
    slots = [np.array([table[at // block_size] for at, table in decoded], np.int64)]
    for part in plan.chunks:
        at = np.arange(part.start, part.stop)
        table = np.array(part.request.block_table[: -(-part.stop // block_size)], np.int64)
        positions.append(at)
        slots.append(table[at // block_size])
    everywhere = np.concatenate(positions)
    return everywhere, np.concatenate(slots) * block_size + everywhere % block_size


def rotary_tables(plan: Plan, adapters: AdapterCache) -> Int64Array | None:
    """The rotary table of each token; None where nobody's adapter has one of its own."""
    scaled = [
        part.request.adapter is not None and part.request.adapter.rope is not None
        for part in plan.parts
    ]
    if not any(scaled):
        return None
    tables = [
        adapters.table(part.request.fairness_key) if is_scaled else BASE_TABLE
        for part, is_scaled in zip(plan.parts, scaled, strict=True)
    ]
    return np.repeat(np.array(tables, np.int64), [part.num_tokens for part in plan.parts])


def _token_ids(plan: Plan, last_tokens: torch.Tensor) -> torch.Tensor:
    """Known tokens come from the host; pending ones from the device."""
    token_ids, sources = tokens_and_sources(plan)
    on_device = _int64(token_ids, last_tokens.device)
    pending_at = [at for at, source in enumerate(sources) if source != KNOWN]
    if pending_at:
        state_rows = [sources[at] for at in pending_at]
        at, rows = (_int64(values, last_tokens.device) for values in (pending_at, state_rows))
        on_device[at] = last_tokens[rows]
    return on_device


def _attention(plan: Plan, block_size: int, device: torch.device) -> AttentionStep:
    chunks = []
    first = len(plan.decodes)
    for part in plan.chunks:
        table = part.request.block_table[: -(-part.stop // block_size)]
        chunk = PrefillChunk(first, part.num_tokens, part.start, _int64(table, device))
        chunks.append(chunk)
        first += part.num_tokens
    return AttentionStep(_decode_rows(plan, block_size, device), tuple(chunks))


def _decode_rows(plan: Plan, block_size: int, device: torch.device) -> DecodeRows | None:
    if not plan.decodes:
        return None
    lengths = [part.stop for part in plan.decodes]
    width = -(-max(lengths) // block_size)
    tables = []
    for part in plan.decodes:
        table = part.request.block_table[:width]
        tables.append(table + [0] * (width - len(table)))
    return DecodeRows(_int64(tables, device), _int64(lengths, device))


def _lora(plan: Plan, adapters: AdapterCache, device: torch.device) -> LoraStep | None:
    """Rows of the step's adapters in bank order, and which of them each token must not use."""
    digests = {part.request.adapter.digest for part in plan.parts if part.request.adapter}
    if not digests:
        return None
    ordered = sorted(digests, key=lambda digest: adapters.pages(digest)[0])
    rows_of = {digest: adapters.rows(digest) for digest in ordered}
    rows = [row for digest in ordered for row in rows_of[digest]]
    owner = [index for index, digest in enumerate(ordered) for _ in rows_of[digest]]
    wanted: list[int] = []
    gain_rows: list[int] = []
    gain_tokens: list[int] = []
    for part in plan.parts:
        digest = part.request.adapter.digest if part.request.adapter else None
        gain_row = adapters.gain_row(digest) if digest is not None else None
        if gain_row is not None:
            gain_tokens.extend(range(len(wanted), len(wanted) + part.num_tokens))
            gain_rows.extend([gain_row] * part.num_tokens)
        wanted.extend([ordered.index(digest) if digest is not None else -1] * part.num_tokens)
    is_shared = len(ordered) == 1 and -1 not in wanted
    return LoraStep(
        rows=rows_index(rows, device),
        foreign=None
        if is_shared
        else _int64(wanted, device)[:, None] != _int64(owner, device)[None, :],
        gain_rows=_int64(gain_rows, device) if gain_rows else None,
        gain_tokens=_int64(gain_tokens, device) if gain_rows else None,
    )


def _int64(values: list[int] | list[list[int]], device: torch.device) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)
