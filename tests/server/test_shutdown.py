"""SIGTERM at a real server process whose engine process is a stub: it always ends."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from server.default_base import ensure_default_base
from tests.server.engine.stub_engine import make_interpreter

ROOT = Path(__file__).parents[2]
LIMIT_S = 60.0
SERVE = "import sys; sys.executable = sys.argv.pop(1); from server.cli import main; main()"


class Server:
    """One `turnout serve` process."""

    def __init__(self, folder: Path, what: str) -> None:
        ensure_default_base()
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        command = [sys.executable, "-c", SERVE, str(make_interpreter(folder, what)), "serve"]
        command += ["--store", str(folder / "store"), "--port", str(self.port), "--drain-s", "1"]
        self.process = subprocess.Popen(command, cwd=ROOT)

    def wait_for(self, path: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while True:
            assert self.process.poll() is None, "the server ended by itself"
            assert time.monotonic() < deadline, f"{path} did not become 200"
            try:
                if httpx.get(f"http://127.0.0.1:{self.port}{path}").status_code == 200:
                    return
            except httpx.TransportError:
                time.sleep(0.05)

    def begin(self, head: str, body: bytes) -> socket.socket:
        """Send the beginning of a request of 100 bytes, and wait for the rest no longer."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=LIMIT_S)
        head = f"POST {head}\r\nhost: x\r\ncontent-length: 100\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection


Serve = Callable[[str], Server]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    made: list[Server] = []

    def start(what: str) -> Server:
        made.append(Server(tmp_path, what))
        return made[-1]

    yield start
    for server in made:
        server.process.kill()
        server.process.wait()


def test_a_server_that_is_told_to_stop_while_starting_stops(serve: Serve) -> None:
    server = serve("loads")
    server.wait_for("/health")
    caught = Path(f"/proc/{server.process.pid}/status").read_text().split("SigCgt:")[1].split()[0]
    # The first process of a container is sent no signal that it has no handler for.
    assert int(caught, 16) & (1 << (signal.SIGTERM - 1))
    for _ in range(5):
        server.process.terminate()
        time.sleep(0.05)
    assert server.process.wait(LIMIT_S) == 0


@pytest.mark.slow
def test_requests_that_never_come_whole_hold_no_shutdown_up(serve: Serve, tmp_path: Path) -> None:
    server = serve("idles")
    server.wait_for("/ready")
    form = "content-type: multipart/form-data; boundary=abc"
    halves = [
        server.begin("/v1/chat/completions HTTP/1.1", b'{"model"'),
        server.begin(f"/v1/adapters HTTP/1.1\r\n{form}", b"--abc"),
    ]
    deadline = time.monotonic() + LIMIT_S
    while not list((tmp_path / "store" / "uploads").glob("*")):
        assert time.monotonic() < deadline, "the upload did not begin"
        time.sleep(0.02)
    server.process.terminate()
    server.process.terminate()
    assert server.process.wait(LIMIT_S) == 0
    for connection in halves:
        reply = connection.recv(4096).decode()
        assert reply.startswith("HTTP/1.1 503")
        connection.close()
    assert list((tmp_path / "store" / "uploads").glob("*")) == []
