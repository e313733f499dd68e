"""What a person sees of a server: the lines to copy, and its log."""

import json
import logging
import re

import pytest

from server.__main__ import _LINES_TO_TRY, _Formatter


def test_what_is_said_to_copy_is_json_that_the_server_takes() -> None:
    text = _LINES_TO_TRY.format(url="http://127.0.0.1:8000", question="Who?")
    bodies = re.findall(r"-d '(.*?)'\n", text, re.DOTALL)
    assert [json.loads(body)["model"] for body in bodies] == ["json", "pirate"]
    assert all(json.loads(body)["messages"] for body in bodies)


@pytest.mark.parametrize(
    ("extra", "line"),
    [
        ({}, "promotion ended: done"),
        ({"adapter": "bot@1"}, "promotion ended: done adapter=bot@1"),
        ({"request_id": "r"}, "promotion ended: done request_id=r"),
        ({"color_message": "of uvicorn"}, "promotion ended: done"),
    ],
)
def test_a_line_of_the_log_names_the_adapter_and_the_request(
    extra: dict[str, str], line: str
) -> None:
    record = logging.makeLogRecord({"msg": "promotion ended: done ", **extra})
    assert _Formatter("%(message)s").format(record) == line
