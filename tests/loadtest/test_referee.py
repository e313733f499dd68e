"""aiperf, unmodified, replays the same trace and must agree with what we measured.

It has a virtual environment of its own, because its pins are not ours. Bodies are sent to the
letter, and its tokenizer is a local folder: no hub is asked.
"""

import json
import os
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from loadtest.demo import DemoOptions, push_variant, serving
from loadtest.report import RunReport
from loadtest.run import RunOptions, Unwatched, run
from loadtest.target import Target, encode_payloads
from loadtest.trace import Line
from server.default_base import ensure_default_base
from tests.loadtest.making import lines
from tests.loadtest.stub import Behaviour, Stub

AIPERF = Path(__file__).parent.parent.parent / ".turnout" / "tools" / "aiperf" / "bin" / "aiperf"
TRIES = 3  # a busy machine may spoil one

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def aiperf() -> Path:
    """The command, where it is installed."""
    if not AIPERF.exists():
        pytest.skip("no aiperf here; `bash .ci/tools` installs it: 1.2 GB, a minute or two")
    return AIPERF


def judged(aiperf: Path, target: Target, trace: list[Line], folder: Path) -> dict[str, Any]:
    """Let aiperf replay the trace on its schedule; return its figures."""
    folder.mkdir()
    (folder / "payloads.jsonl").write_bytes(encode_payloads(target, trace))
    options = {
        "--model": trace[0].model,
        "--endpoint-type": "chat",
        "--url": target.url,
        "--input-file": folder / "payloads.jsonl",
        "--custom-dataset-type": "mooncake_trace",
        "--tokenizer": ensure_default_base().resolve(),
        "--artifact-dir": folder / "out",
        "--ui": "none",
    }
    words = [str(word) for pair in options.items() for word in pair]
    environment = {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"}
    done = subprocess.run(
        [str(aiperf), "profile", "--streaming", "--fixed-schedule", *words],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    figures = json.loads((folder / "out" / "profile_export_aiperf.json").read_text())
    assert isinstance(figures, dict)
    return figures


def ms(seconds: float | None) -> float:
    assert seconds is not None
    return seconds * 1e3


def counts_agree(ours: RunReport, theirs: dict[str, Any]) -> None:
    assert theirs["request_count"]["avg"] == ours.outcomes["ok"] == ours.trace.num_lines
    assert theirs["request_error_rate"]["avg"] == 0
    assert theirs["total_usage_completion_tokens"]["avg"] == ours.total.num_tokens


async def test_on_a_stub_of_known_latency_both_count_and_time_the_same(
    aiperf: Path, stub: Stub, tmp_path: Path
) -> None:
    stub.default = Behaviour(ttft_s=0.1, gap_s=0.02)
    trace = lines(40, every_s=0.1, output_tokens=8, prompt_tokens=16)
    target = Target(url=stub.url, endpoint="chat")
    apart = []
    for attempt in range(TRIES):
        stub.clear()
        ours = await run(target, trace, RunOptions(check_share=0, num_workers=1), Unwatched())
        asked_by_us = Counter(json.dumps(body, sort_keys=True) for body in stub.seen)
        stub.clear()
        theirs = judged(aiperf, target, trace, tmp_path / f"try-{attempt}")
        assert Counter(json.dumps(body, sort_keys=True) for body in stub.seen) == asked_by_us
        counts_agree(ours, theirs)
        assert theirs["usage_prompt_tokens"]["avg"] == 16
        apart.append(abs(theirs["time_to_first_token"]["p50"] - ms(ours.total.ttft.p50)))
        if apart[-1] < 5:
            break
    assert min(apart) < 5, f"TTFT is apart by {apart} ms"


async def test_on_our_server_both_count_the_same(aiperf: Path, tmp_path: Path) -> None:
    ensure_default_base()
    async with serving(DemoOptions(), tmp_path / "store") as url:
        model = push_variant(url, 0)
        trace = lines(10, every_s=0.4, model=model, output_tokens=6, prompt_tokens=12)
        target = Target(url=url, endpoint="chat", timeout_s=60)
        ours = await run(target, trace, RunOptions(check_share=0), Unwatched())
        theirs = judged(aiperf, target, trace, tmp_path / "judged")
    counts_agree(ours, theirs)
    assert ours.identity.num_checked == 10
