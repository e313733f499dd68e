"""`turnout loadtest demo`: a server of its own with many adapters, under load for a minute.

Adapters are the example ones with another alpha each, so that each is its own weights and digest.
"""

import asyncio
import contextlib
import json
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from loadtest.report import RunReport
from loadtest.run import RunOptions, Watcher, run
from loadtest.target import Target
from loadtest.workload import Workload, make_trace

EXAMPLES = Path(__file__).parent.parent / "adapters" / "examples"
SERVE = (sys.executable, "-c", "from server.cli import main; main()", "serve")
_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0
_FILES = ("adapter_config.json", "adapter_model.safetensors")


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """How large the demonstration is."""

    num_adapters: int = 20
    rate: float = 1.5  # requests per second: what two CPU cores carry with room to spare
    duration_s: float = 60.0
    alpha: float = 1.0
    prompt_tokens: int = 32
    output_tokens: int = 16
    bank_rows: int = 96  # 12 of the 20 adapters: some requests must fetch theirs
    serve_options: tuple[str, ...] = ()
    command: Sequence[str] = SERVE


async def demo(options: DemoOptions, run_options: RunOptions, watcher: Watcher) -> RunReport:
    """Serve, register the adapters, replay a Zipf trace over them, and stop the server."""
    with tempfile.TemporaryDirectory(prefix="turnout-loadtest-") as scratch:
        async with serving(options, Path(scratch) / "store") as url:
            return await _load(url, options, run_options, watcher)


async def _load(
    url: str, options: DemoOptions, run_options: RunOptions, watcher: Watcher
) -> RunReport:
    watcher.stage("Registering adapters", options.num_adapters)
    names = []
    for index in range(options.num_adapters):
        names.append(push_variant(url, index))
        watcher.step()
        await asyncio.sleep(0)  # so that Ctrl-C is heard
    workload = Workload(
        models=tuple(names),
        rate=options.rate,
        duration_s=options.duration_s,
        alpha=options.alpha,
        prompt_tokens=options.prompt_tokens,
        output_tokens=options.output_tokens,
    )
    return await run(Target(url=url), make_trace(workload), run_options, watcher)


def push_variant(url: str, index: int) -> str:
    """Register one of the example adapters with an alpha of its own; return its name."""
    folders = sorted(path.parent for path in EXAMPLES.glob(f"*/{_FILES[0]}"))
    folder = folders[index % len(folders)]
    config = json.loads((folder / _FILES[0]).read_text(encoding="utf-8"))
    config["lora_alpha"] *= 1 - 0.01 * (index // len(folders))
    contents = (json.dumps(config).encode(), (folder / _FILES[1]).read_bytes())
    name = f"{folder.name}-{index // len(folders)}"
    files = [(file, (file, content)) for file, content in zip(_FILES, contents, strict=True)]
    try:
        reply = httpx.post(
            f"{url}/v1/adapters", data={"name": name}, files=files, timeout=60, trust_env=False
        )
    except httpx.TransportError as error:
        raise ValueError(f"{url} did not take the adapter {name}: {error}") from None
    if reply.is_error:
        raise ValueError(f"{url} refused the adapter {name}: {reply.text[:400]}")
    return name


@contextlib.asynccontextmanager
async def serving(options: DemoOptions, store: Path) -> AsyncIterator[str]:
    """A server process; yields its URL once it is ready, and stops it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    arguments = ["--store", str(store), "--port", str(port), "--bank-rows", str(options.bank_rows)]
    command = [*options.command, *arguments, *options.serve_options]
    log = store.parent / "server.log"
    with log.open("wb") as opened:
        process = subprocess.Popen(command, stdout=opened, stderr=opened)
    try:
        await _wait_ready(url, process, command, log)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


async def _wait_ready(
    url: str, process: "subprocess.Popen[bytes]", command: Sequence[str], log: Path
) -> None:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline:
        if process.poll() is not None:
            said = log.read_text(errors="replace").strip()[-1000:]
            raise ValueError(f"{shlex.join(command)} ended with {process.returncode}: {said}")
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/ready", trust_env=False).status_code == 200:
                return
        await asyncio.sleep(0.1)
    raise ValueError(f"{url} was not ready within {_START_TIMEOUT_S:.0f} s")
