"""Reads one streamed reply: its events, when its text came, and what became of it."""

from collections.abc import Mapping

import msgspec

from loadtest.record import Outcome

_MAX_ERROR_BYTES = 1 << 16  # of an error's body; the rest is not kept


class EventReader:
    """Cuts bytes, however they arrive, into server-sent events."""

    def __init__(self) -> None:
        self._rest = b""  # a line that has not ended yet
        self._name = ""
        self._data: list[bytes] = []

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        """The events, name and data, that end within `data`."""
        *lines, self._rest = (self._rest + data).split(b"\n")
        events = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line:
                self._field(line)
            elif self._data:
                events.append((self._name, b"\n".join(self._data)))
                self._name, self._data = "", []
        return events

    def _field(self, line: bytes) -> None:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"data":
            self._data.append(value)
        elif name == b"event":
            self._name = value.decode("utf-8", "replace")


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    text: str | None = None
    delta: _Delta | None = None
    finish_reason: str | None = None

    @property
    def said(self) -> str:
        return self.text or (self.delta.content if self.delta is not None else None) or ""


class _PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _PromptDetails | None = None

    @property
    def num_cached(self) -> int:
        return (self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens) or 0


class _Error(msgspec.Struct):
    code: str | int | None = None
    type: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: _Error | None = None


class _ErrorBody(msgspec.Struct):
    error: _Error


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_error = msgspec.json.Decoder(_ErrorBody).decode


class Reply:
    """One reply as it comes. `feed` and `end` are told the time; nothing here looks at a clock."""

    def __init__(self, *, keep_text: bool = False) -> None:
        self.status = 0
        self.headers: Mapping[str, str] = {}
        self.text_times: list[float] = []  # when each piece of text came
        self.pieces: list[str] = []
        self.num_prompt_tokens = 0
        self.num_tokens = 0
        self.num_cached_tokens = 0
        self.finish_reason: str | None = None
        self.is_done = False  # [DONE] came
        self._keep_text = keep_text
        self._events = EventReader()
        self._error_body = b""
        self._error = ""  # what broke the stream
        self._has_begun = False

    @property
    def has_begun(self) -> bool:
        """Whether any byte came."""
        return self._has_begun

    def begin(self, status: int, headers: Mapping[str, str]) -> None:
        """The head is there."""
        self._has_begun = True
        self.status, self.headers = status, headers

    def feed(self, data: bytes, now: float) -> None:
        """A piece of the body, which came at `now`."""
        if self.status != 200:
            self._error_body = (self._error_body + data)[:_MAX_ERROR_BYTES]
            return
        for name, event in self._events.feed(data):
            self._take(name, event, now)

    def fail(self, why: str) -> None:
        """It ends here: connection lost, time limit, malformed HTTP."""
        self._error = self._error or why

    def forget(self) -> None:
        """No byte came and it is asked for once more: what failed before does not count."""
        assert not self._has_begun, "nothing to forget"
        self._error = ""

    def outcome(self, *, expected_tokens: int | None) -> tuple[Outcome, str]:
        """What became of it, and why; `expected_tokens` is how many it must hold, if known."""
        if self.status in (429, 503):
            return "rejected", self._error_code()
        if self.status != 200:
            return "failed", self._error_code() if self.status else self._error or "no_reply"
        if self._error or not self.is_done:
            return "cut", self._error or "no_done"
        if self.finish_reason is None:
            return "wrong", "no_finish_reason"
        if expected_tokens is not None and self.num_tokens not in (0, expected_tokens):
            return "wrong", "token_count"
        return "ok", ""

    def _take(self, name: str, event: bytes, now: float) -> None:
        if event == b"[DONE]":
            self.is_done = True
            return
        if name == "error":
            self.fail(_code_in(event) or "error_event")
            return
        try:
            chunk = _decode_chunk(event)
        except msgspec.MsgspecError:
            self.fail("malformed_event")
            return
        if chunk.error is not None:
            self.fail(_code_in(event) or "error_event")
        if chunk.usage is not None:
            self.num_prompt_tokens = chunk.usage.prompt_tokens
            self.num_tokens = chunk.usage.completion_tokens
            self.num_cached_tokens = chunk.usage.num_cached
        for choice in chunk.choices:
            self.finish_reason = choice.finish_reason or self.finish_reason
            if choice.said:
                self.text_times.append(now)
                if self._keep_text:
                    self.pieces.append(choice.said)

    def _error_code(self) -> str:
        return _code_in(self._error_body) or f"http_{self.status}"


def _code_in(body: bytes) -> str:
    """The code, or else the type, of an OpenAI error object; empty where there is none."""
    try:
        error = _decode_error(body).error
    except msgspec.MsgspecError:
        return ""
    return str(error.code or error.type or "")
