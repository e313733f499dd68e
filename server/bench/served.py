"""`turnout bench served`: merged against adapter through a real server, a random 7B on this GPU.

`turnout loadtest compare` asks it over HTTP, in a process of its own as an operator's would be.
"""

import contextlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import torch

from adapters.artifacts import Artifact, ArtifactStore
from server.base_digest import base_digest
from server.bench.figures import Figure, show
from server.bench.http import TURNOUT, ServerProcess
from server.bench.reference import register_adapters, save_reference_base, save_reference_gptq
from server.config import ModelConfig
from server.model.spec import read_spec

NAME, RANK = "a0", 16  # of the adapter
BANK_ROWS = 512
GIB = 1 << 30
_MERGED_TIMEOUT_S = 180.0
_MERGE_TIMEOUT_S = 400.0
_ASIDE = (
    "from training.promotion_job import step_aside; from server.cli import main; "
    "step_aside(); main()"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How large everything is: the reference on a GPU unless a test says otherwise."""

    device: str = "cuda"
    shape: Mapping[str, object] = field(default_factory=dict)  # changes of the base's config
    batches: tuple[int, ...] = (1, 8, 32)
    num_blocks: int = 12
    num_tokens: int = 256  # of a prompt, and of a reply
    num_streams: int = 8  # beside a merge
    num_stream_tokens: int = 1400
    serve_options: tuple[str, ...] = ()


def run(
    json_file: Path | None, out: Path, *, beside_merge: bool, scale: Scale | None = None
) -> list[Figure]:
    """Measure and print; `out` gets report.json and report.html. Needs 20 GB of disk.

    beside_merge  measure a merge of the adapter too, and running streams beside it (35 GB)
    Raises ValueError where the comparison is void.
    """
    scale = scale or Scale()
    void: list[str] = []
    with tempfile.TemporaryDirectory(prefix="turnout-bench-") as scratch:
        figures = _figures(Path(scratch), out, scale, void, beside_merge=beside_merge)
        found = show(figures, json_file)
    if void:
        raise ValueError(f"void: {'; '.join(void)}")
    return found


def _figures(
    root: Path, out: Path, scale: Scale, void: list[str], *, beside_merge: bool
) -> Iterator[Figure]:
    artifact = prepare(root, scale)
    # What the model takes on disk is what the server counts, and a little more than on the GPU.
    merged_gib = math.ceil(artifact.num_bytes / GIB * 100) / 100
    model = ModelConfig(path=root / "base", name="reference", device=scale.device)
    options = ("--merged-gib", str(merged_gib), *scale.serve_options)
    began = time.perf_counter()
    with contextlib.closing(ServerProcess(model, root / "store", BANK_ROWS, *options)) as server:
        yield Figure("server process, start to ready", time.perf_counter() - began, "s")
        wait_until_merged(server.url)
        yield Figure("start to answers of the merged model", time.perf_counter() - began, "s")
        asked = _Asked(server.url, root, out, scale)
        report = asked.compare(merged_gib)
        void += report["void"]
        yield from compared(report)
        if beside_merge:
            yield from _beside_merge(asked, void)
    if beside_merge and scale.device == "cuda":
        yield Figure("merge on the GPU, without a server", merge(root, "cuda"), "s")


def prepare(root: Path, scale: Scale) -> Artifact:
    """Make root/base, and root/store with one adapter and what a promotion of it would leave."""
    device, base, store = torch.device(scale.device), root / "base", root / "store"
    spec = save_reference_base(base, device, **scale.shape)
    (adapter,) = register_adapters(store, base, spec, [RANK])
    artifact = ArtifactStore(store).register(
        save_reference_gptq(root / "merged", base, device),
        adapter_digest=adapter.digest,
        base_digest=base_digest(base),
        revision=f"{NAME}@1",
        job="bench",
        settings={},
        report={},
    )
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the server's from here on
    return artifact


def wait_until_merged(url: str) -> None:
    """Return once the merged model answers. Raises TimeoutError with the server's reason."""
    deadline = time.monotonic() + _MERGED_TIMEOUT_S
    while True:
        reply = httpx.get(f"{url}/v1/adapters/{NAME}", trust_env=False)
        promotion = reply.raise_for_status().json()["promotion"]
        if promotion["path"] == "merged":
            return
        if time.monotonic() > deadline:
            raise TimeoutError(f"{NAME} is not served merged: {promotion['message']}")
        time.sleep(0.1)


@dataclass(frozen=True, slots=True)
class _Asked:
    """The server, and `turnout loadtest` beside it."""

    url: str
    root: Path
    out: Path
    scale: Scale

    def compare(self, merged_gib: float) -> dict[str, Any]:
        """Both paths in turn; the report, as JSON."""
        scale = self.scale
        batches = [word for batch in scale.batches for word in ("--batch", str(batch))]
        workers = max(1, min(4, (os.cpu_count() or 1) // 4))  # one sends 32 at once too slowly
        metrics = httpx.get(f"{self.url}/metrics", trust_env=False).text
        kv_gib = merged_gib + kv_bytes(metrics, self._base) / GIB
        return _loadtest(
            "compare",
            self.out,
            *self._ids(),
            *("--adapter", NAME, *batches, "--blocks", str(scale.num_blocks)),
            *("--requests-per-user", "1", *_tokens(scale.num_tokens, scale.num_tokens)),
            *("--merged-gib", f"{merged_gib:.3f}", "--kv-gib", f"{kv_gib:.3f}"),
            *("--workers", str(workers)),
        )

    def streams(self, out: str) -> dict[str, Any]:
        """Streams that never end for long; the report, as JSON."""
        scale, trace = self.scale, str(self.root / "streams.jsonl")
        users = ("--users", str(scale.num_streams), "--requests-per-user", "4")
        lengths = _tokens(scale.num_tokens, scale.num_stream_tokens)
        made = ("trace", "--model", NAME, "--arrivals", "closed", *users, *lengths, "--out", trace)
        subprocess.run([*TURNOUT, "loadtest", *made], check=True, stdout=subprocess.DEVNULL)
        return _loadtest(
            "run",
            self.out / out,
            *self._ids(),
            *("--trace", trace, "--check-share", "0", "--header", "x-serving-path:adapter"),
        )

    @property
    def _base(self) -> Path:
        return self.root / "base"

    def _ids(self) -> tuple[str, ...]:
        highest = read_spec(self._base).vocab_size
        return "--url", self.url, "--prompt", "ids", "--token-ids", f"3:{highest}"


def _tokens(prompt: int, output: int) -> tuple[str, ...]:
    return "--prompt-tokens", str(prompt), "--output-tokens", str(output)


def _loadtest(command: str, out: Path, *words: str) -> dict[str, Any]:
    """Run `turnout loadtest` and return its report, void or not. Raises ValueError without one."""
    file = out / "report.json"
    file.unlink(missing_ok=True)  # of another run
    done = subprocess.run([*TURNOUT, "loadtest", command, "--out", str(out), *words], check=False)
    if not file.is_file():
        raise ValueError(f"`turnout loadtest {command}` ended with {done.returncode}")
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return report


def kv_bytes(metrics: str, base: Path) -> int:
    """Bytes of the KV cache in bf16, from a server's metrics and its base's shape."""
    (line,) = re.findall(r"^vllm:cache_config_info\{.*\}", metrics, re.MULTILINE)
    labels = dict(re.findall(r'(\w+)="(\d+)"', line))
    spec = read_spec(base)
    num_tokens = int(labels["num_gpu_blocks"]) * int(labels["block_size"])
    return num_tokens * spec.num_layers * 2 * spec.num_kv_heads * spec.head_dim * 2


def compared(report: Mapping[str, Any]) -> Iterator[Figure]:
    """What a comparison comes to: each path's time per token, their ratio, where merging pays."""
    curves = {curve["batch"]: curve["break_even"] for curve in report["curves"]}
    for row in report["batches"]:
        batch = row["batch"]
        for name, side in zip(report["names"], (row["a"], row["b"]), strict=True):
            step, first = side["step_s"], side["latency"]["ttft"]["p50"]
            note = f"{_range(step, 1e3)}; first token {first * 1e3:.0f} ms (p50)"
            yield Figure(f"batch {batch}, {name}, a token", step["value"] * 1e3, "ms", None, note)
        share = curves[batch]
        pays = "never pays" if share is None else f"pays from {share:.0%} of traffic on"
        note = f"{_range(row['speedup'])}; merging {pays}"
        a, b = report["names"]
        yield Figure(f"batch {batch}, {a} over {b}", row["speedup"]["value"], "x", None, note)


def _range(interval: Mapping[str, float], factor: float = 1.0) -> str:
    return f"{interval['low'] * factor:.2f} to {interval['high'] * factor:.2f}"


def _beside_merge(asked: _Asked, void: list[str]) -> Iterator[Figure]:
    """p99 between tokens of running streams: alone, beside a merge on the CPU, alone again."""
    name = f"p99 between tokens, {asked.scale.num_streams} streams"
    before = _gap_ms(asked.streams("alone"), void)
    yield Figure(f"{name}, alone", before, "ms")
    with ThreadPoolExecutor(1) as pool:
        merging = pool.submit(merge, asked.root, "cpu", aside=True)
        while not (merging.done() or any(asked.root.glob(".cpu-*"))):
            time.sleep(0.1)  # it reads the base's digest first
        beside = _gap_ms(asked.streams("beside-merge"), void)
        overlap = "ended before they did" if merging.done() else "ran to their end"
        merge_s = merging.result()
    after = _gap_ms(asked.streams("alone-again"), void)
    yield Figure(f"{name}, alone again", after, "ms")
    note = f"{2 * beside / (before + after):.3f} of alone; the merge {overlap}"
    yield Figure(f"{name}, beside a merge on the CPU", beside, "ms", None, note)
    yield Figure("that merge, in the lowest priority", merge_s, "s")


def _gap_ms(report: Mapping[str, Any], void: list[str]) -> float:
    void += report["checks"]["void"]
    p99: float = report["total"]["itl"]["p99"]
    return p99 * 1e3


def merge(root: Path, device: str, *, aside: bool = False) -> float:
    """Seconds that `turnout merge` of the adapter takes, from its start to its end.

    aside  as a promotion runs: in the lowest priority, without the GPU, on half of the cores
    Raises ValueError where it fails or takes too long.
    """
    command, environment = list(TURNOUT), dict(os.environ)
    if aside:
        command = [sys.executable, "-c", _ASIDE]
        threads = max((os.cpu_count() or 2) // 2, 1)
        environment |= {"OMP_NUM_THREADS": str(threads), "CUDA_VISIBLE_DEVICES": ""}
    out = root / device
    words = {
        "--adapter": NAME,
        "--store": root / "store",
        "--base": root / "base",
        "--merge-base": "original",
        "--device": device,
        "--out": out,
    }
    command += ["merge", *(str(word) for pair in words.items() for word in pair)]
    began = time.perf_counter()
    try:
        subprocess.run(command, env=environment, check=True, timeout=_MERGE_TIMEOUT_S)
    except subprocess.SubprocessError as error:
        raise ValueError(f"the merge failed: {error}") from None
    seconds = time.perf_counter() - began
    shutil.rmtree(out)
    return seconds
