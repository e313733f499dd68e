"""Merged models of a real engine: what leaves while streams run on it."""

import asyncio
import contextlib
import json
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from adapters.manifest import BaseShape
from adapters.registry import Registry
from server.api.merged import MergedRoutes
from server.api.weight_sets import WeightSets
from server.config import AdapterConfig, CacheConfig, Config, ModelConfig
from server.engine.client import EngineClient, OutputStream
from server.engine.messages import AddRequest
from server.engine.request import SamplingParams
from server.errors import ServeError
from server.metrics import Metrics
from tests.conftest import MakeAdapter
from tests.server.gptq_folder import quantize_folder

LIMIT_S = 60  # of what takes a moment


@contextlib.asynccontextmanager
async def running(config: Config) -> AsyncIterator[EngineClient]:
    client = EngineClient(config)
    try:
        await client.start()
        yield client
    finally:
        await client.close()


def submit(engine: EngineClient, name: str, weight_set: str, max_tokens: int) -> OutputStream:
    sampling = SamplingParams(max_tokens=max_tokens, ignore_eos=True)
    request = AddRequest(
        request_id=name,
        prompt_ids=[5, 6, 7],
        sampling=sampling,
        weight_set=weight_set,
        arrival_time=time.monotonic(),
    )
    return engine.submit(request)


@pytest.fixture
def long_base(tiny_base: Path, tmp_path: Path) -> Path:
    """One that a stream can run on for longer than any test."""
    folder = tmp_path / "base"
    shutil.copytree(tiny_base, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"max_position_embeddings": 1 << 15, "sliding_window": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
async def test_a_model_leaves_with_its_last_stream_and_stays_where_it_is_asked_for_before(
    long_base: Path, tmp_path: Path, make_adapter: MakeAdapter
) -> None:
    config = Config(
        model=ModelConfig(path=long_base, quantization="none", dtype="float32"),
        cache=CacheConfig(num_blocks=2048),
        adapters=AdapterConfig(store=tmp_path / "store", bank_rows=64),
    )
    base = BaseShape.from_config(long_base, "tiny", "b" * 64)
    with contextlib.closing(Registry.open(tmp_path / "store", base)) as registry:
        revision = registry.push("bot", make_adapter(r=2, base=long_base))
        (tmp_path / "made").mkdir()
        made, _ = quantize_folder(long_base, tmp_path / "made")
        artifact = registry.artifacts.register(
            made,
            adapter_digest=revision.digest,
            base_digest=base.digest,
            revision=revision.id,
            job="job",
            settings={},
            report={},
        ).digest
        async with asyncio.timeout(LIMIT_S), running(config) as engine:
            sets = WeightSets(registry, engine, Metrics("tiny"), MergedRoutes(engine))
            await sets.reconcile()
            assert sets.path(revision.digest) == "merged"
            stream = submit(engine, "long", artifact, max_tokens=30_000)
            await anext(stream)

            await sets.unload(revision.digest)
            assert sets.path(revision.digest) == "adapter"
            await anext(stream)
            await sets.reconcile()  # promoted again
            assert sets.path(revision.digest) == "merged"
            assert [output.error async for output in submit(engine, "a", artifact, 3)][-1] is None

            await sets.unload(revision.digest)
            await anext(stream)
            stream.close()
            while sets._leaving:
                await asyncio.sleep(0.01)
            with pytest.raises(ServeError, match="is not loaded"):
                await anext(submit(engine, "late", artifact, 3))
