"""The benchmark's rungs compute one thing, by whatever technique."""

import itertools
import json
from pathlib import Path

import pytest
import torch
import transformers

from training import bench as module
from training.bench import LADDER, UNLIMITED, Bench, table
from training.bench_model import full_batches, random_base, shape_7b, short_batches
from training.qlora import find_linears

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def bench() -> Bench:
    shape = transformers.MistralConfig(
        vocab_size=32000,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=None,
        tie_word_embeddings=False,
    )
    return Bench(shape, CPU)


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning")
@pytest.mark.filterwarnings("ignore:.*checkpointing_disable.*:FutureWarning")
def test_every_rung_has_the_same_losses(bench: Bench) -> None:
    batches = full_batches(3, 2, 16)
    found = [bench.run(rung, batches, "full", num_warm=1) for rung in (*LADDER, UNLIMITED)]
    assert len({one.name for one in found}) == len(LADDER) + 1
    for one in found[1:]:
        assert one.losses == pytest.approx(found[0].losses, rel=2e-3)
    assert "tutorial recipe" in str(table(found).columns[0]._cells)


@pytest.mark.filterwarnings("ignore:torch.utils.checkpoint:UserWarning")
@pytest.mark.filterwarnings("ignore:.*checkpointing_disable.*:FutureWarning")
def test_padded_rows_have_the_same_losses_too(bench: Bench) -> None:
    batches = short_batches(2, 3, 64, 16, is_packed=False)
    assert any(batch.num_padding for batch in batches)
    first, last = (bench.run(rung, batches, "short", 0) for rung in (LADDER[0], LADDER[-1]))
    assert last.losses == pytest.approx(first.losses, rel=2e-3)


def test_the_base_is_left_as_it_was_found(bench: Bench) -> None:
    before = {name: weight.dtype for name, weight in bench.causal.named_parameters()}
    with bench.as_in_tutorials():
        assert bench.causal.lm_head.weight.dtype == torch.float32
        assert all(weight.requires_grad for weight in bench.weights.values())
    assert {name: weight.dtype for name, weight in bench.causal.named_parameters()} == before


def test_packed_rows_are_nearly_full_and_short_ones_as_long_as_said() -> None:
    packed = short_batches(2, 4, 512, 50, is_packed=True)
    assert len(packed) == 2
    assert all(batch.num_padding < 0.1 * batch.ids.numel() for batch in packed)
    short = short_batches(50, 4, 512, 50, is_packed=False)
    lengths = list(itertools.chain(*(row for batch in short for row in batch.lengths)))
    assert 40 < sum(lengths) / len(lengths) < 60


def test_the_random_base_has_the_shape_it_is_named_after() -> None:
    with torch.device("meta"):
        model = transformers.MistralForCausalLM(shape_7b())
    assert sum(out * in_ for out, in_ in find_linears(model).values()) == 6_979_321_856
    small = shape_7b(1)
    small.hidden_size, small.intermediate_size, small.head_dim = 128, 192, 4
    base = random_base(small, torch.float32, CPU)
    assert not any(weight.requires_grad or weight.is_meta for weight in base.parameters())
    assert base.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_the_command_writes_every_figure(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "gpu", lambda: CPU)
    monkeypatch.setattr(module, "Bench", lambda *_: bench)
    monkeypatch.setattr(module, "LADDER", LADDER[2:4])
    monkeypatch.setattr(module, "LENGTH", 32)
    monkeypatch.setattr(module, "MEAN", 8)
    module.main(tmp_path / "bench.json", num_rows=[2], steps=1)
    found = json.loads((tmp_path / "bench.json").read_text())
    assert [one["rows"] for one in found] == ["short"] * 2 + ["packed"] + ["full"] * 3
    assert all(len(one["losses"]) == 3 for one in found)
    assert all(one["tokens_per_s"] > 0 for one in found)
    overlay = (tmp_path / "bench.html").read_text()
    assert overlay.count("<polyline") == 6
    assert overlay.count("<svg") == 3  # full, short and packed rows
    assert LADDER[3].name in overlay


def test_a_gpu_that_is_not_there_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="measures a GPU, and torch finds none here"):
        module.main(tmp_path / "bench.json")
