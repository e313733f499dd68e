"""A streamed reply is read right however its bytes are cut, and its end is named right."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtest.reply import EventReader, Reply
from tests.loadtest.stub import chunk, event

DONE = b"data: [DONE]\n\n"
USAGE = event({
    "choices": [],
    "usage": {"prompt_tokens": 5, "completion_tokens": 2,
              "prompt_tokens_details": {"cached_tokens": 3}},
})  # fmt: skip
END = event(chunk("", finish_reason="length"))
WHOLE = event(chunk("a")) + event(chunk("b")) + END + USAGE + DONE


def reply_to(data: bytes, status: int = 200, **headers: str) -> Reply:
    reply = Reply(keep_text=True)
    reply.begin(status, headers)
    reply.feed(data, 1.0)
    return reply


def outcome(reply: Reply, expected_tokens: int | None = 2) -> tuple[str, str]:
    return reply.outcome(expected_tokens=expected_tokens)


@given(st.lists(st.integers(1, 40)))
def test_events_are_the_same_however_the_bytes_are_cut(sizes: list[int]) -> None:
    data = b"event: error\ndata: {}\r\n\r\n: comment\n\ndata: a\ndata: b\n\n" + WHOLE
    whole = EventReader().feed(data)
    cut, reader = [], EventReader()
    for size in sizes:
        piece, data = data[:size], data[size:]
        cut += reader.feed(piece)
    cut += reader.feed(data)
    assert cut == whole
    assert whole[:2] == [("error", b"{}"), ("", b"a\nb")]
    assert whole[-1] == ("", b"[DONE]")


def test_a_whole_reply_is_ok_with_its_text_usage_and_times() -> None:
    reply = Reply(keep_text=True)
    reply.begin(200, {})
    reply.feed(event(chunk("a")), 1.0)
    reply.feed(event(chunk("b")), 1.5)
    reply.feed(END + USAGE + DONE, 2.0)
    assert outcome(reply) == ("ok", "")
    assert (reply.pieces, reply.text_times) == (["a", "b"], [1.0, 1.5])
    counts = (reply.num_prompt_tokens, reply.num_tokens, reply.num_cached_tokens)
    assert counts == (5, 2, 3)


def test_a_chats_first_chunk_without_text_is_no_first_token() -> None:
    reply = Reply()
    reply.begin(200, {})
    role = {"choices": [{"index": 0, "delta": {"role": "assistant"}, "finish_reason": None}]}
    reply.feed(event(role), 1.0)
    reply.feed(event(chunk("hi", is_chat=True)), 2.0)
    assert reply.text_times == [2.0]
    assert reply.pieces == []  # not kept unless wanted


@pytest.mark.parametrize("status", [429, 503])
def test_overload_is_rejected_with_its_code(status: int) -> None:
    body = json.dumps({"error": {"code": "server_overloaded", "message": ""}}).encode()
    assert outcome(reply_to(body, status)) == ("rejected", "server_overloaded")


def test_other_statuses_are_failures_and_say_what_they_can() -> None:
    body = json.dumps({"error": {"type": "NotFoundError"}}).encode()
    assert outcome(reply_to(body, 404)) == ("failed", "NotFoundError")
    assert outcome(reply_to(b"<html>", 502)) == ("failed", "http_502")
    assert outcome(Reply()) == ("failed", "no_reply")
    unreached = Reply()
    unreached.fail("no_connection")
    assert outcome(unreached) == ("failed", "no_connection")


def test_a_stream_without_its_end_is_cut() -> None:
    assert outcome(reply_to(event(chunk("a")))) == ("cut", "no_done")


def test_an_error_event_cuts_the_reply_though_done_follows() -> None:
    error = event({"error": {"code": "engine_failed", "message": ""}})
    assert outcome(reply_to(event(chunk("a")) + b"event: error\n" + error + DONE)) == (
        "cut",
        "engine_failed",
    )
    assert outcome(reply_to(error + DONE)) == ("cut", "engine_failed")  # vLLM names no event


def test_the_first_reason_stands() -> None:
    reply = reply_to(event(chunk("a")))
    reply.fail("timeout")
    reply.fail("connection_lost")
    assert outcome(reply) == ("cut", "timeout")


def test_nonsense_in_a_stream_is_cut_and_not_passed_over() -> None:
    assert outcome(reply_to(b"data: {not json\n\n" + DONE)) == ("cut", "malformed_event")


def test_a_reply_with_fewer_tokens_than_asked_for_is_wrong() -> None:
    reply = reply_to(WHOLE)
    assert outcome(reply, 3) == ("wrong", "token_count")
    assert outcome(reply, None) == ("ok", "")


def test_a_reply_without_a_finish_reason_is_wrong() -> None:
    assert outcome(reply_to(event(chunk("a")) + DONE)) == ("wrong", "no_finish_reason")


def test_a_server_that_counts_no_tokens_is_not_held_to_a_count() -> None:
    assert outcome(reply_to(event(chunk("a")) + END + DONE), 7) == ("ok", "")


def test_an_error_body_is_kept_only_so_far() -> None:
    reply = reply_to(b"x" * (1 << 20), 500)
    assert len(reply._error_body) <= 1 << 16


def test_what_failed_before_a_second_try_is_forgotten() -> None:
    reply = Reply()
    reply.fail("connection_lost")
    reply.forget()
    reply.begin(200, {})
    reply.feed(WHOLE, 1.0)
    assert outcome(reply) == ("ok", "")
