"""The fast step on a GPU: cuDNN and flash attention, host memory, Triton; against the modules."""

import contextlib
from typing import Any

import pytest
import torch
import transformers

from training.bench_model import random_base
from training.config import TrainConfig
from training.fast.attention import Attention
from training.fast.keeper import Keeper
from training.fast.layer import CHOICES
from training.fast.model import FastModel, Options
from training.loss import summed_loss
from training.packing import Batch, collate, pack
from training.qlora import add_adapter, trained
from training.render import Example

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
SHAPE = transformers.MistralConfig(
    vocab_size=512,
    hidden_size=512,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    sliding_window=None,
    tie_word_embeddings=False,
)
Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model() -> Any:
    config = TrainConfig.model_validate({"base": "-", "data": "-", "out": "-"})
    adapted = add_adapter(random_base(SHAPE, torch.bfloat16, GPU), config)
    generator = torch.Generator(GPU).manual_seed(0)
    for weight in trained(adapted).values():
        weight.data.normal_(std=0.05, generator=generator)
    return adapted


def batch_of(*lengths: int, is_packed: bool) -> Batch:
    generator = torch.Generator().manual_seed(0)
    examples = [
        Example(tuple(torch.randint(3, 500, (n,), generator=generator).tolist()), (True,) * n, True)
        for n in lengths
    ]
    rows = pack(lengths, max(lengths)) if is_packed else [(i,) for i in range(len(lengths))]
    return collate(examples, rows, 0, is_packed=is_packed)


def result(model: Any, loss: torch.Tensor) -> tuple[float, Gradients]:
    model.zero_grad()
    loss.backward()
    grads = {name: weight.grad for name, weight in trained(model).items()}
    return loss.item(), {name: grad.clone() for name, grad in grads.items() if grad is not None}


def assert_close(ours: Gradients, theirs: Gradients) -> None:
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        angle = torch.nn.functional.cosine_similarity(
            ours[name].flatten(), gradient.flatten(), dim=0
        )
        assert angle > 0.995, f"{name}: {angle}"
        assert ours[name].norm().item() == pytest.approx(gradient.norm().item(), rel=0.05)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("on_host", [True, False])
@pytest.mark.parametrize(
    "batch",
    [
        batch_of(256, 256, is_packed=False),
        batch_of(200, 37, 119, is_packed=False),
        batch_of(300, 37, 119, 200, 90, is_packed=True),
    ],
    ids=["even", "padded", "packed"],
)
def test_loss_and_gradients_are_those_of_the_modules(
    model: Any, batch: Batch, on_host: bool, fused: bool
) -> None:
    causal = model.base_model.model
    expected, theirs = result(model, summed_loss(causal, batch.to(GPU)))
    for count in range(len(CHOICES) + 1):
        keep = frozenset(CHOICES[:count])
        fast = FastModel(causal, Options(fused=fused, on_host=on_host, keep=keep))
        for _ in range(2):
            loss, ours = result(model, fast.summed_loss(batch))
            assert loss == pytest.approx(expected, rel=2e-3)
            assert_close(ours, theirs)


@pytest.mark.parametrize("lengths", [(256, 256), (128,), (200, 200), (5, 300, 77)])
def test_attention_is_that_of_each_document_alone(lengths: tuple[int, ...]) -> None:
    generator = torch.Generator(GPU).manual_seed(0)
    total = sum(lengths)
    sizes = (8 * 64, 2 * 64, 2 * 64)
    qkv = torch.randn(total, sum(sizes), generator=generator, device=GPU, dtype=torch.bfloat16)
    q, k, v = (part.unflatten(1, (-1, 64)) for part in qkv.split(sizes, dim=1))
    d_out = torch.randn(total, 8, 64, generator=generator, device=GPU, dtype=torch.bfloat16)
    attention = Attention(lengths, GPU)
    attended, log_sums = attention.forward(q, k, v)
    found = attention.backward(d_out, q, k, v, attended, log_sums)
    exact = [part.float().cpu().requires_grad_() for part in (q, k, v)]
    there = Attention(lengths, torch.device("cpu"))._by_document(*exact)
    expected = torch.autograd.grad(there, exact, d_out.float().cpu())
    for ours, theirs in zip((attended, *found), (there, *expected), strict=True):
        error = (ours.float().cpu() - theirs).norm() / theirs.norm()
        assert error < 0.01


def test_what_waits_in_host_memory_comes_back_as_it_left() -> None:
    keeper = Keeper(4, GPU, on_host=True)
    for shape in ((3, 1000), (5, 700), (2, 10)):  # memory is used again, larger and smaller
        kept = [
            {name: torch.randn(shape, device=GPU) for name in ("middle", "x")} for _ in range(4)
        ]
        expected = [{name: t.clone() for name, t in tensors.items()} for tensors in kept]
        for layer in range(4):
            keeper.put(layer, kept[layer])
        del kept
        for layer in reversed(range(4)):
            found = keeper.take(layer, ("middle",))
            keeper.fetch(layer)
            found |= keeper.take(layer)
            keeper.fetch(layer - 1, ("middle",))
            assert found.keys() == expected[layer].keys()
            for name, tensor in expected[layer].items():
                assert torch.equal(found[name], tensor)


def test_a_step_makes_the_host_wait_for_nothing(model: Any) -> None:
    fast = FastModel(model.base_model.model, Options())
    batch = batch_of(300, 37, 119, 200, 90, is_packed=True)
    result(model, fast.summed_loss(batch))  # compiles, and pins memory
    torch.cuda.synchronize()
    with contextlib.ExitStack() as stack:
        torch.cuda.set_sync_debug_mode("error")
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        fast.summed_loss(batch).backward()
