"""A group's matrix, and the memory beside x and dy."""

from types import SimpleNamespace
from typing import Any

import torch

from training.fast import ops
from training.fast.linears import Group, Workspace, roomy, with_room


def linear(out_features: int, in_features: int, rank: int = 0, seed: int = 0) -> Any:
    """PEFT's module as far as `Part` looks at it, or a bare linear."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> SimpleNamespace:
        return SimpleNamespace(weight=torch.randn(shape, generator=generator))

    base = randn(out_features, in_features)
    if not rank:
        return base
    return SimpleNamespace(
        base_layer=base,
        active_adapters=["default"],
        lora_A={"default": randn(rank, in_features)},
        lora_B={"default": randn(out_features, rank)},
        scaling={"default": 0.5},
    )


def full_weight(module: Any) -> torch.Tensor:
    """W + scaling B A."""
    weight: torch.Tensor = getattr(module, "base_layer", module).weight
    if hasattr(module, "base_layer"):
        weight = weight + 0.5 * module.lora_B["default"].weight @ module.lora_A["default"].weight
    return weight


MODULES = [linear(6, 8, 3), linear(4, 8, seed=1), linear(5, 8, 2, seed=2)]
GROUP = Group(MODULES)


def test_a_group_is_its_linears_side_by_side_with_their_lora() -> None:
    assert (GROUP.out_features, GROUP.in_features, GROUP.width) == (15, 8, 64)
    space = Workspace(
        [GROUP, Group([linear(2, 8)], is_widest=True)],
        ops.PLAIN,
        torch.float32,
        torch.device("cpu"),
    )
    matrix = space.matrix(GROUP)
    generator = torch.Generator().manual_seed(9)
    x = roomy(torch.empty(7, 8), 8, GROUP)
    x[:, :8] = torch.randn(7, 8, generator=generator)
    GROUP.shrink(matrix, x)
    whole = torch.cat([full_weight(module) for module in MODULES])
    torch.testing.assert_close(GROUP.forward(matrix, x), x[:, :8] @ whole.t())
    dy = roomy(x, 15, GROUP)
    dy[:, :15] = torch.randn(7, 15, generator=generator)
    torch.testing.assert_close(GROUP.backward(matrix, dy), dy[:, :15] @ whole)
    assert len(GROUP.gradients(dy, x)) == len(GROUP.parameters()) == 4


def test_linears_without_lora_need_no_room() -> None:
    group = Group([linear(4, 8), linear(4, 8, seed=1)])
    assert group.width == 0
    assert group.parameters() == []
    assert group.gradients(torch.empty(3, 8), torch.empty(3, 8)) == []
    assert roomy(torch.empty(3, 1), 8, group).shape == (3, 8)


def test_a_matrix_is_written_again_only_when_it_is_gone_or_out_of_date() -> None:
    written: list[int] = []

    def fill(*args: Any, **places: Any) -> None:
        written.append(places["first_row"])

    wide, other = Group([linear(9, 8, 1)], is_widest=True), Group([linear(3, 8)])
    space = Workspace([GROUP, wide, other], ops.PLAIN, torch.float32, torch.device("cpu"))
    for group in (GROUP, wide, other):
        group.fill = lambda *_: fill(first_row=0)  # type: ignore[method-assign]
    for group, count in ((GROUP, 1), (GROUP, 1), (wide, 2), (GROUP, 2), (other, 3), (GROUP, 4)):
        space.matrix(group)
        assert len(written) == count
    space.forget()
    space.matrix(wide)
    assert len(written) == 5
    del GROUP.fill


def test_dy_with_room_is_taken_as_it_is_and_any_other_copied() -> None:
    room = roomy(torch.empty(5, 1), 15, GROUP)
    dy = room[:, :15]
    dy.fill_(3)
    taken = with_room(dy, GROUP)
    assert taken.data_ptr() == dy.data_ptr()
    assert taken.shape == (5, 15 + 64)
    too_short = torch.ones(4 * 79 + 15).as_strided((5, 15), (79, 1))  # no room in the last row
    for foreign in (torch.ones(5, 15), torch.ones(5, 20)[:, :15], too_short):
        copy = with_room(foreign, GROUP)
        assert copy.data_ptr() != foreign.data_ptr()
        assert torch.equal(copy[:, :15], foreign)
        assert copy.shape == (5, 79)
