"""What a scrape adds to the largest gap in a stream: `python -m tests.deploy.bench_scrape`.

The API process as it is, over an engine that gives 64 streams a token every 20 ms, with 300
adapters in its metrics. Another process reads the streams, and in every other round it scrapes
once a second.
"""

import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import urlsplit

from rich.console import Console

from server.engine.latency import settle_heap
from tests.deploy.traffic import busy_metrics
from tests.server.api.harness import BASE, Script, Server, serving

NUM_ADAPTERS = 300
NUM_STREAMS = 64
TOKEN_GAP_S = 0.02
ROUND_S = 10
NUM_ROUNDS = 6  # without and with scrapes, in turn
LIMIT_MS = 40.0
_CONFIG = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 2048,
}


async def largest_gap_s(url: str, *, scrapes: bool) -> float:
    """Read every stream to its end; return the longest wait between two pieces of any."""
    streams = [asyncio.create_task(_read_stream(url)) for _ in range(NUM_STREAMS)]
    scraper = asyncio.create_task(_scrape(url)) if scrapes else None
    gaps = await asyncio.gather(*streams)
    if scraper is not None:
        scraper.cancel()
    return max(gaps)


async def _read_stream(url: str) -> float:
    body = json.dumps({"model": BASE, "prompt": "hello", "max_tokens": 2000, "stream": True})
    reader, writer = await _send(url, "POST /v1/completions", body)
    await reader.readuntil(b"data: ")
    largest, last = 0.0, time.perf_counter()
    while await reader.read(65536):
        now = time.perf_counter()
        largest, last = max(largest, now - last), now
    writer.close()
    return largest


async def _scrape(url: str) -> None:
    while True:
        reader, writer = await _send(url, "GET /metrics", "")
        await reader.read()
        writer.close()
        await asyncio.sleep(1)


async def _send(
    url: str, what: str, body: str
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    head = (
        f"{what} HTTP/1.1\r\nhost: {address.netloc}\r\nconnection: close\r\n"
        f"accept-encoding: gzip\r\ncontent-type: application/json\r\n"
        f"content-length: {len(body)}\r\n\r\n"
    )
    writer.write((head + body).encode())
    await writer.drain()
    return reader, writer


def _round(server: Server, *, scrapes: bool) -> float:
    """One round, read by another process; milliseconds."""
    num_tokens = int(ROUND_S / TOKEN_GAP_S)
    script = Script([ord("a")] * num_tokens, "length", delay_s=TOKEN_GAP_S)
    server.engine.scripts.extend([script] * NUM_STREAMS)
    command = [sys.executable, "-m", "tests.deploy.bench_scrape", server.url, str(int(scrapes))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return 1000 * float(done.stdout)


def main() -> None:
    """Run the rounds and say what they gave."""
    console = Console()
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        base.mkdir()
        (base / "config.json").write_text(json.dumps(_CONFIG))
        with serving(base, Path(folder) / "store") as server:
            busy = busy_metrics(NUM_ADAPTERS, NUM_STREAMS)
            server.metrics.adapters, server.metrics.other = busy.adapters, busy.other
            settle_heap()  # as the server does once it is ready
            rounds = [_round(server, scrapes=bool(n % 2)) for n in range(NUM_ROUNDS)]
    without, with_scrapes = (statistics.median(rounds[n::2]) for n in (0, 1))
    console.print(
        f"largest gap of any stream: {without:.0f} ms, with scrapes {with_scrapes:.0f} ms"
    )
    console.print(f"rounds: {', '.join(f'{gap:.0f}' for gap in rounds)} ms")
    added = with_scrapes - without
    console.print(f"a scrape adds {added:.0f} ms; the limit is {LIMIT_MS:.0f} ms")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        gap = asyncio.run(largest_gap_s(sys.argv[1], scrapes=sys.argv[2] == "1"))
        Console().print(gap)
    else:
        main()
