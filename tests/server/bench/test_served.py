"""`turnout bench served`, small and on a CPU: a real server, a real comparison, a real merge."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from server.bench import served
from server.bench.reference import save_reference_base
from server.bench.served import Scale, compared, kv_bytes, merge, run, wait_until_merged
from tests.server.bench.test_merged import WIDER

SCALE = Scale(
    device="cpu",
    shape=WIDER,
    batches=(1, 2),
    num_blocks=2,
    num_tokens=8,
    num_streams=2,
    num_stream_tokens=12,
    serve_options=("--kv-gib", "0.01", "--max-model-len", "256"),
)


@pytest.fixture(autouse=True)
def _a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")


@pytest.mark.slow
def test_both_paths_are_compared_through_a_server_and_streams_run_beside_a_merge(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    void = ""
    try:
        run(tmp_path / "figures.json", out, beside_merge=True, scale=SCALE)
    except ValueError as error:
        void = str(error)
    # A busy machine sends late; the figures are there all the same.
    assert all("send lateness" in why for why in void.split("; ") if why)
    figures = json.loads((tmp_path / "figures.json").read_text())["figures"]
    found = {figure["name"]: figure["value"] for figure in figures}
    assert all(value > 0 for value in found.values())
    for batch in (1, 2):
        adapter, merged = (found[f"batch {batch}, {path}, a token"] for path in PATHS)
        assert found[f"batch {batch}, adapter over merged"] == pytest.approx(adapter / merged)
    assert {"that merge, in the lowest priority", "server process, start to ready"} <= set(found)
    assert "p99 between tokens, 2 streams, beside a merge on the CPU" in found
    report = json.loads((out / "report.json").read_text())
    assert [row["num_blocks"] for row in report["batches"]] == [2, 2]
    assert report["targets"][1]["header x-serving-path"] == "merged"
    # 2 layers of 128 x 128 codes: 0.01 GiB of weights set aside, as much KV beside them
    assert report["memory_share"] == pytest.approx(0.5, abs=0.01)
    assert (out / "report.html").stat().st_size > 10_000
    streams = json.loads((out / "beside-merge" / "report.json").read_text())
    assert streams["outcomes"]["ok"] == 8
    assert set(streams["by_path"]) == {"adapter"}  # nobody is promoted yet while a promotion runs
    assert "Merged into" in capfd.readouterr().out


PATHS = ("adapter", "merged")


def a_report(void: list[str], break_even: float | None) -> dict[str, Any]:
    """What `turnout loadtest compare` leaves, as far as it is read."""

    def side(step_s: float) -> dict[str, Any]:
        step = {"value": step_s, "low": step_s - 1e-4, "high": step_s + 1e-4}
        return {"step_s": step, "latency": {"ttft": {"p50": 0.013}}}

    speedup = {"value": 1.25, "low": 1.2, "high": 1.3}
    return {
        "void": void,
        "names": PATHS,
        "batches": [{"batch": 8, "a": side(0.0035), "b": side(0.0028), "speedup": speedup}],
        "curves": [{"batch": 8, "break_even": break_even}],
    }


@pytest.mark.parametrize(
    ("break_even", "said"), [(0.6, "pays from 60% of traffic on"), (None, "never pays")]
)
def test_a_comparison_comes_to_times_their_ratio_and_where_merging_pays(
    break_even: float | None, said: str
) -> None:
    adapter, merged, ratio = compared(a_report([], break_even))
    assert [figure.name for figure in (adapter, merged, ratio)] == [
        "batch 8, adapter, a token",
        "batch 8, merged, a token",
        "batch 8, adapter over merged",
    ]
    assert [adapter.value, merged.value, ratio.value] == pytest.approx([3.5, 2.8, 1.25])
    assert adapter.note == "3.40 to 3.60; first token 13 ms (p50)"
    assert ratio.note == f"1.20 to 1.30; merging {said}"


def test_the_kv_cache_is_counted_in_blocks_of_the_bases_own_shape(tmp_path: Path) -> None:
    save_reference_base(tmp_path / "base", torch.device("cpu"), **WIDER)
    metrics = (
        "# TYPE vllm:cache_config_info gauge\n"
        'vllm:cache_config_info{block_size="16",engine="0",model_name="m",num_gpu_blocks="10"} 1.0'
    )
    # 160 tokens, 2 layers, K and V, 2 heads of 16, 2 bytes
    assert kv_bytes(metrics, tmp_path / "base") == 160 * 2 * 2 * 2 * 16 * 2


def test_a_model_that_is_not_loaded_in_time_is_an_error_with_the_servers_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    card = {"promotion": {"path": "adapter", "message": "its files are damaged"}}
    request = httpx.Request("GET", "http://127.0.0.1:9")
    monkeypatch.setattr(
        httpx, "get", lambda url, **_: httpx.Response(200, json=card, request=request)
    )
    monkeypatch.setattr(served, "_MERGED_TIMEOUT_S", 0.0)
    with pytest.raises(TimeoutError, match="a0 is not served merged: its files are damaged"):
        wait_until_merged("http://127.0.0.1:9")


def test_a_merge_beside_streams_has_what_a_promotion_has_and_another_has_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[tuple[list[str], dict[str, str]]] = []

    def note(command: list[str], *, env: dict[str, str], **_: object) -> None:
        ran.append((command, env))
        Path(command[-1]).mkdir()

    monkeypatch.setattr(subprocess, "run", note)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 16)
    merge(tmp_path, "cpu", aside=True)
    merge(tmp_path, "cuda")
    (aside, its_own), (alone, everything) = ran
    assert "step_aside()" in aside[2]
    assert (its_own["OMP_NUM_THREADS"], its_own["CUDA_VISIBLE_DEVICES"]) == ("8", "")
    assert "step_aside()" not in alone[2]
    assert "CUDA_VISIBLE_DEVICES" not in everything
    assert not list(tmp_path.iterdir()), "15 GB are left"


def test_a_merge_that_fails_is_an_error_with_its_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "TURNOUT", ("false",))
    with pytest.raises(ValueError, match=r"the merge failed: .* exit status 1"):
        merge(tmp_path, "cpu")


class NoServer:
    """In place of a server process."""

    url = "http://127.0.0.1:9"

    def __init__(self, *_: object) -> None:
        self.is_closed = False

    def close(self) -> None:
        self.is_closed = True


def test_a_void_comparison_is_written_down_and_then_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(served, "ServerProcess", NoServer)
    monkeypatch.setattr(served, "wait_until_merged", lambda url: None)
    monkeypatch.setattr(
        served._Asked, "compare", lambda self, merged_gib: a_report(["the sender was late"], None)
    )
    with pytest.raises(ValueError, match=r"^void: the sender was late$"):
        run(tmp_path / "figures.json", tmp_path / "out", beside_merge=False, scale=SCALE)
    assert len(json.loads((tmp_path / "figures.json").read_text())["figures"]) == 5


def test_a_load_test_that_leaves_no_report_is_an_error_and_not_the_last_runs(
    tmp_path: Path,
) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(ValueError, match=r"`turnout loadtest compare` ended with 1"):
        served._loadtest("compare", tmp_path)
