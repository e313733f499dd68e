"""Which examples make a step, and the tensors they become; no document ever sees another."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from training.render import Example

IGNORED = -100  # the label of a token that is not learned; what cross-entropy leaves out
Packed = tuple[int, ...]  # indices of the examples that share a row


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One pass. Rows padded on the right; a label stands where its token is predicted from.

    ids        [num_rows, length]     int64
    labels     [num_rows, length]     int64: the next token of the same document, or IGNORED
    positions  [num_rows, length]     int64: from 0 in each document; None where rows hold one each
    documents  [num_rows, length]     int64: which document of its row, padding another; or None
    lengths    of each row's documents in order, in tokens; what is left of a row is padding
    """

    ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor | None = None
    documents: torch.Tensor | None = None
    lengths: tuple[tuple[int, ...], ...] = ()

    @property
    def num_learned(self) -> int:
        """Tokens that count in the loss."""
        return int((self.labels != IGNORED).sum())

    @property
    def num_padding(self) -> int:
        """Places of rows that hold no token."""
        return self.ids.numel() - sum(map(sum, self.lengths))

    def mask(self) -> torch.Tensor | None:
        """[num_rows, 1, length, length] bool: a token sees earlier ones of its own document.

        None where rows hold one document each: padding is on the right, so that causal order
        alone hides it from every token.
        """
        if self.documents is None:
            return None
        length = self.documents.shape[1]
        same = self.documents.unsqueeze(2) == self.documents.unsqueeze(1)
        causal = torch.ones(length, length, dtype=torch.bool, device=same.device).tril()
        return (same & causal).unsqueeze(1)

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        positions, documents = self.positions, self.documents
        return Batch(
            ids=self.ids.to(device),
            labels=self.labels.to(device),
            positions=None if positions is None else positions.to(device),
            documents=None if documents is None else documents.to(device),
            lengths=self.lengths,
        )


def pack(lengths: Sequence[int], max_length: int) -> list[Packed]:
    """Put documents into rows of at most `max_length`: best fit, longest first."""
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # free tokens -> rows that have them
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        if length > max_length:
            raise ValueError(f"a document of {length} tokens does not fit into {max_length}")
        free = min((free for free, held in room.items() if free >= length and held), default=None)
        if free is None:
            row, free = len(rows), max_length
            rows.append([])
        else:
            row = room[free].pop()
        rows[row].append(index)
        room.setdefault(free - length, []).append(row)
    return [tuple(row) for row in rows]


def epoch_order(rows: Sequence[Packed], seed: int, epoch: int) -> list[Packed]:
    """The rows of one epoch, shuffled by seed and epoch alone: resuming needs no more state."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return [rows[i] for i in torch.randperm(len(rows), generator=generator).tolist()]


def group_lengths(
    order: Sequence[Packed], lengths: Sequence[int], batch_size: int, seed: int, epoch: int
) -> list[Packed]:
    """Sort stretches of 50 batches by length, then shuffle the batches."""
    ordered: list[Packed] = []
    stretch = 50 * batch_size
    for start in range(0, len(order), stretch):
        part = order[start : start + stretch]
        ordered += sorted(part, key=lambda row: -sum(lengths[i] for i in row))
    batches = [tuple(ordered[i : i + batch_size]) for i in range(0, len(ordered), batch_size)]
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    full = torch.randperm(len(batches), generator=generator).tolist()
    last = len(batches) - 1
    if len(batches[last]) < batch_size:  # the short one stays last, or steps would straddle
        full = [i for i in full if i != last] + [last]
    return [row for i in full for row in batches[i]]


def collate(
    examples: Sequence[Example], rows: Sequence[Packed], pad_id: int, *, is_packed: bool
) -> Batch:
    """Make one pass's tensors. Masks go by length, never by id: padding may be the end of turn."""
    lengths = tuple(tuple(len(examples[i].ids) for i in row) for row in rows)
    longest = max(map(sum, lengths))
    ids, labels, positions, documents = (
        torch.full((len(rows), longest), fill) for fill in (pad_id, IGNORED, 0, -1)
    )
    for number, row in enumerate(rows):
        start = 0
        for document, index in enumerate(row):
            example = examples[index]
            end = start + len(example.ids)
            tokens = torch.tensor(example.ids)
            ids[number, start:end] = tokens
            learned = torch.tensor(example.is_learned[1:], dtype=torch.bool)
            labels[number, start : end - 1] = tokens[1:].where(learned, torch.tensor(IGNORED))
            positions[number, start:end] = torch.arange(end - start)
            documents[number, start:end] = document
            start = end
        positions[number, start:] = torch.arange(longest - start)
    if not is_packed:
        return Batch(ids=ids, labels=labels, lengths=lengths)
    return Batch(ids=ids, labels=labels, positions=positions, documents=documents, lengths=lengths)
