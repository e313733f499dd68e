"""What a person sees of a server: the lines to copy, and its log."""

import io
import json
import logging
import re
from pathlib import Path

import pytest
from rich.console import Console

from server.__main__ import _LINES_TO_TRY, _Formatter, _listen, _say_ready, _url
from server.config import Config, ModelConfig, ServerConfig


def test_what_is_said_to_copy_is_json_that_the_server_takes() -> None:
    text = _LINES_TO_TRY.format(url="http://127.0.0.1:8000", question="Who?")
    bodies = re.findall(r"-d '(.*?)'\n", text, re.DOTALL)
    assert [json.loads(body)["model"] for body in bodies] == ["json", "pirate"]
    assert all(json.loads(body)["messages"] for body in bodies)


def test_what_is_said_to_copy_fits_a_terminal_of_80_columns() -> None:
    text = _LINES_TO_TRY.format(
        url="http://127.0.0.1:8000", question="What is the capital of France?"
    )
    assert max(len(line) for line in text.splitlines()) < 80


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


@pytest.mark.parametrize("keys", [None, Path("secrets/keys")])
def test_where_keys_are_asked_for_the_banner_says_so(keys: Path | None) -> None:
    config = Config(
        model=ModelConfig(path=Path("base"), name="tiny"), server=ServerConfig(api_keys=keys)
    )
    written = io.StringIO()
    _say_ready(Console(file=written), config, "http://127.0.0.1:8000", example_adapters=True)
    assert "Turnout serves tiny at http://127.0.0.1:8000" in written.getvalue()
    said = "-H 'authorization: Bearer KEY', of secrets/keys" in written.getvalue()
    assert said == (keys is not None)


@pytest.mark.parametrize(
    ("host", "said"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("::", "[::1]")]
)
def test_the_address_that_is_said_is_one_to_connect_to(host: str, said: str) -> None:
    listener = _listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    assert port
    assert _url(host, listener) == f"http://{said}:{port}"
    listener.close()
