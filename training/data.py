"""From a file of rows to examples for training and evaluation, and a report of what was in it."""

import hashlib
import random
import statistics
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from training.config import TrainConfig
from training.render import Example, Renderer
from training.rows import NoLabel, Row, RowRefused, read_rows, to_document

MAX_UNLABELLED = 0.05  # share of rows without a label past which the data is taken for a mistake


@dataclass(slots=True)
class FileReport:
    """What became of one file's rows."""

    path: str
    num_rows: int = 0
    num_kept: int = 0
    num_cut: int = 0
    num_duplicates: int = 0  # rows equal to an earlier one, kept
    num_unlabelled: int = 0  # among the refused: nothing to learn in them
    num_ending_turn: int = 0  # rows that teach the model to stop
    refused: Counter[str] = field(default_factory=Counter)
    first_refused: dict[str, int] = field(default_factory=dict)  # reason -> its first row, from 1
    lengths: list[int] = field(default_factory=list)  # tokens of the kept rows, before any cut
    num_tokens: int = 0
    num_learned: int = 0

    def lines(self) -> list[tuple[str, str]]:
        """The report in words: what, how much."""
        ordered = sorted(self.lengths)
        middle = int(statistics.median(ordered)) if ordered else 0
        high = ordered[min(len(ordered) - 1, int(0.95 * len(ordered)))] if ordered else 0
        spread = f"{min(ordered, default=0)} to {max(ordered, default=0)}"
        lines = [
            ("rows", f"{self.num_rows:,} read, {self.num_kept:,} kept"),
            ("lengths", f"{spread} tokens, median {middle}, 95 % within {high}"),
            ("tokens", f"{self.num_tokens:,}, of which {self.num_learned:,} are learned"),
            ("cut at max_length", f"{self.num_cut:,}"),
            ("duplicates", f"{self.num_duplicates:,}"),
            ("end of turn learned", f"in {self.num_ending_turn:,} of {self.num_kept:,}"),
        ]
        for reason, count in self.refused.most_common():
            where = f"{count:,}, first in row {self.first_refused[reason]:,}"
            lines.append((f"refused: {reason}", where))
        return lines

    def refuse(self, reason: str) -> None:
        """Count a row, the latest read, that is left out."""
        self.refused[reason] += 1
        self.first_refused.setdefault(reason, self.num_rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """What is trained on and what is held out; no example is in both."""

    training: tuple[Example, ...]
    evaluation: tuple[Example, ...]
    reports: tuple[FileReport, ...]
    num_overlapping: int  # training rows left out because evaluation has them
    fingerprint: str  # of the examples' tokens and masks, in order

    def warnings(self) -> list[str]:
        """What the operator should look at before the run."""
        found = []
        for report in self.reports:
            missing = report.num_kept - report.num_ending_turn
            if missing:
                found.append(
                    f"{missing:,} of {report.num_kept:,} rows of {report.path} teach no end of "
                    "turn: the model may not stop where they do"
                )
            if report.num_cut > 0.1 * report.num_kept:
                found.append(f"{report.num_cut:,} rows are cut; a larger max_length keeps them")
        if not self.evaluation:
            found.append("nothing is held out: the last step's adapter is kept, good or not")
        return found


def load_dataset(config: TrainConfig, renderer: Renderer) -> Dataset:
    """Read, render, check and split the data. Raises ValueError where it is not fit to train on."""
    examples, report = _load_file(config.data, config, renderer)
    reports, num_overlapping = [report], 0
    if config.eval_data is not None:
        evaluation, eval_report = _load_file(config.eval_data, config, renderer)
        reports.append(eval_report)
        held = {_hash([example]) for example in evaluation}
        training = [example for example in examples if _hash([example]) not in held]
        num_overlapping = len(examples) - len(training)
        if not training:
            raise ValueError(f"every row of {config.data} is in {config.eval_data} too")
    else:
        training, evaluation = split(examples, config.eval_fraction, config.seed)
        if config.patience and not evaluation:
            raise ValueError(
                f"patience is {config.patience}, but {config.data} has too few different rows to "
                "hold one out"
            )
    return Dataset(
        training=tuple(training),
        evaluation=tuple(evaluation),
        reports=tuple(reports),
        num_overlapping=num_overlapping,
        fingerprint=_hash([*training, *evaluation]),
    )


def split(
    examples: list[Example], fraction: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """Hold out about `fraction` of the examples; equal ones stay on the same side."""
    groups: dict[str, list[int]] = {}
    for index, example in enumerate(examples):
        groups.setdefault(_hash([example]), []).append(index)
    wanted = round(fraction * len(examples))
    if fraction and len(groups) > 1:
        wanted = max(1, wanted)
    held: set[int] = set()
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    for group in order[:-1]:  # one group at least is left to train on
        if len(held) + len(group) <= wanted:
            held.update(group)
    if wanted and not held and len(order) > 1:  # every row has more equals than that
        fewest = min(order[:-1], key=len)
        held.update(fewest)
    training = [example for index, example in enumerate(examples) if index not in held]
    return training, [examples[index] for index in sorted(held)]


def _load_file(
    path: Path, config: TrainConfig, renderer: Renderer
) -> tuple[list[Example], FileReport]:
    report = FileReport(path=str(path))
    examples = _examples(read_rows(path), config, renderer, report)
    reasons = ", ".join(report.refused) or "it is empty"
    if not examples:
        raise ValueError(f"no row of {path} can be learned from: {reasons}")
    if report.num_unlabelled > MAX_UNLABELLED * report.num_rows:
        raise ValueError(
            f"{report.num_unlabelled:,} of {report.num_rows:,} rows of {path} have nothing to "
            f"learn, over {MAX_UNLABELLED:.0%}: is max_length ({config.max_length}) too small, or "
            f"are answers missing? Refused: {reasons}"
        )
    return examples, report


def _examples(
    rows: Iterable[Row | RowRefused], config: TrainConfig, renderer: Renderer, report: FileReport
) -> list[Example]:
    """Every row that can be learned from; the report counts all."""
    examples: list[Example] = []
    seen: set[str] = set()
    for row in rows:
        report.num_rows += 1
        try:
            if isinstance(row, RowRefused):
                raise row
            whole = renderer.example(to_document(row, config.format, config.system))
            if config.too_long == "drop" and len(whole.ids) > config.max_length:
                raise RowRefused("over max_length")
        except RowRefused as refusal:
            report.num_unlabelled += isinstance(refusal, NoLabel)
            report.refuse(str(refusal))
            continue
        example = whole.cut(config.max_length)
        if not example.num_learned:
            report.num_unlabelled += 1
            report.refuse("nothing to learn in it")
            continue
        key = _hash([example])
        report.num_duplicates += key in seen
        seen.add(key)
        report.num_kept += 1
        report.num_cut += example is not whole
        report.num_ending_turn += example.ends_turn
        report.lengths.append(len(whole.ids))
        report.num_tokens += len(example.ids)
        report.num_learned += example.num_learned
        examples.append(example)
    return examples


def _hash(examples: list[Example]) -> str:
    """Of the tokens and masks."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(repr((example.ids, example.is_learned)).encode())
    return digest.hexdigest()
