"""What one measured batch took."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Timing:
    """One batch from start to end, in seconds."""

    prefill_s: float  # until every request has its first token
    total_s: float
