"""Documents to token ids with a loss mask, through the base's own chat template."""

import itertools
import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jinja2

from training.rows import Chat, RowRefused, Text

Span = tuple[int, int]  # characters that are learned: first, one past the last


@dataclass(frozen=True, slots=True)
class Example:
    """One document as tokens: `is_learned[i]` says whether token i counts in the loss."""

    ids: tuple[int, ...]
    is_learned: tuple[bool, ...]
    ends_turn: bool  # the last learned token ends a turn, so that serving stops there
    reply_at: int | None = None  # first token of the last reply; None: none, or not all of it
    question: str = ""  # what that reply answers, for people to read

    @property
    def num_learned(self) -> int:
        """Tokens that count. The first token of a document has nothing to be predicted from."""
        return sum(self.is_learned[1:])

    def cut(self, max_length: int) -> "Example":
        """The first `max_length` tokens."""
        if len(self.ids) <= max_length:
            return self
        learned = self.is_learned[:max_length]
        ends = self.ends_turn and not any(self.is_learned[max_length:])
        return replace(
            self, ids=self.ids[:max_length], is_learned=learned, ends_turn=ends, reply_at=None
        )


class Renderer:
    """Renders and tokenizes as the server does; knows which tokens end a turn."""

    def __init__(self, tokenizer: Any, end_ids: frozenset[int], loss: str) -> None:
        if not tokenizer.is_fast:
            raise ValueError("the base's tokenizer has no tokenizer.json, which loss masks need")
        self.tokenizer, self.end_ids, self._loss = tokenizer, end_ids, loss

    def example(self, document: Chat | Text) -> Example:
        """Tokenize and mask one document. Raises RowRefused where the template does."""
        if isinstance(document, Text):
            return replace(self._plain(document), question=document.prompt)
        replies = [i for i, turn in enumerate(document.messages) if turn["role"] == "assistant"]
        text, spans, reply = self._chat(list(document.messages), replies)
        question = document.messages[replies[-1] - 1]["content"] if replies[-1] else ""
        return replace(self._masked(text, spans, reply, is_plain=False), question=question)

    def prompt_ids(self, messages: list[dict[str, str]]) -> list[int]:
        """What the server makes of a chat request."""
        text = self._render(messages, generate=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _plain(self, document: Text) -> Example:
        text = document.prompt + document.completion
        start = 0 if self._loss == "all" else len(document.prompt)
        reply = len(document.prompt) if document.prompt else None
        return self._masked(text, [(start, len(text))], reply, is_plain=True)

    def _chat(
        self, messages: list[dict[str, str]], replies: list[int]
    ) -> tuple[str, list[Span], int | None]:
        """The text, what is learned of it, and where the last reply begins."""
        text = self._render(messages, generate=False)
        if self._loss == "all":
            return text, [(0, len(text))], self._last_reply(messages[: replies[-1]], text)
        spans = []
        for index in replies if self._loss == "assistant" else replies[-1:]:
            before = self._render(messages[:index], generate=True)
            through = self._render(messages[: index + 1], generate=False)
            if not (through.startswith(before) and text.startswith(through)):
                raise RowRefused(
                    "the template renders a reply otherwise once later turns follow"
                    if through.startswith(before)
                    else "the template's generation prompt is not how it renders a reply"
                )
            spans.append((len(before), len(through)))
        return text, spans, spans[-1][0]

    def _last_reply(self, before: list[dict[str, str]], text: str) -> int | None:
        """Where the reply after these messages begins in `text`, if it can be told."""
        try:
            prompt = self._render(before, generate=True)
        except RowRefused:  # no question, or a template that takes no prompt without one
            return None
        return len(prompt) if text.startswith(prompt) else None

    def _render(self, messages: list[dict[str, str]], *, generate: bool) -> str:
        if not messages:
            raise RowRefused("it begins with a reply")
        try:
            text = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=generate, tokenize=False
            )
        except jinja2.TemplateError as error:
            raise RowRefused(f"the template refuses it: {error}") from None
        return str(text)

    def _masked(
        self, text: str, spans: list[Span], reply: int | None, *, is_plain: bool
    ) -> Example:
        """Tokenize `text` whole; learn what begins inside a span, up to the end of its turn.

        The last reply begins at character `reply`. Plain text gets its start and end here.
        """
        ids, offsets = self._encoded(text, [first for first, _ in spans])
        learned = [False] * len(ids)
        ends_turn = False
        for first, last in spans:
            inside = [i for i, (at, _) in enumerate(offsets) if first <= at < last]
            if self._loss != "all":  # what the template puts after the end is never generated
                ends = [i for i in inside if ids[i] in self.end_ids]
                inside = [i for i in inside if not ends or i <= ends[-1]]
            for i in inside:
                learned[i] = True
            ends_turn = any(ids[i] in self.end_ids for i in inside[-2:])
        starts = [at for at, _ in offsets]
        reply_at = starts.index(reply) if reply in starts else None
        start = self.tokenizer.bos_token_id
        if is_plain and self._adds_start() and ids[:1] != [start]:
            ids, learned = [start, *ids], [False, *learned]
            reply_at = None if reply_at is None else reply_at + 1
        if is_plain and self.tokenizer.eos_token_id is not None:
            if ids[-1:] != [self.tokenizer.eos_token_id]:
                ids, learned = [*ids, self.tokenizer.eos_token_id], [*learned, True]
            ends_turn = True
        return Example(tuple(ids), tuple(learned), ends_turn, reply_at or None)

    def _encoded(self, text: str, starts: list[int]) -> tuple[list[int], list[Span]]:
        """Tokens and where each begins and ends in `text`.

        Where a token would reach over the start of a reply, as newlines may, that reply is
        tokenized apart: what is generated never joins the tokens of its prompt.
        """
        whole = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = list(whole["input_ids"]), list(whole["offset_mapping"])
        cuts = [start for start in starts if any(at < start < end for at, end in offsets)]
        if not cuts:
            return ids, offsets
        ids, offsets = [], []
        for first, last in itertools.pairwise([0, *cuts, len(text)]):
            part = self.tokenizer(
                text[first:last], add_special_tokens=False, return_offsets_mapping=True
            )
            ids += part["input_ids"]
            offsets += [(first + at, first + end) for at, end in part["offset_mapping"]]
        return ids, offsets

    def _adds_start(self) -> bool:
        start = self.tokenizer.bos_token_id
        return start is not None and self.tokenizer("")["input_ids"][:1] == [start]


def end_ids(base: Path, tokenizer: Any) -> frozenset[int]:
    """Tokens after which the server stops: the tokenizer's, and generation_config.json's."""
    found = {tokenizer.eos_token_id}
    path = base / "generation_config.json"
    if path.is_file():
        ends = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        found |= set(ends) if isinstance(ends, list) else {ends}
    return frozenset(found - {None})
