"""The tokens that a quantizer looks at, and the rows that a quality gate keeps from it."""

import hashlib
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from training.config import TrainConfig
from training.data import load_dataset, split
from training.render import Example, Renderer, end_ids

MAX_SAMPLE_TOKENS = 512
MIN_SAMPLE_TOKENS = 8  # a shorter end of a text says little
HELD_OUT = 0.2  # share of the rows, where training held none out
_TEXT_TOKENS = 1 << 18  # that are enough of a text, if twice what is calibrated on is not more
# What of the adapter's training says how its rows are read and which are its evaluation rows.
_ROW_SETTINGS = (
    "format",
    "system",
    "loss",
    "max_length",
    "too_long",
    "eval_fraction",
    "seed",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationOptions:
    """What to calibrate on; at least one of `rows` and `text`."""

    rows: Path | None = None  # the adapter's training rows, as `turnout train` reads them
    eval_rows: Path | None = None  # rows to hold out, of a file of their own
    text: Path | None = None  # general text: blank lines between paragraphs
    text_share: float = 0.5  # of the tokens, where there are rows too
    num_tokens: int = 16384  # at most
    seed: int = 0
    training: Mapping[str, Any] | None = None  # the adapter's turnout.json, "training"

    def __post_init__(self) -> None:
        if self.rows is None and self.text is None:
            raise ValueError(
                "nothing to calibrate on: name --rows (what the adapter learned), --text, or both"
            )
        if self.eval_rows is not None and self.rows is None:
            raise ValueError("--eval-rows without --rows: rows are held out of others")
        for name, path in (("rows", self.rows), ("eval-rows", self.eval_rows), ("text", self.text)):
            if path is not None and not path.exists():
                raise ValueError(f"--{name} is {str(path)!r}, which is not there")
        if not 0 < self.text_share < 1:
            raise ValueError(f"--text-share is {self.text_share}; it must lie between 0 and 1")
        if self.num_tokens < MAX_SAMPLE_TOKENS:
            raise ValueError(
                f"--tokens is {self.num_tokens}; it must be {MAX_SAMPLE_TOKENS} or more"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """Token sequences for the quantizer, and examples that it must not see."""

    samples: tuple[tuple[int, ...], ...]
    held_out: tuple[Example, ...]
    num_row_tokens: int
    num_text_tokens: int
    held_out_by: str  # training, eval_rows, calibration or "" (nothing is held out)

    @property
    def fingerprint(self) -> str:
        """Of the samples and the held-out rows, in order."""
        held = [(example.ids, example.is_learned) for example in self.held_out]
        return hashlib.sha256(repr((self.samples, held)).encode()).hexdigest()

    def report(self) -> dict[str, Any]:
        """What provenance says about it."""
        return {
            "fingerprint": self.fingerprint,
            "num_samples": len(self.samples),
            "num_tokens": self.num_row_tokens + self.num_text_tokens,
            "num_row_tokens": self.num_row_tokens,
            "num_text_tokens": self.num_text_tokens,
            "num_held_out": len(self.held_out),
            "held_out_by": self.held_out_by,
        }


def load_calibration(
    options: CalibrationOptions, model: Path, chat_template: str | None = None
) -> Calibration:
    """Read rows and text with the tokenizer of the checkpoint in `model`, and its chat template.

    Rows that training held out are never among the samples. Where it held none out, or these are
    not the very rows that it read, a fifth of them is kept aside here, by the seed. Without rows it
    is a fifth of the text.
    """
    if not (model / "tokenizer.json").is_file():
        raise ValueError(f"{model} holds no tokenizer.json, which calibration needs")
    tokenizer = AutoTokenizer.from_pretrained(model)
    if chat_template is not None:
        tokenizer.chat_template = chat_template
    rows: list[tuple[int, ...]] = []
    held_out: Sequence[Example] = ()
    held_out_by = ""
    if options.rows is not None:
        examples, held_out, held_out_by = _examples(options, model, tokenizer)
        rows = [example.cut(MAX_SAMPLE_TOKENS).ids for example in examples]
    texts = [] if options.text is None else _pieces(options, options.text, tokenizer)
    if options.rows is None:
        pieces = [Example(piece, (True,) * len(piece), ends_turn=False) for piece in texts]
        kept, held_out = split(pieces, HELD_OUT, options.seed)
        texts, held_out_by = [piece.ids for piece in kept], "calibration"
    room = options.num_tokens
    text_room = room if not rows else int(room * options.text_share) if texts else 0
    generator = random.Random(options.seed)
    text_samples = _take(texts, text_room, generator)
    num_text = sum(map(len, text_samples))
    row_samples = _take(rows, room - text_room, generator)
    documents = [*row_samples, *text_samples]
    generator.shuffle(documents)
    return Calibration(
        samples=_end_to_end(documents),
        held_out=tuple(held_out),
        num_row_tokens=sum(map(len, row_samples)),
        num_text_tokens=num_text,
        held_out_by=held_out_by,
    )


def _examples(
    options: CalibrationOptions, model: Path, tokenizer: Any
) -> tuple[Sequence[Example], Sequence[Example], str]:
    """Rows for calibration, rows that are held out, and what held them out."""
    assert options.rows is not None
    training = options.training or {}
    settings = dict(training.get("settings") or {})
    if settings.get("eval_data") and options.eval_rows is None:
        raise ValueError(
            f"the adapter was evaluated on rows of their own ({settings['eval_data']}); "
            "name them with --eval-rows"
        )
    config = TrainConfig(
        base=model,
        data=options.rows,
        out=model,
        eval_data=options.eval_rows,
        **{name: settings[name] for name in _ROW_SETTINGS if name in settings},
    )
    renderer = Renderer(tokenizer, end_ids(model, tokenizer), config.loss)
    dataset = load_dataset(config, renderer)
    if options.eval_rows is not None:
        unseen: set[Example] = set()
        if "data_fingerprint" in training:
            before = load_dataset(config.model_copy(update={"eval_data": None}), renderer)
            if before.fingerprint == training["data_fingerprint"]:
                unseen = set(before.evaluation)
        kept = [example for example in dataset.training if example not in unseen]
        if not kept:
            raise ValueError(f"every row of {options.rows} is held out; none is left to look at")
        return kept, dataset.evaluation, "eval_rows"
    if dataset.fingerprint == training.get("data_fingerprint") and dataset.evaluation:
        return dataset.training, dataset.evaluation, "training"
    every = [*dataset.training, *dataset.evaluation]
    kept, held = split(every, HELD_OUT, options.seed)
    if not held:
        raise ValueError(f"{options.rows} has too few different rows to hold one out")
    return kept, held, "calibration"


def _pieces(options: CalibrationOptions, path: Path, tokenizer: Any) -> list[tuple[int, ...]]:
    """A text's paragraphs as token sequences of bounded length, of a long text some by the seed."""
    text = path.read_text(encoding="utf-8").replace("\r\n", "\n")
    paragraphs = list(filter(None, (part.strip() for part in text.split("\n\n"))))
    order = random.Random(options.seed).sample(range(len(paragraphs)), len(paragraphs))
    left, found = max(_TEXT_TOKENS, 2 * options.num_tokens), {}
    for index in order:
        if left <= 0:
            break
        ids = tokenizer(paragraphs[index])["input_ids"]
        cuts = range(0, len(ids), MAX_SAMPLE_TOKENS)
        found[index] = [tuple(ids[at : at + MAX_SAMPLE_TOKENS]) for at in cuts]
        left -= len(ids)
    pieces = (piece for index in sorted(found) for piece in found[index])
    long_enough = [piece for piece in pieces if len(piece) >= MIN_SAMPLE_TOKENS]
    if not long_enough:
        raise ValueError(f"--text is {str(path)!r}; it holds no text of {MIN_SAMPLE_TOKENS} tokens")
    return long_enough


def _end_to_end(documents: list[tuple[int, ...]]) -> tuple[tuple[int, ...], ...]:
    """The documents one after the other, cut into samples of one length.

    Rows by themselves, padded to the longest of a batch, take longer.
    """
    ids = [token for document in documents for token in document]
    starts = range(0, len(ids), MAX_SAMPLE_TOKENS)
    return tuple(tuple(ids[at : at + MAX_SAMPLE_TOKENS]) for at in starts)


def _take(
    samples: list[tuple[int, ...]], num_tokens: int, generator: random.Random
) -> list[tuple[int, ...]]:
    """Samples in random order until `num_tokens` are full; the last one is cut."""
    taken = []
    for sample in generator.sample(samples, len(samples)):
        if num_tokens <= 0:
            break
        taken.append(sample[:num_tokens])
        num_tokens -= len(taken[-1])
    return taken
