"""One step in static device buffers: what captured graphs read."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from server.kernels.attention_step import AttentionGpuStep
from server.kernels.lora_gpu import RotaryStep
from server.kernels.lora_step import LoraGpuStep
from server.kernels.staging import HostBuffers
from server.model.spec import ModelSpec

KNOWN = -1  # a token that the host knows; else the state row whose newest token it is
NO_SLOT = -1  # padding: its keys and values are written nowhere

_PER_TOKEN = ("token_ids", "sources", "positions", "tables", "slots", "logits_rows")
# Logits are computed for multiples of so many rows: cuBLAS sums in another order for another number
# of rows, and a token must not depend on how many neighbours it has.
_LOGITS_ROWS = 64


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step's launches depend on; everything else is read on the device.

    num_tokens, num_logits   padding included
    """

    num_tokens: int
    num_logits: int
    with_lora: bool
    with_decodes: bool
    with_chunks: bool


def padded_rows(num_logits: int) -> int:
    """Rows of logits that are computed where so many are wanted."""
    return -(-num_logits // _LOGITS_ROWS) * _LOGITS_ROWS


def step_bytes(spec: ModelSpec, num_tokens: int) -> int:
    """What the activations of a long step take at most: those around the MLP, in bf16."""
    width = 3 * spec.intermediate_size + 8 * spec.hidden_size
    return 2 * num_tokens * width


class GpuStep:
    """The tokens of one step, padded to its shape: decode rows first, then prompt chunks.

    All are [max_tokens] int32:

    token_ids    known ones; what a pending one holds here is not read
    sources      KNOWN, or the state row of a request whose token is pending
    positions    in the token's own request
    tables       which rotary table
    slots        where its keys and values go: block * block_size + offset, or NO_SLOT
    logits_rows  tokens whose next token is wanted, end to end
    """

    def __init__(
        self,
        spec: ModelSpec,
        *,
        max_tokens: int,
        max_requests: int,
        max_blocks: int,
        max_pages: int,
        block_size: int,
        device: torch.device,
    ) -> None:
        """`max_blocks` is of one request, `max_pages` of one adapter."""
        self.max_tokens = max_tokens
        self.attention = AttentionGpuStep(
            max_decodes=max_requests,
            max_chunks=max_requests,
            max_tokens=max_tokens,
            max_blocks=max_requests * max_blocks,
            block_size=block_size,
            num_heads=spec.num_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            sliding_window=spec.sliding_window,
            device=device,
        )
        self.lora = LoraGpuStep(
            max_tokens=max_tokens, max_adapters=max_requests, max_pages=max_pages, device=device
        )
        shape = (len(_PER_TOKEN), max_tokens)
        self._buffer = torch.zeros(shape, dtype=torch.int32, device=device)
        self._host_buffers = HostBuffers(shape, device)
        self.token_ids, self.sources, positions, tables, slots, self.logits_rows = self._buffer
        self._per_token = (positions, tables, slots)

    def rotary(self, rotary: torch.Tensor) -> RotaryStep:
        """Where the tokens stand, for the kernels that rotate."""
        return RotaryStep(rotary, *self._per_token)

    def fill(
        self,
        shape: StepShape,
        token_ids: list[int],
        sources: list[int],
        positions: npt.NDArray[np.int64],
        tables: npt.NDArray[np.int64] | None,
        slots: npt.NDArray[np.int64],
        logits_rows: list[int],
    ) -> None:
        """Describe the next step's tokens; the copy is queued on the current stream.

        Without `tables` all rotate by the base's.
        """
        assert len(token_ids) <= shape.num_tokens <= self.max_tokens, "too many tokens"
        assert len(logits_rows) <= shape.num_logits <= self.max_tokens, "too many logits"
        pinned = self._host_buffers.next()
        end = max(shape.num_tokens, shape.num_logits)
        host = pinned.numpy()[:, :end]
        host[:] = 0
        host[1], host[4] = KNOWN, NO_SLOT
        host[0, : len(token_ids)] = token_ids
        host[1, : len(sources)] = sources
        host[2, : len(positions)] = positions
        if tables is not None:
            host[3, : len(tables)] = tables
        host[4, : len(slots)] = slots
        host[5, : len(logits_rows)] = logits_rows
        if end == self.max_tokens:
            self._buffer.copy_(pinned, non_blocking=True)
        else:
            for to, own in zip(self._buffer, pinned, strict=True):
                to[:end].copy_(own[:end], non_blocking=True)
        self._host_buffers.sent()
