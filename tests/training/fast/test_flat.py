"""An adapter in one piece is still its parts."""

import pytest
import torch

from training.fast.flat import flatten


def parts() -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.nn.Parameter(torch.randn(*shape, generator=generator)) for shape in ((3, 5), (7, 2))
    ]


def loss(weights: list[torch.nn.Parameter]) -> torch.Tensor:
    return (weights[0].sum() * weights[1].square()).sum()


def test_values_stay_and_gradients_land_in_the_whole() -> None:
    alone, weights = parts(), parts()
    flat = flatten(weights)
    for one, other in zip(alone, weights, strict=True):
        assert torch.equal(one, other)
    for _ in range(2):  # the second time they add up
        loss(alone).backward()
        loss(weights).backward()
    assert flat.grad is not None
    expected = torch.cat([weight.grad.flatten() for weight in alone if weight.grad is not None])
    assert torch.equal(flat.grad, expected)
    flat.grad.zero_()
    assert all(weight.grad is not None and not weight.grad.any() for weight in weights)


def test_an_optimizer_of_the_whole_moves_the_parts_as_one_of_the_parts_would() -> None:
    alone, weights = parts(), parts()
    flat = flatten(weights)
    optimizers = [torch.optim.AdamW(alone, lr=0.1), torch.optim.AdamW([flat], lr=0.1)]
    for _ in range(3):
        for optimizer, those in zip(optimizers, (alone, weights), strict=True):
            optimizer.zero_grad(set_to_none=False)
            loss(those).backward()
            optimizer.step()
    for one, other in zip(alone, weights, strict=True):
        torch.testing.assert_close(one, other)


def test_anything_but_fp32_is_a_mistake() -> None:
    with pytest.raises(AssertionError):
        flatten([torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))])
