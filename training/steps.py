"""How a run divides into optimizer steps, and the learning rate of each."""

import math
from dataclasses import dataclass

from training.config import TrainConfig
from training.packing import Packed, pack
from training.render import Example


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """How a run divides into optimizer steps."""

    rows: tuple[Packed, ...]  # of one epoch
    per_epoch: int
    total: int
    warmup: int

    @classmethod
    def plan(cls, config: TrainConfig, examples: tuple[Example, ...]) -> "Steps":
        """Pack where asked, and count."""
        lengths = [len(example.ids) for example in examples]
        rows = (
            pack(lengths, config.max_length)
            if config.packing
            else [(i,) for i in range(len(lengths))]
        )
        per_epoch = math.ceil(len(rows) / config.batch_size)
        total = config.max_steps or per_epoch * config.epochs
        warmup = config.warmup * total if config.warmup < 1 else config.warmup
        return cls(rows=tuple(rows), per_epoch=per_epoch, total=total, warmup=math.ceil(warmup))

    def rate(self, step: int, schedule: str) -> float:
        """The learning rate of a step as a factor of the highest: never 0, never above 1."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if schedule == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
