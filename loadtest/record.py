"""What became of one request."""

from typing import Literal, get_args

import msgspec

# ok        every token came, from the right adapter
# rejected  429 or 503: the server said no before the first byte
# failed    any other status than 200, or no connection
# cut       200, then the stream broke off: no end, an error event, or our time limit
# wrong     a whole reply, but not the one that was asked for
Outcome = Literal["ok", "rejected", "failed", "cut", "wrong"]
OUTCOMES: tuple[Outcome, ...] = get_args(Outcome)


class Record(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One request's fate. Times of the reply count from when it was meant to be sent."""

    index: int  # its line in the trace, from 0
    intended_s: float  # since the start of the run
    late_s: float  # it was sent so much after that
    over_s: float  # and was over, whatever became of it, so much after that
    outcome: Outcome
    reason: str = ""  # an error's code, or what was wrong
    status: int = 0  # HTTP's; 0 where none came
    ttft_s: float | None = None  # to the first text
    e2e_s: float | None = None  # to the last text
    gaps_s: list[float] = []  # between one piece of text and the next
    num_prompt_tokens: int = 0  # both as the server counts them
    num_tokens: int = 0
    num_cached_tokens: int = 0  # of the prompt: from the server's prefix cache
    path: str | None = None  # x-serving-path
    tier: str | None = None  # x-adapter-tier
    adapter_id: str | None = None  # x-adapter-id
    digest: str | None = None  # x-adapter-digest
    text: str | None = None  # kept where the reply will be asked for again

    @property
    def is_ok(self) -> bool:
        return self.outcome == "ok"

    @property
    def ended_s(self) -> float:
        """When the request was over, since the start of the run."""
        return self.intended_s + self.over_s

    @property
    def tpot_s(self) -> float | None:
        """The mean time per token after the first; None where all text came in one piece."""
        if self.ttft_s is None or self.e2e_s is None or self.num_tokens < 2 or not self.gaps_s:
            return None
        return (self.e2e_s - self.ttft_s) / (self.num_tokens - 1)
