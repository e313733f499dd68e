"""Traces: what is asked, of whom and when, as JSONL that any tool can replay."""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

_MAX_TOKENS = 10_000_000  # of a prompt or a reply: past every context there is


class Line(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request of a trace.

    In an open loop it is sent at `time_s`, whatever became of those before it. In a closed loop
    `user` says whose it is: it is sent as soon as that user's request before it has ended, though
    not before `time_s`.
    """

    time_s: float  # since the start of the trace
    tenant: str
    model: str
    prompt_tokens: int
    output_tokens: int
    seed: int = 0  # of the prompt's words, and of sampling
    user: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.time_s < float("inf"):
            raise ValueError(f"time_s is {self.time_s}; it must be 0 or more")
        if not self.model:
            raise ValueError("model is empty")
        for name in ("prompt_tokens", "output_tokens"):
            if not 1 <= getattr(self, name) <= _MAX_TOKENS:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be in 1..{_MAX_TOKENS}")


def encode_trace(lines: Iterable[Line]) -> bytes:
    """The trace as JSONL."""
    return b"".join(msgspec.json.encode(line) + b"\n" for line in lines)


def write_trace(path: Path, lines: Iterable[Line]) -> None:
    """Write the trace to `path`, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode_trace(lines))


def read_trace(path: Path) -> list[Line]:
    """Read a trace. Raises ValueError with the line's number at the first that will not do."""
    return decode_trace(path.read_bytes(), str(path))


def decode_trace(data: bytes, name: str) -> list[Line]:
    """The requests of a JSONL text; `name` is what an error calls it."""
    lines: list[Line] = []
    for number, text in enumerate(data.split(b"\n"), start=1):
        if not text.strip():
            continue
        try:
            line = msgspec.json.decode(text, type=Line)
        except msgspec.MsgspecError as error:
            raise ValueError(f"{name}, line {number}: {error}") from None
        if lines and line.time_s < lines[-1].time_s:
            raise ValueError(
                f"{name}, line {number}: time_s is {line.time_s}, before the line above "
                f"({lines[-1].time_s})"
            )
        if lines and (line.user is None) != (lines[0].user is None):
            raise ValueError(f"{name}, line {number}: either every line names a user, or none")
        lines.append(line)
    if not lines:
        raise ValueError(f"{name} holds no request")
    return lines


def trace_digest(lines: Iterable[Line]) -> str:
    """The sha256 by which two runs know that they replayed the same trace."""
    return hashlib.sha256(encode_trace(lines)).hexdigest()


def is_closed_loop(lines: Sequence[Line]) -> bool:
    """Whether users wait for their replies."""
    return bool(lines) and lines[0].user is not None


def duration_s(lines: Sequence[Line]) -> float:
    """From the start of the trace to its last request."""
    return lines[-1].time_s if lines else 0.0


def models_of(lines: Iterable[Line]) -> list[str]:
    """The models a trace asks for, sorted."""
    return sorted({line.model for line in lines})
