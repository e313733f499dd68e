"""Traces are read as they were written, and refused with the line that will not do."""

import json
from pathlib import Path

import pytest

from loadtest.trace import (
    duration_s,
    is_closed_loop,
    models_of,
    read_trace,
    trace_digest,
    write_trace,
)
from tests.loadtest.making import line, lines


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    written = [line(0.5, "a", seed=7), line(1.25, "b@2", tenant="x", prompt_tokens=9)]
    write_trace(tmp_path / "deep" / "trace.jsonl", written)
    assert read_trace(tmp_path / "deep" / "trace.jsonl") == written


def test_each_line_is_plain_json_that_any_tool_can_read(tmp_path: Path) -> None:
    write_trace(tmp_path / "t", [line(0.5, "a", prompt_tokens=9, output_tokens=8, seed=1)])
    (text,) = (tmp_path / "t").read_text().splitlines()
    assert json.loads(text) == {
        "time_s": 0.5, "tenant": "t", "model": "a", "prompt_tokens": 9, "output_tokens": 8,
        "seed": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('{"time_s": 1}', "line 2.*tenant"),
        ('{"time_s": -1, "tenant": "", "model": "a", "prompt_tokens": 1, "output_tokens": 1}',
         "line 2.*time_s is -1"),
        ('{"time_s": 9, "tenant": "", "model": "", "prompt_tokens": 1, "output_tokens": 1}',
         "line 2.*model is empty"),
        ('{"time_s": 9, "tenant": "", "model": "a", "prompt_tokens": 0, "output_tokens": 1}',
         "line 2.*prompt_tokens is 0"),
        ('{"time_s": 9, "tenant": "", "model": "a", "prompt_tokens": 1, "output_tokens": 0}',
         "line 2.*output_tokens is 0"),
        ('{"time_s": 1, "tenant": "", "model": "a", "prompt_tokens": 1, "output_tokens": 1}',
         "line 2.*before the line above"),
        ('{"time_s": 9, "tenant": "", "model": "a", "prompt_tokens": 1, "output_tokens": 1, '
         '"user": 1}', "line 2.*every line names a user, or none"),
        ('{"time_s": 9, "tenant": "", "model": "a", "prompt_tokens": 1000000000000, '
         '"output_tokens": 1}', "line 2.*prompt_tokens is 1000000000000"),
        ("not json", "line 2"),
    ],
)  # fmt: skip
def test_a_line_that_will_not_do_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    write_trace(tmp_path / "t", [line(2.0)])
    with (tmp_path / "t").open("a") as file:
        file.write(text + "\n")
    with pytest.raises(ValueError, match=complaint):
        read_trace(tmp_path / "t")


def test_an_empty_trace_is_refused_and_blank_lines_are_not_requests(tmp_path: Path) -> None:
    (tmp_path / "t").write_text("\n\n")
    with pytest.raises(ValueError, match="holds no request"):
        read_trace(tmp_path / "t")


def test_two_traces_share_a_digest_only_if_they_are_the_same() -> None:
    assert trace_digest(lines(3)) == trace_digest(lines(3))
    assert trace_digest(lines(3)) != trace_digest(lines(3, seed=9))


def test_what_a_trace_says_of_itself() -> None:
    assert duration_s(lines(3, every_s=2.0)) == 4.0
    assert duration_s([]) == 0.0
    assert models_of([line(model="b"), line(model="a"), line(model="b")]) == ["a", "b"]
    assert is_closed_loop([line(user=0)])
    assert not is_closed_loop(lines(1))
