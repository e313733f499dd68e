"""An adapter that has been promoted, made without the minutes that a promotion takes."""

import tempfile
from contextlib import closing
from pathlib import Path

from adapters.registry import Registry
from server.adapter_admin import base_shape
from server.bench.workload import save_random_adapter
from server.config import ModelConfig
from server.default_base import DEFAULT_BASE_NAME, ensure_default_base
from server.model.spec import read_spec
from tests.server.gptq_folder import quantize_folder


def put_promoted(store: Path, name: str) -> None:
    """Register an adapter over the default base, and as its merged model the base, rounded."""
    base = ensure_default_base()
    shape = base_shape(ModelConfig(path=base, name=DEFAULT_BASE_NAME))
    with (
        closing(Registry.open(store, shape)) as registry,
        tempfile.TemporaryDirectory(dir=store.parent) as scratch,
    ):
        adapter = save_random_adapter(Path(scratch) / "adapter", read_spec(base), seed=0, rank=4)
        revision = registry.push(name, adapter)
        made, _ = quantize_folder(base, Path(scratch), group_size=64)
        assert registry.base_digest is not None
        registry.artifacts.register(
            made,
            adapter_digest=revision.digest,
            base_digest=registry.base_digest,
            revision=revision.id,
            job="test",
            settings={},
            report={},
        )
