"""Whole runs through the fast step: the same curve, and still a run that can be cut short."""

from pathlib import Path
from typing import Any

import pytest
import torch

from server.default_base import ensure_default_base
from tests.training.conftest import MakeConfig, cpu_trainer, dataset_of
from training.config import TrainConfig
from training.fast.model import FastModel, Options
from training.loss import summed_loss
from training.packing import collate
from training.qlora import add_adapter, load_base, trained
from training.render import Example
from training.trainer import Trainer

CPU = torch.device("cpu")


def trainer_of(config: TrainConfig, tokenizer: Any) -> Trainer:
    model = add_adapter(load_base(config.base, "nf4", torch.float32, CPU), config)
    return cpu_trainer(config, model, dataset_of(config, tokenizer))


@pytest.mark.parametrize("settings", [{}, {"packing": True}, {"neftune_alpha": 5.0}])
def test_a_run_follows_the_references_curve(
    make: MakeConfig, tokenizer: Any, tmp_path: Path, settings: dict[str, Any]
) -> None:
    curves = []
    for kernels in ("reference", "fast"):
        config = make(kernels=kernels, max_steps=6, out=tmp_path / kernels, **settings)
        state = trainer_of(config, tokenizer).run()
        curves.append([record["loss"] for record in state.history])
        curves[-1] += [record["loss"] for record in state.evaluations]
    assert curves[1] == pytest.approx(curves[0], rel=1e-3)


def test_a_run_cut_short_goes_on_bit_for_bit(
    make: MakeConfig, tokenizer: Any, tmp_path: Path
) -> None:
    class Cut(Exception):
        pass

    settings = {"kernels": "fast", "max_steps": 5, "save_every": 2}
    whole = trainer_of(make(**settings, out=tmp_path / "whole"), tokenizer)
    whole.run()
    config = make(**settings, out=tmp_path / "cut")
    first = trainer_of(config, tokenizer)

    def stop(state: Any) -> None:
        if state.step == 3:
            raise Cut

    first._on_step = stop
    with pytest.raises(Cut):
        first.run()
    second = trainer_of(config, tokenizer)
    assert second.resume()
    assert second.state.step == 2
    second.run()
    for name, weight in whole._weights.items():
        assert torch.equal(weight, second._weights[name])


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_fifty_steps_on_the_default_base_follow_the_references_curve(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(100, 5000, (8,), generator=generator)
    examples = []
    for _ in range(8):
        ids = words[torch.randint(8, (12,), generator=generator)].tolist()
        examples.append(Example(tuple(ids), (True,) * 12, True))
    config = TrainConfig(base=ensure_default_base(), data=tmp_path, out=tmp_path)
    curves = []
    for is_fast in (False, True):
        model = add_adapter(load_base(config.base, "nf4", torch.float32, CPU), config)
        causal: Any = model.base_model.model
        fast = FastModel(causal, Options())
        optimizer = torch.optim.AdamW(trained(model).values(), lr=2e-4)
        losses = []
        for step in range(50):
            batch = collate(examples, [(step % 4, step % 4 + 4)], 0, is_packed=True)
            total = fast.summed_loss(batch) if is_fast else summed_loss(causal, batch)
            (total / batch.num_learned).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(total.item() / batch.num_learned)
        curves.append(losses)
    assert curves[1] == pytest.approx(curves[0], rel=0.01)
    assert curves[0][-1] < 0.6 * curves[0][0]
