"""An engine over a small base, driven in this process, and adapters pushed into its store."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.manifest import BaseShape, Limits
from adapters.registry import Registry
from server.config import (
    AdapterConfig,
    CacheConfig,
    Config,
    Dtype,
    ModelConfig,
    Quantization,
    SchedulerConfig,
)
from server.engine.build import build_engine
from server.engine.messages import RequestOutput
from server.engine.request import BASE, AdapterRef, Request, SamplingParams

GREEDY = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)


class Harness:
    """One engine, stepped by hand."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.engine, self.info = build_engine(config, lambda stage, fraction: None)
        self._registry = Registry.open(
            config.adapters.store,
            BaseShape.from_config(config.model.path, config.model.name, "digest"),
            Limits(allow_other_base=True),
        )
        self._ids = itertools.count()

    def push(self, folder: Path) -> AdapterRef:
        """Register a PEFT folder and return what a request names it by."""
        revision = self._registry.push(f"adapter-{next(self._ids)}", folder)
        return AdapterRef.of(revision)

    def add(
        self,
        prompt_ids: list[int],
        adapter: AdapterRef | None = None,
        sampling: SamplingParams = GREEDY,
        tenant: str = "",
        weight_set: str = BASE,
    ) -> Request:
        """Queue a request."""
        request = Request(
            request_id=str(next(self._ids)),
            prompt_ids=list(prompt_ids),
            sampling=sampling,
            adapter=adapter,
            weight_set=weight_set,
            tenant=tenant,
            arrival_time=time.monotonic(),
            seed=sampling.seed or 0,
        )
        self.engine.add(request)
        return request

    def run(self, max_steps: int = 20_000) -> dict[str, list[RequestOutput]]:
        """Step until nothing is left to do; outputs by request id."""
        outputs: dict[str, list[RequestOutput]] = {}
        for _ in range(max_steps):
            if not self.engine.has_work:
                return outputs
            for output in self.engine.step():
                outputs.setdefault(output.request_id, []).append(output)
            if self.engine.is_stalled:
                time.sleep(0.001)
        raise AssertionError(f"not done after {max_steps} steps")

    def generate(
        self,
        prompt_ids: list[int],
        adapter: AdapterRef | None = None,
        sampling: SamplingParams = GREEDY,
    ) -> list[int]:
        """Run one request alone and return its tokens."""
        request = self.add(prompt_ids, adapter, sampling)
        self.run()
        return request.output_ids

    def close(self) -> None:
        """Let another harness open the store."""
        self._registry.close()


MakeHarness = Callable[..., Harness]


@pytest.fixture
def make_harness(tiny_base: Path, tmp_path: Path) -> Iterator[MakeHarness]:
    """Return a function that builds a harness; keywords replace fields of the config's parts."""
    made: list[Harness] = []

    def make(
        *,
        base: Path = tiny_base,
        quantization: Quantization = "none",
        dtype: Dtype = "float32",
        cache: dict[str, Any] | None = None,
        scheduler: dict[str, Any] | None = None,
        adapters: dict[str, Any] | None = None,
        model: dict[str, Any] | None = None,
    ) -> Harness:
        defaults = AdapterConfig(store=tmp_path / f"store-{len(made)}", bank_rows=128)
        config = Config(
            model=ModelConfig(path=base, quantization=quantization, dtype=dtype, **(model or {})),
            cache=CacheConfig(**{"num_blocks": 256, **(cache or {})}),
            scheduler=SchedulerConfig(**(scheduler or {})),
            adapters=replace(defaults, **(adapters or {})),
        )
        harness = Harness(config)
        made.append(harness)
        return harness

    yield make
    for harness in made:
        harness.close()
