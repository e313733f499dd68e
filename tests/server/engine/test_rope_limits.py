"""How long a request may be by its adapter's RoPE scaling, and what crosses the bridge of it."""

from pathlib import Path

import msgspec
import pytest

from adapters.rope import RopeScaling
from server.config import AdapterConfig
from server.engine.messages import AddRequest, EngineInfo, ToEngine
from server.engine.process import find_problem
from server.engine.request import AdapterRef, SamplingParams

INFO = EngineInfo(
    base_digest="b",
    device="cpu",
    dtype="float32",
    quantization="none",
    num_blocks=100,
    block_size=16,
    max_model_len=100,
    trained_len=100,
    max_scaled_len=350,
    bank_rows=8,
    page_rows=8,
    vocab_size=10,
    eos_token_ids=[1],
    kernels={},
)
TWICE = RopeScaling(rope_type="linear", factor=2.0)
TENFOLD = RopeScaling(
    rope_type="yarn", factor=10.0, original_max_position_embeddings=100, beta_fast=20.0
)


def request(num_tokens: int, rope: RopeScaling | None) -> AddRequest:
    return AddRequest(
        request_id="r",
        prompt_ids=[3] * (num_tokens - 1),
        sampling=SamplingParams(max_tokens=1),
        adapter=AdapterRef("a", 8, rope),
        arrival_time=0.0,
    )


@pytest.mark.parametrize(
    ("rope", "longest"), [(None, 100), (TWICE, 200), (TENFOLD, 350)], ids=["none", "x2", "x10"]
)
def test_a_request_may_be_as_long_as_its_scaling_reaches_and_the_server_holds(
    rope: RopeScaling | None, longest: int
) -> None:
    assert INFO.longest(rope) == longest
    assert find_problem(request(longest, rope), INFO) is None
    problem = find_problem(request(longest + 1, rope), INFO)
    assert problem == f"Prompt and completion need {longest + 1} tokens; the limit is {longest}."


def test_a_prompt_may_fill_the_context_where_nothing_is_to_follow_it() -> None:
    whole = msgspec.structs.replace(request(101, None), sampling=SamplingParams(max_tokens=0))
    assert find_problem(whole, INFO) is None
    below = msgspec.structs.replace(whole, sampling=SamplingParams(max_tokens=-1))
    assert find_problem(below, INFO) == "max_tokens is -1; it must be at least 0."


def test_an_engine_that_says_nothing_of_scaled_requests_takes_them_as_any_other() -> None:
    assert msgspec.structs.replace(INFO, max_scaled_len=0).longest(TENFOLD) == 100


def test_the_scaling_reaches_the_engine_as_it_was() -> None:
    sent = request(5, TENFOLD)
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(sent), type=ToEngine)
    assert received == sent


def test_there_is_a_rotary_table_at_least() -> None:
    with pytest.raises(ValueError, match=r"adapters\.rotary_tables is 0; it must be at least 1"):
        AdapterConfig(store=Path("x"), rotary_tables=0)
