"""How much each published revision is used, and what promoting it would give."""

import time
from pathlib import Path

from adapters.catalog import Revision
from adapters.registry import Registry
from server.api.weight_sets import WeightSets
from server.config import PromotionConfig
from server.metrics import Metrics
from server.promotion.candidates import Candidate, Served, candidates
from server.promotion.cost import StepTimes


class Popularity:
    """Reads counters and makes estimates of them. Its methods read the disk: call in a thread."""

    def __init__(
        self,
        config: PromotionConfig,
        registry: Registry,
        metrics: Metrics,
        sets: WeightSets,
        times: StepTimes,
        num_set_bytes: int,
    ) -> None:
        """`num_set_bytes` is what one more weight set takes."""
        self._config, self._registry, self._metrics, self._sets = config, registry, metrics, sets
        self.times, self.num_set_bytes = times, num_set_bytes

    def candidates(self, batch_size: int | None = None) -> tuple[list[Candidate], int, float]:
        """Every published revision; the batch size assumed; the recent tokens of all and the base.

        Without `batch_size`, the rows that a step has had on average since the server started.
        """
        now, known = time.time(), self._registry.popularity()
        served = []
        for revision in self._sets.published().values():
            usage = known.get(revision.digest)
            served.append(
                Served(
                    digest=revision.digest,
                    revision=revision.id,
                    tokens=0 if usage is None else usage.tokens,
                    recent_tokens=0.0 if usage is None else usage.recent_at(now),
                )
            )
        recent = sum(each.recent_tokens for each in served)
        base = recent * self._base_per_adapter_token()
        promoted = {each.digest for each in served if self._sets.is_promoted(each.digest)}
        batch = batch_size or self._mean_batch()
        found = candidates(served, base, promoted, batch, self.times, self.num_set_bytes)
        return found, batch, recent + base

    def rows_of(self, revision: Revision) -> Path | None:
        """The file that the policy would calibrate on; None where there is none."""
        if self._config.rows is None:
            return None
        path = self._config.rows / f"{revision.name}.jsonl"
        return path if path.is_file() else None

    def _base_per_adapter_token(self) -> float:
        """Tokens of the base for each of an adapter, since the server started."""
        paths = self._metrics.paths
        base = paths["base"].generation_tokens
        others = sum(series.generation_tokens for series in paths.values()) - base
        return base / others if others else 0.0

    def _mean_batch(self) -> int:
        num_tokens = sum(series.generation_tokens for series in self._metrics.paths.values())
        num_steps = self._metrics.engine_totals().num_steps
        return max(round(num_tokens / num_steps), 1) if num_steps else 1
