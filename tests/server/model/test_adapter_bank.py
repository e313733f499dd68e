"""What stands in the bank after an adapter is written over another one."""

from pathlib import Path

import pytest
import torch

from server.model.adapter_bank import AdapterBank, PackedAdapter, bank_row_bytes
from server.model.spec import FUSED, ModelSpec, read_spec

CPU = torch.device("cpu")
NEIGHBOURS, APART = [8, 9, 10, 11, 12, 13, 14, 15], [8, 9, 10, 11, 20, 21, 22, 23]


@pytest.fixture
def spec(tiny_base: Path) -> ModelSpec:
    return read_spec(tiny_base)


def packed(spec: ModelSpec, num_rows: int, groups: set[str]) -> PackedAdapter:
    generator = torch.Generator().manual_seed(num_rows)
    lora_a, lora_b = {}, {}
    for group in groups:
        inputs, width = spec.in_features(group), sum(spec.out_splits(group))
        shape = (spec.num_layers, len(FUSED[group]), num_rows, inputs)
        lora_a[group] = torch.randn(shape, generator=generator)
        lora_b[group] = torch.randn((spec.num_layers, width, num_rows), generator=generator)
    return PackedAdapter(lora_a, lora_b, num_rows, None)


@pytest.mark.parametrize("rows", [NEIGHBOURS, APART])
@pytest.mark.parametrize("num_rows", [8, 5])
def test_an_adapter_takes_its_own_rows_and_leaves_nothing_in_the_rest_of_them(
    spec: ModelSpec, rows: list[int], num_rows: int
) -> None:
    bank = AdapterBank(spec, 32, torch.float32, CPU)
    every = list(range(32))
    before = packed(spec, 32, set(FUSED))
    bank.write(every, before)
    adapter = packed(spec, num_rows, {"qkv", "down"})
    bank.write(rows, adapter)
    own, rest = rows[:num_rows], rows[num_rows:]
    others = [row for row in every if row not in rows]
    for layer in range(spec.num_layers):
        for group in FUSED:
            lora_a, lora_b = bank.lora_a[layer, group], bank.lora_b[layer, group]
            assert torch.equal(lora_a[:, others], before.lora_a[group][layer][:, others])
            assert torch.equal(lora_b[others], before.lora_b[group][layer].T[others])
            if group in adapter.lora_a:
                assert torch.equal(lora_a[:, own], adapter.lora_a[group][layer])
                assert torch.equal(lora_b[own], adapter.lora_b[group][layer].T)
                assert not lora_a[:, rest].any()
                assert not lora_b[rest].any()
            else:
                assert not lora_a[:, rows].any()
                assert not lora_b[rows].any()


def test_pinned_memory_counts_as_torch_takes_it(
    spec: ModelSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next power of two (torch.cuda.memory.host_memory_stats), or what it is."""
    adapter = packed(spec, 5, {"o"})
    num_a, num_b = 2 * 5 * 64 * 4, 2 * 64 * 5 * 4
    assert adapter.num_bytes == num_a + num_b == 5120
    monkeypatch.setattr(torch.Tensor, "is_pinned", lambda self: True)
    assert adapter.num_bytes == 4096 + 4096
    assert packed(spec, 4, {"o"}).num_bytes == 2048 + 2048


def test_copies_for_steps_are_kept_for_the_next_one_and_never_outgrow_the_bank(
    spec: ModelSpec,
) -> None:
    bank = AdapterBank(spec, 512, torch.float32, CPU)
    for first in range(0, 512, 16):
        rows = slice(first, first + 16)
        for key in bank.lora_a:
            assert bank.rows(key, rows) is bank.rows(key, rows)
    kept = [tensor for found in bank._kept.values() for a, b, _ in found for tensor in (a, b)]
    assert 0 < sum(tensor.nbytes for tensor in kept) < 512 * bank_row_bytes(spec, torch.float32) / 2
