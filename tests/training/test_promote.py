"""What a promotion's process does around the making: options, refusals, the GPU, its state file."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.promotions import JobFolder, PromotionRequest, PromotionState
from training import promote
from training.artifact import ArtifactReport, GateFailed, Progress
from training.gate import Thresholds
from training.promotion_job import Job, Refused

ADAPTER, BASE = "a" * 64, "b" * 64


class Heard:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.progress: list[tuple[str, float, str]] = []
        self.waits: list[str] = []

    def on_progress(self, stage: str, total: float, note: str) -> None:
        self.progress.append((stage, total, note))

    def on_wait(self, why: str) -> None:
        self.waits.append(why)


def a_request(root: Path, **changes: Any) -> PromotionRequest:
    fields = {
        "job": "job",
        "adapter_digest": ADAPTER,
        "revision": "bot@2",
        "store": str(root),
        "base": str(root / "base"),
        "base_name": "tiny",
        "base_digest": BASE,
        "rows": "/rows.jsonl",
    }
    return PromotionRequest(**{**fields, **changes})


def a_report(out: Path, adapter_digest: str = ADAPTER) -> ArtifactReport:
    return ArtifactReport(
        folder=out,
        digest="d" * 64,
        adapter_digest=adapter_digest,
        base_digest=BASE,
        merge_base="original",
        group_size=32,
        num_bytes=1,
        provenance={"gate": {"passed": True}},
    )


def test_the_request_becomes_the_artifacts_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Any] = {}

    def make_artifact(adapter: str, base: Path, out: Path, **options: Any) -> ArtifactReport:
        seen.update(options, adapter=adapter, base=base, out=out)
        options["on_progress"](
            Progress(stage="quantize", merge_base="original", total=0.5, note="layer 3 of 6")
        )
        return a_report(out)

    monkeypatch.setattr(promote, "make_artifact", make_artifact)
    heard = Heard()
    request = a_request(
        tmp_path,
        merge_base="original",
        group_size=32,
        backend="auto-round",
        eval_rows="/held.jsonl",
        text="/text.txt",
        num_tokens=1024,
        gate={"max_mean_kl": 0.5},
        seed=3,
        allow_other_base=True,
    )
    promote.make(request, tmp_path / "out", tmp_path / "work", heard)
    assert heard.progress == [("quantize", 0.5, "layer 3 of 6")]
    del seen["on_progress"]
    thresholds = seen.pop("gate")
    assert thresholds == Thresholds(max_mean_kl=0.5)
    assert seen == {
        "adapter": "bot@2",
        "base": tmp_path / "base",
        "out": tmp_path / "out",
        "base_name": "tiny",
        "base_digest": BASE,
        "store": tmp_path,
        "work": tmp_path / "work",
        "merge_base": "original",
        "group_size": 32,
        "rows": Path("/rows.jsonl"),
        "backend": "auto-round",
        "eval_rows": Path("/held.jsonl"),
        "text": Path("/text.txt"),
        "num_tokens": 1024,
        "seed": 3,
        "device": "cpu",
        "allow_other_base": True,
    }


@pytest.mark.parametrize("field", ["rows", "eval_rows", "text"])
def test_a_file_that_is_no_longer_what_was_meant_is_refused(
    field: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job may wait for long, or go on after days; what it was asked for is in its record."""
    monkeypatch.setattr(promote, "make_artifact", lambda *_, **__: a_report(tmp_path))
    file = tmp_path / "file"
    file.write_text("then")
    sha256 = hashlib.sha256(b"then").hexdigest()
    request = a_request(tmp_path, **{field: str(file), f"{field}_sha256": sha256})
    promote.make(request, tmp_path, tmp_path, Heard())
    file.write_text("now")
    with pytest.raises(Refused, match="file has changed since the promotion began; promote again"):
        promote.make(request, tmp_path, tmp_path, Heard())
    file.unlink()
    with pytest.raises(Refused, match="No such file"):
        promote.make(request, tmp_path, tmp_path, Heard())


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("no rows"), "no rows"),
        (OSError(28, "No space left on device"), "No space left"),
        (MemoryError(), "MemoryError"),
    ],
)
def test_what_cannot_be_made_is_refused_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def make_artifact(*args: Any, **options: Any) -> ArtifactReport:
        raise error

    monkeypatch.setattr(promote, "make_artifact", make_artifact)
    with pytest.raises(Refused, match=said):
        promote.make(a_request(tmp_path), tmp_path / "out", tmp_path / "work", Heard())


def test_an_unknown_threshold_is_refused_by_name(tmp_path: Path) -> None:
    request = a_request(tmp_path, gate={"max_kl": 1.0})
    with pytest.raises(Refused, match="no threshold 'max_kl'"):
        promote.make(request, tmp_path / "out", tmp_path / "work", Heard())


def test_a_failed_gate_says_by_how_much_and_keeps_the_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = {
        "message": "the quality gate failed. original base: mean KL is 0.3, 0.2 over 0.1",
        "candidates": {"original": {"passed": False}},
    }

    def make_artifact(*args: Any, **options: Any) -> ArtifactReport:
        raise GateFailed(report)

    monkeypatch.setattr(promote, "make_artifact", make_artifact)
    with pytest.raises(Refused) as refused:
        promote.make(a_request(tmp_path), tmp_path / "out", tmp_path / "work", Heard())
    assert refused.value.message == report["message"]
    assert refused.value.result == {"gate": report}


def test_without_a_gpu_a_job_for_one_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="finds no GPU"):
        promote.wait_for_gpu(1, 0.0, Heard())


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A GPU whose free bytes at each look are this list's, the last one for good."""
    free: list[int] = []

    def mem_get_info() -> tuple[int, int]:
        return free.pop(0) if len(free) > 1 else free[0], 1 << 40

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    monkeypatch.setattr(promote, "_GPU_POLL_S", 0.0)
    return free


def test_the_gpu_is_waited_for_until_it_has_room(gpu: list[int]) -> None:
    gpu.extend((1 << 30, 3 << 30))
    heard = Heard()
    promote.wait_for_gpu(2 << 30, 60.0, heard)
    assert heard.waits == [
        "waiting for 2.0 GiB of GPU memory; 1.0 are free",
        "takes 2.0 GiB of GPU memory",
    ]


def test_a_gpu_that_stays_full_is_not_waited_for_longer_than_said(gpu: list[int]) -> None:
    gpu.append(1 << 30)
    with pytest.raises(Refused, match=r"needs 2.0 GiB of GPU memory; 1.0 are free, and waited 0 s"):
        promote.wait_for_gpu(2 << 30, 0.0, Heard())


def test_a_7b_is_said_to_take_a_few_gib_of_gpu_memory(tmp_path: Path) -> None:
    config = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert 4 < promote.gpu_bytes(tmp_path) / (1 << 30) < 8


def a_folder(root: Path) -> JobFolder:
    return JobFolder.create(root, a_request(root), {})


def test_an_adapter_that_became_another_one_is_not_registered(tmp_path: Path) -> None:
    def make(request: Any, out: Path, work: Path, listener: Any) -> ArtifactReport:
        out.mkdir()
        return a_report(out, adapter_digest="c" * 64)

    state = Job(a_folder(tmp_path), make).run()
    assert (state.status, state.message) == ("failed", "bot@2 has become another adapter meanwhile")
    assert not (tmp_path / "artifacts").exists()


def test_progress_is_written_at_each_stage_and_not_at_each_step(tmp_path: Path) -> None:
    folder = a_folder(tmp_path)
    seen: list[PromotionState | None] = []

    def make(request: Any, out: Path, work: Path, listener: Any) -> ArtifactReport:
        for step in range(3):
            listener.on_progress("merge", step / 10, f"step {step}")
            seen.append(folder.state())
        listener.on_progress("gate", 0.9, "almost")
        seen.append(folder.state())
        raise Refused("enough")

    Job(folder, make).run()
    states = [state for state in seen if state is not None]
    assert [state.message for state in states] == ["step 0", "step 0", "step 0", "almost"]
    assert [state.stage for state in states] == ["merge", "merge", "merge", "gate"]
    assert [state.status for state in states] == ["running"] * 4
    assert states[-1].fraction == pytest.approx(0.9 * 0.98)
    end = folder.state()
    assert end is not None
    assert (end.status, end.stage, end.message) == ("failed", "gate", "enough")
    assert end.finished == end.updated


def test_a_folder_without_a_promotion_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no promotion"):
        Job(JobFolder(tmp_path), promote.make)


def test_a_job_steps_aside(tmp_path: Path) -> None:
    code = (
        "import os\nfrom training.promotion_job import step_aside\nstep_aside()\nprint(os.nice(0))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root)
    assert done.stdout == "19\n", done.stderr


def test_the_exit_status_is_how_it_ended_and_the_process_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real chain, as far as it comes with a base that is not there."""
    monkeypatch.setattr(promote, "step_aside", lambda: None)
    folder = a_folder(tmp_path)
    assert promote.main([str(folder.path)]) == 1
    state, process = folder.state(), folder.process()
    assert state is not None
    assert process is not None
    assert (state.status, process.pid) == ("failed", os.getpid())
    assert "config.json" in state.message
