"""The bench of merged models, small and on a CPU: every figure is there, of every path."""

from pathlib import Path

import pytest
import torch

from server.bench import merged
from server.bench.driver import Driver
from server.bench.reference import register_adapters, save_reference_base, save_reference_gptq
from server.config import AdapterConfig, CacheConfig, Config, ModelConfig
from server.model.loader import Checkpoint
from tests.server.bench.test_reference import SMALL

WIDER = SMALL | {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 8}


def test_every_path_is_measured_alone_and_in_a_mixed_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged, "STEP_FLOOR_MS", {1: 1.0, 2: 1.0})
    monkeypatch.setattr(merged, "PROMPT", 4)
    monkeypatch.setattr(merged, "NEW", 4)
    monkeypatch.setattr(merged, "STREAMS", 3)
    base, store = tmp_path / "base", tmp_path / "store"
    spec = save_reference_base(base, torch.device("cpu"), **WIDER)
    folder = save_reference_gptq(tmp_path / "merged", base, torch.device("cpu"))
    adapters = register_adapters(store, base, spec, [4, 4])
    config = Config(
        model=ModelConfig(path=base, device="cpu"),
        cache=CacheConfig(num_blocks=64, prefix_caching=False),
        adapters=AdapterConfig(store=store, bank_rows=32),
    )
    found = list(merged.figures(Driver(config), adapters, folder, seconds=0.1))
    names = [figure.name for figure in found]
    for batch in (1, 2):
        for way in ("no adapter", "1 adapter", "merged"):
            assert f"decode step, batch {batch}, {way}" in names
    assert names[-2:] == ["Zipf over 2 adapters, none merged", "the same, the most popular merged"]
    assert all(figure.value > 0 for figure in found)


def test_the_reference_in_gptqs_layout_has_a_code_for_every_weight(tmp_path: Path) -> None:
    base = tmp_path / "base"
    spec = save_reference_base(base, torch.device("cpu"), **WIDER)
    folder = save_reference_gptq(tmp_path / "merged", base, torch.device("cpu"))
    checkpoint = Checkpoint(folder)
    assert checkpoint.gptq is not None
    assert (checkpoint.gptq.group_size, spec.num_layers) == (128, 2)
    matrix = checkpoint.matrix("model.layers.1.mlp.down_proj", torch.device("cpu"))
    assert not isinstance(matrix, torch.Tensor)
    values = matrix.dequantize(torch.float32)
    assert values.shape == (128, 128)
    assert set((values / 0.005).round().int().unique().tolist()) == set(range(-8, 8))
