"""Token ids to text as they come, with stop strings."""

import codecs
from collections.abc import Sequence

from server.api.tokenizer import TextCodec


class StopSearch:
    """Finds the stop string that is complete first in a text that comes in pieces.

    Holds back only what could still become a stop string, so any way of cutting the text gives the
    same result. Of two that end at the same place, the longer one counts.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.has_stopped = False

    def feed(self, piece: str, *, may_stop: bool = True) -> str:
        """Return the text that is now certain. Sets `has_stopped` when a stop string is complete.

        With `may_stop` false, one that this piece completes is text like any other.
        """
        text = self._held + piece
        if may_stop:
            # A match ends in this piece: one that ended before it was not allowed to stop.
            seen = len(self._held)
            found = [
                (start + len(stop), start)
                for stop in self._stops
                if (start := text.find(stop, max(seen - len(stop) + 1, 0))) >= 0
            ]
            if found:
                self.has_stopped, self._held = True, ""
                return text[: min(found)[1]]
        cut = min(_could_begin(stop, text) for stop in self._stops)
        self._held = text[cut:]
        return text[:cut]

    def flush(self) -> str:
        """Return what was held back: nothing more will come to complete it."""
        held, self._held = self._held, ""
        return held


def _could_begin(stop: str, text: str) -> int:
    """Where a proper beginning of `stop` ends the text: the first such place, or the text's end."""
    at = text.find(stop[0], max(len(text) - len(stop) + 1, 0))
    while at >= 0:
        if stop.startswith(text[at:]):
            return at
        at = text.find(stop[0], at + 1)
    return len(text)


class Detokenizer:
    """Turns one choice's tokens into text as they come; a character comes when it is whole."""

    def __init__(
        self, codec: TextCodec, prompt_ids: Sequence[int], stops: Sequence[str], min_tokens: int
    ) -> None:
        self._codec = codec
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._search = StopSearch(stops) if stops else None
        self._min_tokens = min_tokens
        self._strip_first = codec.strips_first_space(prompt_ids)
        self.num_tokens = 0  # fed so far, up to the one that completed a stop string

    @property
    def has_stopped(self) -> bool:
        """Whether a stop string is complete."""
        return self._search is not None and self._search.has_stopped

    def feed(self, token_ids: Sequence[int]) -> str:
        """Return the text that these tokens make certain; those past a stop string are not used."""
        if self._search is None:
            self.num_tokens += len(token_ids)
            return self._text(b"".join(map(self._codec.visible_piece, token_ids)))
        texts = []
        for token_id in token_ids:
            self.num_tokens += 1
            piece = self._text(self._codec.visible_piece(token_id))
            may_stop = self.num_tokens > self._min_tokens
            texts.append(self._search.feed(piece, may_stop=may_stop))
            if self._search.has_stopped:
                break
        return "".join(texts)

    def skip(self, num_tokens: int) -> None:
        """Count tokens that are no text: the end of sequence, a stop id."""
        self.num_tokens += num_tokens

    def flush(self) -> str:
        """Return what was held back, at the end of a choice that no stop string ended."""
        if self._search is None:
            return self._text(b"", final=True)
        tail = self._search.feed(self._text(b"", final=True), may_stop=False)
        return tail + self._search.flush()

    def _text(self, piece: bytes, *, final: bool = False) -> str:
        text = self._decoder.decode(piece, final)
        if self._strip_first and text:
            self._strip_first = False
            return text.removeprefix(" ")
        return text
