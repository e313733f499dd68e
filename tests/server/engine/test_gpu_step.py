"""The step's tokens where the GPU's kernels read them."""

import numpy as np
import pytest
import torch

from server.model.gpu_step import GpuStep, StepShape, padded_rows, step_bytes
from server.model.spec import ModelSpec

SPEC = ModelSpec(
    num_layers=1,
    hidden_size=64,
    intermediate_size=128,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    vocab_size=100,
    max_positions=64,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    sliding_window=None,
    tie_word_embeddings=False,
    eos_token_ids=(2,),
)


def make_step() -> GpuStep:
    return GpuStep(
        SPEC,
        max_tokens=128,
        max_requests=8,
        max_blocks=4,
        max_pages=2,
        block_size=16,
        device=torch.device("cpu"),
    )


def fill(
    step: GpuStep,
    num_tokens: int,
    count: int,
    num_logits: int = 64,
    tables: list[int] | None = None,
) -> None:
    step.fill(
        StepShape(num_tokens, num_logits, False, True, False),
        token_ids=list(range(10, 10 + count)),
        sources=[-1] * (count - 1) + [3],
        positions=np.arange(5, 5 + count),
        tables=None if tables is None else np.array(tables),
        slots=np.arange(40, 40 + count),
        logits_rows=list(range(count)),
    )


def test_padding_is_a_known_token_that_writes_no_keys_and_values() -> None:
    step = make_step()
    fill(step, num_tokens=8, count=3)
    positions = step.rotary(torch.zeros(1))
    assert step.token_ids[:8].tolist() == [10, 11, 12, 0, 0, 0, 0, 0]
    assert step.sources[:8].tolist() == [-1, -1, 3, -1, -1, -1, -1, -1]
    assert positions.positions[:8].tolist() == [5, 6, 7, 0, 0, 0, 0, 0]
    assert positions.slot_mapping[:8].tolist() == [40, 41, 42, -1, -1, -1, -1, -1]
    assert step.logits_rows[:64].tolist() == [0, 1, 2] + [0] * 61


def test_a_shorter_step_leaves_nothing_of_a_longer_one_in_its_shape() -> None:
    step = make_step()
    fill(step, num_tokens=128, count=100, num_logits=128)
    fill(step, num_tokens=4, count=2)
    slots = step.rotary(torch.zeros(1)).slot_mapping
    assert slots[:4].tolist() == [40, 41, -1, -1]
    assert step.logits_rows[:64].tolist() == [0, 1] + [0] * 62


def test_tokens_rotate_by_their_own_tables_and_by_the_bases_again_in_the_next_step() -> None:
    step = make_step()
    fill(step, num_tokens=4, count=3, tables=[2, 0, 1])
    assert step.rotary(torch.zeros(1)).tables[:4].tolist() == [2, 0, 1, 0]
    fill(step, num_tokens=4, count=3)
    assert step.rotary(torch.zeros(1)).tables[:4].tolist() == [0, 0, 0, 0]


def test_what_does_not_fit_is_an_error() -> None:
    step = make_step()
    with pytest.raises(AssertionError, match="too many tokens"):
        fill(step, num_tokens=2, count=3)
    with pytest.raises(AssertionError, match="too many logits"):
        fill(step, num_tokens=70, count=70)


@pytest.mark.parametrize(("wanted", "rows"), [(0, 0), (1, 64), (64, 64), (65, 128)])
def test_logits_come_in_multiples_of_64_rows(wanted: int, rows: int) -> None:
    assert padded_rows(wanted) == rows


def test_activations_grow_with_the_step() -> None:
    assert step_bytes(SPEC, 200) == 2 * step_bytes(SPEC, 100) == 200 * 2 * (3 * 128 + 8 * 64)
