"""The same batch through a server of its own: what HTTP and a second process cost."""

import asyncio
import contextlib
import json
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from server.bench.timing import Timing
from server.config import ModelConfig

TURNOUT = (sys.executable, "-c", "from server.cli import main; main()")
_START_TIMEOUT_S = 120.0


class ServerProcess:
    """A `turnout serve` of its own over a store that is not open elsewhere, ready for requests."""

    def __init__(self, model: ModelConfig, store: Path, bank_rows: int, *options: str) -> None:
        """Start it, with further `options` of the command, and wait until it is ready."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        given = {
            "--base": model.path,
            "--base-name": model.name,
            "--quantization": model.quantization,
            "--device": model.device,
            "--store": store,
            "--port": self.port,
            "--bank-rows": bank_rows,
        }
        arguments = [str(word) for pair in given.items() for word in pair]
        self._process = subprocess.Popen(
            [*TURNOUT, "serve", "--no-prefix-caching", *arguments, *options],
            stdout=subprocess.DEVNULL,
        )
        self._wait_ready()

    def close(self) -> None:
        """Stop the server."""
        self._process.terminate()
        self._process.wait()

    def _wait_ready(self) -> None:
        deadline = time.monotonic() + _START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self._process.poll() is None, "the server ended while starting"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready", trust_env=False).status_code == 200:
                    return
            time.sleep(0.1)
        self.close()
        raise TimeoutError(f"the server was not ready within {_START_TIMEOUT_S:.0f} s")


class HttpSystem:
    """A server process, asked by one stream for each request of a batch."""

    name = "turnout over HTTP"

    def __init__(
        self, model: ModelConfig, names: list[str], store: Path, new_tokens: int, bank_rows: int
    ) -> None:
        """Serve the store, which holds adapters of these names."""
        self._base, self._names, self._new_tokens = model.name, names, new_tokens
        self._server = ServerProcess(model, store, bank_rows)

    def close(self) -> None:
        """Stop the server."""
        self._server.close()

    def run(self, prompts: list[list[int]], choice: list[int | None]) -> Timing:
        """Run one batch: prompts[i] through adapter choice[i], None for the base."""
        return asyncio.run(self._run(prompts, choice))

    async def _run(self, prompts: list[list[int]], choice: list[int | None]) -> Timing:
        began = time.perf_counter()
        firsts = await asyncio.gather(
            *(self._stream(prompt, chosen) for prompt, chosen in zip(prompts, choice, strict=True))
        )
        return Timing(max(firsts) - began, time.perf_counter() - began)

    async def _stream(self, prompt: list[int], chosen: int | None) -> float:
        """Read one stream to its end; returns when its first token came."""
        body = json.dumps(
            {
                "model": self._base if chosen is None else self._names[chosen],
                "prompt": prompt,
                "max_tokens": self._new_tokens,
                "temperature": 0,
                "ignore_eos": True,
                "stream": True,
            }
        )
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n"
            f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        writer.write((head + body).encode())
        received = bytearray()
        first = 0.0
        while chunk := await reader.read(1 << 16):
            received += chunk
            if not first and b"data: " in received:
                first = time.perf_counter()
        writer.close()
        assert b" 200 OK" in received[:20], received[:400]
        assert b"data: [DONE]" in received[-40:], received[-400:]
        return first
