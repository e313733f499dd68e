"""What crosses the bridge between the API process and the engine process, as msgspec structs.

Times are `time.monotonic()` seconds, which both processes share on one host.
"""

from typing import Literal

import msgspec

from adapters.rope import RopeScaling
from server.engine.request import BASE, AdapterRef, FinishReason, SamplingParams, Tier

# loaded: into the bank. postponed: the answer to a LoadAdapter that finds no room.
AdapterChange = Literal["loaded", "postponed", "evicted", "dropped", "failed"]


class AddRequest(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """Run this prompt. Answered by `RequestOutput`s until one has a finish reason or an error."""

    request_id: str
    prompt_ids: list[int]
    sampling: SamplingParams
    adapter: AdapterRef | None = None
    weight_set: str = BASE  # a merged model's digest, and no adapter then
    tenant: str = ""
    arrival_time: float


class AbortRequests(msgspec.Struct, frozen=True, tag=True):
    """Free everything these requests hold. Unknown ids are ignored: they may just have finished."""

    request_ids: list[str]


class LoadAdapter(msgspec.Struct, frozen=True, tag=True):
    """Bring an adapter into the bank ahead of its first request. Answered by an `AdapterEvent`."""

    adapter: AdapterRef
    pinned: bool = False


class UnpinAdapter(msgspec.Struct, frozen=True, tag=True):
    """Let a pinned adapter be evicted again."""

    digest: str


class DropAdapter(msgspec.Struct, frozen=True, tag=True):
    """Free the adapter's bank rows, host memory and cached KV. Answered by a `dropped` event."""

    digest: str


class LoadWeightSet(msgspec.Struct, frozen=True, tag=True):
    """Load a merged model beside the base. Answered by a `WeightSetEvent`."""

    digest: str
    folder: str  # a GPTQ checkpoint


class DropWeightSet(msgspec.Struct, frozen=True, tag=True):
    """Free a merged model once nothing runs on it. Answered by a `dropped` event."""

    digest: str


class Shutdown(msgspec.Struct, frozen=True, tag=True):
    """Stop the engine process."""


ToEngine = (
    AddRequest
    | AbortRequests
    | LoadAdapter
    | UnpinAdapter
    | DropAdapter
    | LoadWeightSet
    | DropWeightSet
    | Shutdown
)


class TokenLogprobs(msgspec.Struct, frozen=True):
    """One token's logprob and the most likely alternatives, most likely first."""

    logprob: float
    top_ids: list[int]
    top_logprobs: list[float]


class FirstToken(msgspec.Struct, frozen=True, kw_only=True):
    """What is known once, when a request's first token leaves the engine."""

    scheduled_time: float  # when the request left the queue
    first_token_time: float
    num_cached_tokens: int  # prompt tokens whose KV came from the prefix cache
    tier: Tier | None  # where the adapter was when the request came; None without one


class RequestOutput(msgspec.Struct, kw_only=True, omit_defaults=True):
    """New tokens of one request."""

    request_id: str
    token_ids: list[int] = []
    logprobs: list[TokenLogprobs] | None = None  # one for each of token_ids
    prompt_logprobs: list[TokenLogprobs | None] | None = None  # with `first`, if asked for
    first: FirstToken | None = None  # with the first token, or the end where none is wanted
    finish_reason: FinishReason | None = None
    error: str | None = None  # the engine could not run this request; nothing follows
    error_code: str | None = None


class EngineStats(msgspec.Struct, kw_only=True):
    """Gauges and running totals of the engine, sent with every step and at least once a second."""

    num_running: int = 0
    num_waiting: int = 0
    num_free_blocks: int = 0
    num_preemptions: int = 0
    num_steps: int = 0
    step_seconds: float = 0.0  # total time spent in steps
    prefix_queries: int = 0  # prompt tokens looked up
    prefix_hits: int = 0  # prompt tokens found
    bank_rows_used: int = 0
    host_bytes_used: int = 0
    resident_adapters: list[str] = []  # digests in the bank and ready
    wanted_adapters: list[str] = []  # digests waited for and not resident


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """Everything one step produced."""

    outputs: list[RequestOutput]
    stats: EngineStats


class AdapterEvent(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """An adapter moved between tiers, or failed to."""

    digest: str
    event: AdapterChange
    tier: Tier  # where it was loaded from (gpu: it was there); what it left; what it did not reach
    seconds: float = 0.0
    num_bytes: int = 0
    message: str = ""


class WeightSetEvent(msgspec.Struct, frozen=True, kw_only=True, tag=True):
    """A merged model is there, could not be had, or is gone."""

    digest: str
    event: Literal["loaded", "failed", "dropped"]
    seconds: float = 0.0
    num_bytes: int = 0
    message: str = ""  # why it could not be had


class Progress(msgspec.Struct, frozen=True, tag=True):
    """How far the engine has come with starting."""

    stage: str
    fraction: float


class EngineInfo(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine found out while starting."""

    base_digest: str
    device: str
    dtype: str
    quantization: str
    num_blocks: int
    block_size: int
    max_model_len: int  # tokens of a request, prompt and completion
    trained_len: int = 0  # positions that the base was trained on
    max_scaled_len: int = 0  # as max_model_len, at most, with RoPE scaling; 0: the same
    bank_rows: int  # rank rows the adapter bank holds
    page_rows: int  # an adapter takes whole pages of this many rank rows
    vocab_size: int
    eos_token_ids: list[int]
    kernels: dict[str, str]  # op -> implementation in use

    def longest(self, rope: RopeScaling | None) -> int:
        """Tokens that a request may have at most, by its adapter's RoPE scaling."""
        if rope is None or not self.max_scaled_len:
            return self.max_model_len
        return min(self.max_scaled_len, rope.max_length(self.trained_len))


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The engine serves from now on."""

    info: EngineInfo


class Fatal(msgspec.Struct, frozen=True, tag=True):
    """The engine could not start, and why, in words for the operator."""

    message: str


FromEngine = StepOutputs | AdapterEvent | WeightSetEvent | Progress | Ready | Fatal
