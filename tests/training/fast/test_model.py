"""The fast step against transformers' and PEFT's own modules, in fp32: loss and every gradient."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.random_mistral import random_mistral
from tests.training.conftest import MakeConfig
from training.fast.layer import CHOICES
from training.fast.model import FastModel, Options
from training.loss import add_noise, summed_loss
from training.packing import Batch, collate
from training.qlora import add_adapter, load_base, trained
from training.render import Example

CPU = torch.device("cpu")
Gradients = dict[str, torch.Tensor]
MakeModel = Callable[..., Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Mistral of 3 layers with weights and norms large enough to matter."""
    folder = tmp_path_factory.mktemp("fast-base")
    return random_mistral(folder, has_random_norms=True, intermediate_size=192, num_hidden_layers=3)


@pytest.fixture
def new(base: Path, make: MakeConfig) -> MakeModel:
    """Return a function that makes a model with a random adapter; keywords are settings."""

    def model(
        *, is_packed: bool = False, rope: dict[str, Any] | None = None, **settings: Any
    ) -> Any:
        loaded = load_base(base, "nf4", torch.float32, CPU, is_packed=is_packed)
        if rope:
            loaded.config.rope_parameters = rope
            loaded.model.rotary_emb = type(loaded.model.rotary_emb)(loaded.config)
        adapted = add_adapter(loaded, make(base=base, **settings))
        generator = torch.Generator().manual_seed(1)
        for weight in trained(adapted).values():
            weight.data.normal_(std=0.1, generator=generator)
        return adapted

    return model


def batch_of(rows: list[tuple[int, ...]], *, is_packed: bool) -> Batch:
    """Rows of four documents whose first two tokens are not learned."""
    generator = torch.Generator().manual_seed(0)
    lengths = (7, 12, 5, 9)
    examples = [
        Example(
            tuple(torch.randint(3, 250, (length,), generator=generator).tolist()),
            tuple(place >= 2 for place in range(length)),
            True,
        )
        for length in lengths
    ]
    return collate(examples, rows, 0, is_packed=is_packed)


PACKED = batch_of([(0, 1), (2, 3)], is_packed=True)
PADDED = batch_of([(0,), (1,), (2,)], is_packed=False)
FULL = batch_of([(0,)], is_packed=False)


def result(model: Any, loss: torch.Tensor) -> tuple[float, Gradients]:
    model.zero_grad()
    loss.backward()
    found = {name: weight.grad for name, weight in trained(model).items()}
    return loss.item(), {name: grad.clone() for name, grad in found.items() if grad is not None}


def assert_same(model: Any, batch: Batch, options: Options) -> None:
    expected, theirs = result(model, summed_loss(model.base_model.model, batch))
    fast = FastModel(model.base_model.model, options)
    for _ in range(2):  # nothing of the first pass is left for the second
        loss, ours = result(model, fast.summed_loss(batch))
        assert loss == pytest.approx(expected, rel=1e-5)
        assert ours.keys() == theirs.keys()
        for name, gradient in theirs.items():
            error = (ours[name] - gradient).norm() / gradient.norm()
            assert error < 1e-4, f"{name}: {error}"


@pytest.mark.parametrize(
    ("batch", "is_packed"),
    [(PACKED, False), (PADDED, True), (FULL, False)],
    ids=["packed", "padded, 4 bits", "full"],
)
def test_loss_and_gradients_are_those_of_the_modules(
    new: MakeModel, batch: Batch, is_packed: bool
) -> None:
    assert_same(new(is_packed=is_packed), batch, Options())


@pytest.mark.parametrize("count", range(len(CHOICES) + 1))
def test_what_is_kept_changes_nothing(new: MakeModel, count: int) -> None:
    assert_same(new(), PACKED, Options(keep=frozenset(CHOICES[:count])))
    assert_same(new(), PADDED, Options(keep=frozenset(CHOICES[count:])))


@pytest.mark.parametrize(
    "settings",
    [
        {"targets": "attention", "rank_pattern": {"q_proj": 3}},
        {"targets": "mlp", "use_rslora": True, "alpha_pattern": {"up_proj": 9}},
        {"targets": ["down_proj", "layers.1.self_attn.v_proj"]},
        {"rank": 70},
        {"rank_pattern": {"layers.1.mlp.down_proj": 70, "layers.2.mlp.up_proj": 60}},
    ],
    ids=["attention", "mlp", "some", "wide", "uneven"],
)
def test_every_choice_of_targets_ranks_and_alphas(new: MakeModel, settings: dict[str, Any]) -> None:
    assert_same(new(**settings), PACKED, Options())


def test_scaled_positions_are_the_models_own(new: MakeModel) -> None:
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    scaled = new(rope=rope)
    assert_same(scaled, PADDED, Options())
    plain = FastModel(new().base_model.model, Options()).summed_loss(PADDED).item()
    other = FastModel(scaled.base_model.model, Options()).summed_loss(PADDED).item()
    assert abs(plain - other) > 0.01


def test_noise_on_embeddings_is_the_same_noise(new: MakeModel) -> None:
    model = new()
    causal = model.base_model.model
    clean = summed_loss(causal, PACKED).item()
    add_noise(causal, 50.0)
    model.train()
    torch.manual_seed(3)
    theirs = summed_loss(causal, PACKED).item()
    torch.manual_seed(3)
    ours = FastModel(causal, Options()).summed_loss(PACKED).item()
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert abs(ours - clean) > 0.01


def test_a_changed_adapter_is_seen_at_the_next_pass(new: MakeModel) -> None:
    model = new()
    fast = FastModel(model.base_model.model, Options())
    before = fast.summed_loss(PADDED).item()
    for weight in trained(model).values():
        weight.data.mul_(2)
    after = fast.summed_loss(PADDED).item()
    assert after == pytest.approx(summed_loss(model.base_model.model, PADDED).item(), rel=1e-5)
    assert abs(after - before) > 0.01


def test_an_evaluation_keeps_nothing_and_gives_the_same_loss(new: MakeModel) -> None:
    model = new()
    fast = FastModel(model.base_model.model, Options())
    training = fast.summed_loss(PADDED).item()
    fast._keeper.clear()
    with torch.no_grad():
        loss = fast.summed_loss(PADDED)
    assert loss.item() == training
    assert not loss.requires_grad
    assert not fast._keeper._held


def test_a_step_that_broke_off_leaves_nothing_behind(new: MakeModel) -> None:
    model = new()
    fast = FastModel(model.base_model.model, Options())
    fast.summed_loss(PADDED)  # and no backward pass
    _, ours = result(model, fast.summed_loss(PACKED))
    _, theirs = result(model, summed_loss(model.base_model.model, PACKED))
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5)


def test_a_batch_with_nothing_to_learn_costs_nothing(new: MakeModel) -> None:
    model = new()
    example = Example((5, 6, 7), (False, False, False), False)
    batch = collate([example], [(0,)], 0, is_packed=False)
    loss, gradients = result(model, FastModel(model.base_model.model, Options()).summed_loss(batch))
    assert loss == 0
    assert all(not gradient.any() for gradient in gradients.values())
