"""The records that the sampling kernel reads: what is where, and when it is copied."""

import numpy as np
import numpy.typing as npt
import pytest
import torch

from server.kernels.sampling_step import (
    BIAS,
    BIAS_WORDS,
    NO_STATE_ROW,
    ROW,
    ROW_WORDS,
    SamplerGpuStep,
)

MAX_ROWS, MAX_BIASES = 6, 10


def make_step() -> SamplerGpuStep:
    return SamplerGpuStep(max_rows=MAX_ROWS, max_biases=MAX_BIASES, device=torch.device("cpu"))


def make_rows(*state_rows: int) -> npt.NDArray[np.void]:
    rows = np.zeros(len(state_rows), ROW)
    rows["state_row"] = state_rows
    return rows


def pairs(*values: tuple[int, float]) -> npt.NDArray[np.void]:
    return np.array(list(values), BIAS)


def device_rows(step: SamplerGpuStep) -> npt.NDArray[np.void]:
    return step.rows.numpy().ravel().view(ROW)


def device_biases(step: SamplerGpuStep) -> npt.NDArray[np.void]:
    return step.biases.numpy().ravel().view(BIAS)


def test_every_field_is_one_word_in_its_place() -> None:
    """The kernel counts words; BIAS and ROW may change with it only."""
    assert ROW.names is not None
    assert ROW.fields is not None
    assert [ROW.fields[name][1] for name in ROW.names] == list(range(0, 4 * ROW_WORDS, 4))
    assert ROW.names.index("temperature") == 1
    assert ROW.names[2:6] == ("log_min_p", "top_k", "top_p", "draw")
    assert ROW.names[6] == "is_penalized"
    assert ROW.names[7:10] == ("repetition_penalty", "frequency_penalty", "presence_penalty")
    assert ROW.names[10:] == ("first_bias", "num_biases")
    assert (BIAS.names, BIAS_WORDS) == (("token_id", "bias"), 2)


def test_before_it_is_filled_every_row_is_padding() -> None:
    assert device_rows(make_step())["state_row"].tolist() == [NO_STATE_ROW] * MAX_ROWS


def test_rows_come_first_and_padding_follows() -> None:
    step = make_step()
    rows = make_rows(4, 2)
    rows["top_p"], rows["draw"], rows["top_k"] = (0.25, 0.5), (2**32 - 1, 7), (40, 0)

    step.fill(make_rows(0, 1, 2, 3, 4, 5), {}, 6)
    step.fill(rows, {}, 4)

    found = device_rows(step)
    assert found["state_row"][:4].tolist() == [4, 2, NO_STATE_ROW, NO_STATE_ROW]
    assert found["top_p"][:2].tolist() == [0.25, 0.5]
    assert found["draw"][:2].tolist() == [2**32 - 1, 7]
    assert found["top_k"][:2].tolist() == [40, 0]
    assert step.num_rows == 4


def test_each_row_knows_where_its_biases_are() -> None:
    step = make_step()

    step.fill(make_rows(4, 2, 0), {0: pairs((7, 1.5), (8, -np.inf)), 2: pairs((9, 2.0))}, 3)

    rows, biases = device_rows(step), device_biases(step)
    assert rows["num_biases"][:3].tolist() == [2, 0, 1]
    own = [biases[row["first_bias"] :][: row["num_biases"]].tolist() for row in rows[:3]]
    assert own == [[(7, 1.5), (8, -np.inf)], [], [(9, 2.0)]]


def test_the_callers_records_are_left_as_they_were() -> None:
    rows = make_rows(4)

    make_step().fill(rows, {0: pairs((1, 1.0), (2, 1.0))}, 1)

    assert rows["num_biases"].tolist() == [0]


def test_a_step_like_the_one_before_is_not_copied_again() -> None:
    step = make_step()
    step.fill(make_rows(1, 2), {0: pairs((3, 4.0))}, 4)
    step.rows.zero_()
    step.fill(make_rows(1, 2), {0: pairs((3, 4.0))}, 4)
    assert step.rows.count_nonzero() == 0


@pytest.mark.parametrize("change", ["row", "bias", "padding", "fewer biases"])
def test_a_step_that_differs_anywhere_is_copied(change: str) -> None:
    step = make_step()
    step.fill(make_rows(1, 2), {0: pairs((3, 4.0))}, 3)
    rows, biases = make_rows(1, 2), {0: pairs((3, 4.0))}
    if change == "row":
        rows["temperature"][1] = 0.5
    elif change == "bias":
        biases = {0: pairs((3, 5.0))}
    elif change == "fewer biases":
        biases = {}

    step.fill(rows, biases, 4 if change == "padding" else 3)

    again = make_step()
    again.fill(rows, biases, step.num_rows)
    num_biases = sum(map(len, biases.values()))
    assert torch.equal(step.rows[: step.num_rows], again.rows[: step.num_rows])
    assert torch.equal(step.biases[:num_biases], again.biases[:num_biases])


def test_filling_changes_no_address() -> None:
    step = make_step()
    before = step.rows.data_ptr(), step.biases.data_ptr()
    step.fill(make_rows(1), {0: pairs((1, 1.0))}, 1)
    step.fill(make_rows(), {}, 0)
    assert (step.rows.data_ptr(), step.biases.data_ptr()) == before


def test_two_copies_may_be_under_way_while_the_next_step_is_filled_in() -> None:
    """A copy reads its staging buffer late; two later fills must not have touched it."""
    step = make_step()
    for state_row in (1, 2, 3):
        step.fill(make_rows(state_row), {}, 1)
    taken = [step._host_buffers.next() for _ in range(3)]
    assert [int(buffer[0]) for buffer in taken] == [1, 2, 3]


def test_more_than_fits_is_refused() -> None:
    step = make_step()
    with pytest.raises(AssertionError, match="too many rows"):
        step.fill(make_rows(*range(MAX_ROWS)), {}, MAX_ROWS + 1)
    with pytest.raises(AssertionError, match="too many rows"):
        step.fill(make_rows(0, 1), {}, 1)
    with pytest.raises(AssertionError, match="11 biases; the limit is 10"):
        step.fill(make_rows(0), {0: pairs(*[(token, 1.0) for token in range(11)])}, 1)
