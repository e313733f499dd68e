"""RoPE settings: read from any spelling, held to what is served, equal where they act equally."""

import math
from typing import Any

import pytest

from adapters.manifest import AdapterRefused
from adapters.rope import RopeScaling, scaling_of

THETA = 10000.0
LINEAR = {"rope_type": "linear", "factor": 4}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def read(fields: dict[str, Any], **options: Any) -> RopeScaling:
    return RopeScaling.read(fields, theta=THETA, **options)


@pytest.mark.parametrize(
    "fields",
    [
        LINEAR,
        YARN,
        {**YARN, "attention_factor": 1.3, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {**YARN, "mscale": 0.7, "mscale_all_dim": 1.1},
    ],
)
def test_what_is_read_is_written_and_read_again_the_same(fields: dict[str, Any]) -> None:
    scaling = read(fields)
    written = scaling.as_parameters(THETA)
    assert written["rope_theta"] == THETA
    assert read(written) == scaling
    assert scaling_of(written) == scaling


def test_equal_settings_are_equal_however_they_are_spelled() -> None:
    assert read(LINEAR) == read({"type": "linear", "factor": 4.0, "rope_theta": 10000})
    both = {"type": "yarn", "rope_type": "yarn", "factor": 4, "truncate": None}
    assert read(YARN) == read(both, max_positions=512)
    assert read(YARN) == read({**YARN, "attention_factor": 0.1 * math.log(4) + 1})
    assert read(YARN) != read(YARN | {"factor": 2})
    assert read(YARN) != read(LINEAR)


def test_yarn_scales_cosines_as_its_settings_say() -> None:
    assert read(LINEAR).attention_factor == 1
    assert read({**YARN, "factor": 1}).attention_factor == 1
    assert read({**YARN, "attention_factor": 0.5}).attention_factor == 0.5
    found = read({**YARN, "mscale": 0.5, "mscale_all_dim": 2}).attention_factor
    assert found == pytest.approx((1 + 0.05 * math.log(4)) / (1 + 0.2 * math.log(4)))


@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        ({"rope_type": "dynamic", "factor": 2}, r"rope\.rope_type: 'dynamic' is not served"),
        ({"rope_type": "longrope", "factor": 2}, "'longrope' is not served; linear and yarn are"),
        ({"rope_type": ["linear"], "factor": 2}, "is not served"),
        ({"factor": 2}, "None is not served"),
        ({"rope_type": "linear"}, r"rope\.factor: None is not a number of 1 or more"),
        ({**LINEAR, "factor": 0.5}, "0.5 is not a number of 1 or more"),
        ({**LINEAR, "factor": True}, "True is not a number"),
        ({**LINEAR, "factor": "4"}, "'4' is not a number"),
        ({**LINEAR, "factor": math.inf}, "inf is not a number"),
        ({**LINEAR, "factor": math.nan}, "nan is not a number"),
        ({**LINEAR, "rope_theta": 5e5}, r"rope\.rope_theta: 500000.0 is not the base's \(10000\)"),
        ({**LINEAR, "beta_fast": 2}, r"rope\.beta_fast: is no setting of linear RoPE"),
        (
            {**LINEAR, "original_max_position_embeddings": 512},
            "original_max_position_embeddings: is no setting of linear",
        ),
        ({**YARN, "beta_fsat": 2}, r"rope\.beta_fsat: is no setting of yarn RoPE"),
        (
            {"rope_type": "yarn", "factor": 2},
            r"original_max_position_embeddings: None is not a number of positions",
        ),
        ({**YARN, "original_max_position_embeddings": 0}, "0 is not a number of positions"),
        ({**YARN, "original_max_position_embeddings": 512.0}, "512.0 is not a number of positions"),
        ({**YARN, "attention_factor": 0}, "0 is not a number above 0"),
        ({**YARN, "attention_factor": 2, "mscale": 1}, "means nothing beside attention_factor"),
        ({**YARN, "mscale": 1}, "means nothing without mscale_all_dim"),
        ({**YARN, "mscale_all_dim": 1}, "means nothing without mscale_all_dim, nor it alone"),
        ({**YARN, "beta_fast": 1, "beta_slow": 2}, r"1 is below beta_slow \(2\)"),
        ({**YARN, "beta_slow": -1}, "-1 is not a number above 0"),
        ({**YARN, "truncate": 1}, r"rope\.truncate: 1 is neither true nor false"),
    ],
)
def test_what_is_not_served_is_refused_by_name(fields: dict[str, Any], complaint: str) -> None:
    with pytest.raises(AdapterRefused, match=complaint):
        read(fields)


def test_a_complaint_says_where_the_setting_stands() -> None:
    with pytest.raises(AdapterRefused, match=r"^rope_scaling\.factor: "):
        read({"type": "linear"}, where="rope_scaling")


@pytest.mark.parametrize(
    ("fields", "longest"),
    [
        (LINEAR, 4096),
        ({**LINEAR, "factor": 1.5}, 1536),
        (YARN, 2048),
        ({**YARN, "factor": 1.25}, 1024),  # never less than the base's own
    ],
)
def test_its_length_is_a_multiple_of_what_it_stretches(
    fields: dict[str, Any], longest: int
) -> None:
    assert read(fields).max_length(1024) == longest


def test_it_says_what_it_is() -> None:
    assert str(read(LINEAR)) == "linear, factor 4"
    assert str(read(YARN | {"original_max_position_embeddings": 4096})) == (
        "yarn, factor 4 over 4,096 positions"
    )


@pytest.mark.parametrize("rope", [None, {"rope_theta": 1e4}, {"rope_type": "default"}])
def test_the_bases_own_settings_are_no_scaling(rope: dict[str, Any] | None) -> None:
    assert scaling_of(rope) is None
