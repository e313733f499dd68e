"""What a client asked for, in the engine's terms, and how far the engine has come with it."""

from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec

from adapters.catalog import Revision
from adapters.rope import RopeScaling

NO_STATE_ROW = -1
BASE = ""  # the weight set that adapters are over; others go by their digests

FinishReason = Literal["stop", "length", "abort"]
Tier = Literal["gpu", "host", "disk"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to choose tokens. Values are checked at the door (api/schemas.py), not here."""

    max_tokens: int  # 0: only the prompt is computed, for its logprobs
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0
    top_k: int = 0  # 0 is off
    min_p: float = 0.0
    presence_penalty: float = 0.0  # over generated tokens, as OpenAI defines it
    frequency_penalty: float = 0.0  # over generated tokens
    repetition_penalty: float = 1.0  # over prompt and generated tokens
    logit_bias: dict[int, float] = {}
    seed: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0  # no end-of-sequence and no stop id before this many
    ignore_eos: bool = False
    logprobs: int | None = None  # alternatives to report per generated token; None is off
    prompt_logprobs: int | None = None  # the same for the prompt's own tokens


class AdapterRef(msgspec.Struct, frozen=True):
    """Which revision answers, and what it needs in the engine."""

    digest: str
    num_rank_rows: int  # bank rows: its true rank, gain row included
    rope: RopeScaling | None = None  # a rotary table for it; None: the base's own

    @classmethod
    def of(cls, revision: Revision) -> "AdapterRef":
        """What the engine is told of a registered revision."""
        return cls(revision.digest, revision.num_rank_rows, revision.rope)


@dataclass(slots=True, kw_only=True, eq=False)
class Request:
    """One accepted request and how far the engine has come with it.

    A token is *pending* between the launch of the step that samples it and the commit of that step:
    its value is on the device only, and the next step may use it there.
    """

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    adapter: AdapterRef | None
    weight_set: str = BASE  # the weights it runs through
    tenant: str
    arrival_time: float
    seed: int  # the client's, or one drawn for it
    output_ids: list[int] = field(default_factory=list)
    num_pending: int = 0
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    prefix_root: bytes = b""  # where its chain of block hashes starts
    block_hashes: list[bytes] = field(
        default_factory=list
    )  # chain over full blocks of known tokens
    state_row: int = NO_STATE_ROW  # its row of the device-side state while it runs
    holds_adapter: bool = False
    queued_time: float = 0.0  # when it last joined the queue
    admitted_time: float = 0.0  # when it last left the queue
    num_admitted_tokens: int = 0  # known then
    first_scheduled_time: float | None = None
    num_cached_tokens: int = 0  # of its first admission
    tier: Tier | None = None
    is_finished: bool = False
    prompt_logprobs: list[Any] = field(default_factory=list)

    @property
    def fairness_key(self) -> str:
        """Requests of one adapter or merged model share one account; the base has its own."""
        return self.adapter.digest if self.adapter else self.weight_set

    @property
    def num_known_tokens(self) -> int:
        """Prompt and committed output."""
        return len(self.prompt_ids) + len(self.output_ids)

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens, pending ones included, whose KV no launched step writes yet."""
        return self.num_known_tokens + self.num_pending - self.num_computed_tokens

    @property
    def wants_more(self) -> bool:
        """Whether another token may be sampled, as far as its length tells; one always is."""
        return len(self.output_ids) + self.num_pending < max(self.sampling.max_tokens, 1)

    def known_tokens(self, start: int, stop: int) -> list[int]:
        """Tokens [start, stop) of prompt and committed output."""
        length = len(self.prompt_ids)
        if stop <= length:
            return self.prompt_ids[start:stop]
        return self.prompt_ids[start:] + self.output_ids[max(0, start - length) : stop - length]
