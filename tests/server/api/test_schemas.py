"""Every field that is refused, and by what name; every bound."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from server.api.parsing import parse_body
from server.api.schemas import ChatBody, CompletionBody
from server.engine.messages import EngineInfo
from server.errors import ServeError
from tests.server.api.harness import BASE, Server, serving

CHAT: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}
COMPLETION: dict[str, Any] = {"model": BASE, "prompt": "hello"}

UNSERVED_IN_CHAT = {
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "audio": {"voice": "alloy", "format": "wav"},
    "modalities": ["text", "audio"],
    "service_tier": "flex",
    "store": True,
    "metadata": {"a": "b"},
    "reasoning_effort": "high",
    "verbosity": "low",
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {"search_context_size": "low"},
    "parallel_tool_calls": False,
    "safety_identifier": "x",
    "prompt_cache_key": "x",
    "best_of": 2,
    "echo": True,
    "guided_json": {},
    "chat_template": "x",
    "continue_final_message": True,
    "add_generation_prompt": False,
    "skip_special_tokens": False,
    "include_stop_str_in_output": True,
    "prompt_logprobs": 1,
}
UNSERVED_IN_COMPLETIONS = {
    "suffix": "x", "best_of": 3, "service_tier": "priority", "store": True, "length_penalty": 2.0,
    "use_beam_search": True, "truncate_prompt_tokens": 5,
    "response_format": {"type": "json_object"},
}  # fmt: skip
OUT_OF_BOUNDS = [
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"), ("temperature", True),
    ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("top_k", 2**31), ("min_p", -0.1), ("min_p", 1.1),
    ("n", 0), ("n", 17), ("n", 1.5), ("max_tokens", 0), ("max_tokens", 2**31),
    ("presence_penalty", 2.1), ("frequency_penalty", -2.1),
    ("repetition_penalty", 0), ("repetition_penalty", 11),
    ("logit_bias", {"a": 1}), ("logit_bias", {"-1": 1}), ("logit_bias", {"512": 1}),
    ("logit_bias", {"5": 101}), ("logit_bias", {"5": "x"}), ("logit_bias", [1]),
    ("logit_bias", {str(i): 1 for i in range(1025)}), ("logit_bias", {"٣": 1}),
    ("seed", 2**63), ("seed", -(2**63) - 1), ("seed", 0.5),
    ("stop", ""), ("stop", ["a", ""]), ("stop", ["a"] * 17), ("stop", "a" * 257), ("stop", 5),
    ("stop_token_ids", [-1]), ("stop_token_ids", [512]), ("stop_token_ids", [5] * 65),
    ("stop_token_ids", "x"), ("min_tokens", -1), ("min_tokens", 2**31),
    ("ignore_eos", 1), ("stream", "yes"), ("stream_options", {"include_usage": True}),
    ("user", "u" * 513), ("model", ""), ("model", "m" * 257), ("model", 5), ("model", None),
]  # fmt: skip
OUT_OF_BOUNDS_IN_CHAT = [
    ("top_logprobs", 21), ("top_logprobs", -1), ("top_logprobs", 1), ("logprobs", 1),
    ("max_completion_tokens", 0), ("messages", []), ("messages", "hello"), ("messages", None),
]  # fmt: skip
BAD_MESSAGES = [
    {"role": "tool", "content": "x"}, {"role": "user"}, {"role": "user", "content": None},
    {"role": "user", "content": 5}, {"content": "x"}, "hello",
    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
    {"role": "user", "content": [{"type": "text"}]}, {"role": "user", "content": ["x"]},
    {"role": "assistant", "content": "x", "tool_calls": [{"id": "x"}]},
    {"role": "user", "content": "x", "surprise": 1}, {"role": "user", "content": "x", "name": ""},
]  # fmt: skip


@pytest.fixture(scope="module")
def server(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One for them all: a refusal leaves nothing behind."""
    with serving(tiny_base, tmp_path_factory.mktemp("schemas") / "store") as handle:
        yield handle


def refused(server: Server, path: str, body: dict[str, Any]) -> dict[str, Any]:
    num_before = len(server.engine.requests)
    reply = server.http().post(path, content=json.dumps(body))
    assert reply.status_code == 400, reply.text
    assert len(server.engine.requests) == num_before
    assert server.services.admission.num_admitted == 0
    error: dict[str, Any] = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "BadRequestError"
    return error


def check(kind: type[ChatBody | CompletionBody], body: dict[str, Any], info: EngineInfo) -> None:
    parsed = parse_body(kind, json.dumps(body).encode())
    parsed.check()
    parsed.sampling(info, 1, max_tokens=parsed.max_tokens, fill=16, num_logprobs=None)


@pytest.fixture
def info(server: Server) -> EngineInfo:
    return server.engine.info


@pytest.mark.parametrize("field", UNSERVED_IN_CHAT)
def test_a_chat_field_that_is_not_served_is_refused_by_name(server: Server, field: str) -> None:
    error = refused(server, "/v1/chat/completions", CHAT | {field: UNSERVED_IN_CHAT[field]})
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")
    assert field in error["message"]


@pytest.mark.parametrize("field", UNSERVED_IN_COMPLETIONS)
def test_a_completion_field_that_is_not_served_is_refused_by_name(
    server: Server, field: str
) -> None:
    error = refused(server, "/v1/completions", COMPLETION | {field: UNSERVED_IN_COMPLETIONS[field]})
    assert (error["param"], error["code"]) == (field, "unsupported_parameter")


def test_the_official_client_sees_the_field_that_was_refused(server: Server) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(**CHAT, tools=UNSERVED_IN_CHAT["tools"])
    assert (caught.value.param, caught.value.code) == ("tools", "unsupported_parameter")


def test_null_and_what_asks_for_nothing_are_taken(server: Server) -> None:
    nothing = {
        "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "n": None,
        "modalities": ["text"], "service_tier": "auto", "store": False, "metadata": None,
        "logit_bias": None, "stop": None, "stream_options": None, "max_tokens": None,
        "best_of": 1, "audio": None, "parallel_tool_calls": True, "seed": None, "user": None,
        "top_logprobs": None, "temperature": None,
    }  # fmt: skip
    reply = server.http().post("/v1/chat/completions", json=CHAT | nothing)
    assert reply.status_code == 200, reply.text


@pytest.mark.parametrize("value", [1, None])
def test_an_unknown_field_is_refused_by_name_whatever_its_value(
    server: Server, value: object
) -> None:
    error = refused(server, "/v1/completions", COMPLETION | {"temprature": value})
    assert (error["param"], error["code"]) == ("temprature", "unknown_parameter")


def test_every_bound_holds_and_is_told_by_name(info: EngineInfo) -> None:
    cases: list[tuple[dict[str, Any], type[ChatBody | CompletionBody], str, object]] = []
    cases += [(CHAT, ChatBody, *case) for case in OUT_OF_BOUNDS]
    cases += [(COMPLETION, CompletionBody, *case) for case in OUT_OF_BOUNDS]
    cases += [(CHAT, ChatBody, *case) for case in OUT_OF_BOUNDS_IN_CHAT]
    cases += [(COMPLETION, CompletionBody, "logprobs", value) for value in (21, -1, True)]
    for base, kind, field, value in cases:
        with pytest.raises(ServeError) as caught:
            check(kind, base | {field: value}, info)
        assert caught.value.status == 400, (field, value)
        assert (caught.value.param or "").split(".")[0] == field, (field, value)


def test_the_values_at_the_bounds_are_taken(info: EngineInfo) -> None:
    for field, value in [
        ("temperature", 0), ("temperature", 2), ("top_p", 1), ("top_k", -1), ("n", 16),
        ("seed", 2**63 - 1), ("stop", ["a" * 256] * 16), ("stop_token_ids", [511] * 64),
        ("logit_bias", {str(i % 512): 100 for i in range(1024)}), ("user", "u" * 512),
    ]:  # fmt: skip
        check(CompletionBody, COMPLETION | {field: value}, info)


@pytest.mark.parametrize("message", BAD_MESSAGES)
def test_a_message_that_is_not_served_is_refused_by_its_place(
    server: Server, message: object
) -> None:
    error = refused(server, "/v1/chat/completions", CHAT | {"messages": [message]})
    assert error["param"].startswith("messages.0")


def test_two_limits_that_differ_are_refused(info: EngineInfo) -> None:
    with pytest.raises(ServeError, match="they differ"):
        check(ChatBody, CHAT | {"max_tokens": 5, "max_completion_tokens": 6}, info)


def test_more_min_tokens_than_max_tokens_are_refused(info: EngineInfo) -> None:
    with pytest.raises(ServeError, match="min_tokens is 9, more than max_tokens \\(5\\)"):
        check(CompletionBody, COMPLETION | {"max_tokens": 5, "min_tokens": 9}, info)


@pytest.mark.parametrize(
    "body",
    [
        b"", b"{", b"[]", b"5", b"null", b'{"temperature": NaN}', b'{"temperature": Infinity}',
        b"\xff\xfe", b'{"a": "\\ud800"}',
        b"[" * 100_000, b'{"a":' * 100_000, b'{"messages": ' + b"[" * 500 + b"]" * 500 + b"}",
    ],
)  # fmt: skip
def test_what_is_not_json_is_refused_cleanly(server: Server, body: bytes) -> None:
    reply = server.http().post("/v1/chat/completions", content=body)
    assert reply.status_code == 400
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    assert reply.json()["error"]["code"] == "invalid_json"
    assert len(reply.content) < 1000


def test_a_number_too_large_for_a_float_is_out_of_bounds(server: Server) -> None:
    body = b'{"model": "tiny", "prompt": "a", "temperature": 1e999}'
    reply = server.http().post("/v1/completions", content=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "temperature")


def test_a_message_never_repeats_a_long_value(server: Server) -> None:
    error = refused(server, "/v1/completions", COMPLETION | {"x" * 10_000: 1})
    assert len(error["message"]) < 200


def test_a_body_over_the_limit_is_refused_before_it_is_read(server: Server) -> None:
    reply = server.http().post("/v1/completions", content=b" " * ((4 << 20) + 1))
    assert (reply.status_code, reply.json()["error"]["code"]) == (413, "body_too_large")


def test_a_body_of_unknown_length_is_refused_at_the_first_byte_past_the_limit(
    server: Server,
) -> None:
    reply = server.http().post("/v1/completions", content=(b" " * 65536 for _ in range(66)))
    assert reply.status_code == 413
