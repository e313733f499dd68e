"""Jobs as processes: started, found again, gone on with, ended. Their stages are stubs."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from adapters.artifacts import ArtifactStore
from adapters.manifest import AdapterConflict, AdapterNotFound
from adapters.promotions import (
    JobFolder,
    Process,
    PromotionRequest,
    PromotionState,
    promotions_folder,
)
from server.promotion.jobs import MAX_ATTEMPTS, Jobs, describe
from tests.server.processes import is_alive
from tests.server.promotion.fakes import STUB_JOB, stub_jobs
from tests.server.promotion.requests import ADAPTER, LEFT, a_request, check_done

LIMIT_S = 30.0

# Starts a job, says its pid, and waits to be killed.
STARTER = """
import sys, time
from pathlib import Path
import msgspec
from adapters.promotions import PromotionRequest
from server.promotion.jobs import Jobs
jobs = Jobs(Path(sys.argv[1]), (sys.executable, sys.argv[2]))
request = msgspec.json.decode(sys.argv[3], type=PromotionRequest)
jobs.start(request)
print(jobs.process_id(request.adapter_digest), flush=True)
time.sleep(1000)
"""

Open = Callable[..., Jobs]


@pytest.fixture
def open_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Open:
    """Jobs of this test's store; keywords say what the stub does."""

    def open_it(**stub: Any) -> Jobs:
        return stub_jobs(tmp_path, monkeypatch, **stub)

    return open_it


def wait_for(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def ended(jobs: Jobs, digest: str = ADAPTER) -> PromotionState:
    wait_for(lambda: digest not in jobs.running())
    state = jobs.state(digest)
    assert state is not None
    return state


def in_stage(jobs: Jobs, stage: str) -> int:
    """Wait until the job is in the stage; return its pid."""

    def is_there() -> bool:
        state = jobs.state(ADAPTER)
        return state is not None and state.stage == stage and state.status == "running"

    wait_for(is_there)
    pid = jobs.process_id(ADAPTER)
    assert pid is not None
    return pid


def test_a_job_runs_to_its_end_and_its_process_is_gone(open_jobs: Open, tmp_path: Path) -> None:
    jobs = open_jobs()
    assert jobs.state(ADAPTER) is None
    assert jobs.running() == []
    started = jobs.start(a_request(tmp_path))
    assert (started.status, started.attempt) == ("waiting", 1)
    assert jobs.running() == [ADAPTER]
    assert ended(jobs).status == "done"
    check_done(tmp_path)
    wait_for(lambda: jobs.process_id(ADAPTER) is None)


def test_a_job_runs_in_a_process_group_of_its_own_and_steps_aside(
    open_jobs: Open, tmp_path: Path
) -> None:
    jobs = open_jobs(hang="merge")
    jobs.start(a_request(tmp_path, num_threads=3))
    pid = in_stage(jobs, "merge")
    assert os.getpgid(pid) == pid
    environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert b"OMP_NUM_THREADS=3" in environment
    assert b"CUDA_VISIBLE_DEVICES=" in environment  # no context on the GPU that serves
    jobs.cancel(ADAPTER)


def test_a_job_for_the_gpu_sees_it(open_jobs: Open, tmp_path: Path) -> None:
    jobs = open_jobs(hang="merge")
    jobs.start(a_request(tmp_path, device="cuda"))
    environment = Path(f"/proc/{in_stage(jobs, 'merge')}/environ").read_bytes()
    assert b"CUDA_VISIBLE_DEVICES=\0" not in environment
    jobs.cancel(ADAPTER)


def test_a_second_job_of_a_revision_is_refused_while_one_runs(
    open_jobs: Open, tmp_path: Path
) -> None:
    jobs = open_jobs(hang="quantize")
    jobs.start(a_request(tmp_path))
    pid = in_stage(jobs, "quantize")
    with pytest.raises(AdapterConflict, match=r"bot@1 is under way: running, quantize, 3\d%"):
        jobs.start(a_request(tmp_path, job="job-2"))
    assert jobs.process_id(ADAPTER) == pid
    jobs.cancel(ADAPTER)


def test_jobs_of_different_revisions_take_turns(open_jobs: Open, tmp_path: Path) -> None:
    jobs = open_jobs(hang="merge")
    jobs.start(a_request(tmp_path))
    in_stage(jobs, "merge")
    other = a_request(tmp_path, job="job-2", adapter_digest="c" * 64)
    open_jobs()  # the next one does not hang
    jobs.start(other)

    def says_why() -> bool:
        state = jobs.state("c" * 64)
        return state is not None and "another promotion" in state.message

    wait_for(says_why)
    assert sorted(jobs.running()) == [ADAPTER, "c" * 64]
    jobs.cancel(ADAPTER)
    assert ended(jobs, "c" * 64).status == "done"


def test_cancel_ends_the_process_and_deletes_what_it_left(open_jobs: Open, tmp_path: Path) -> None:
    jobs = open_jobs(hang="quantize")
    jobs.start(a_request(tmp_path), {"rows": b"rows", "eval_rows": b"held"})
    pid = in_stage(jobs, "quantize")
    folder = JobFolder.of(tmp_path, ADAPTER)
    assert (folder.path / "rows.jsonl").read_bytes() == b"rows"
    assert (folder.path / "eval_rows.jsonl").read_bytes() == b"held"
    kept = folder.request()
    assert kept is not None
    assert kept.rows == str(folder.path / "rows.jsonl")
    assert kept.eval_rows == str(folder.path / "eval_rows.jsonl")
    assert (folder.path / "work" / "merge").exists()
    state = jobs.cancel(ADAPTER)
    assert (state.status, state.message) == ("cancelled", "cancelled by an operator")
    assert not is_alive(pid)
    assert {path.name for path in folder.path.iterdir()} == LEFT
    assert ArtifactStore(tmp_path).every() == []
    with pytest.raises(AdapterNotFound, match="is under way"):
        jobs.cancel(ADAPTER)


def test_cancel_ends_a_job_that_does_not_listen_and_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has the lock open belongs to the job."""
    deaf = tmp_path / "deaf.sh"
    deaf.write_text("trap '' TERM\nsleep 1000 &\nwait\n")
    monkeypatch.setattr("server.promotion.jobs._TERM_S", 0.1)
    jobs = Jobs(tmp_path, ("sh", str(deaf)))
    jobs.start(a_request(tmp_path))
    pid = jobs.process_id(ADAPTER)
    assert pid is not None
    children = Path(f"/proc/{pid}/task/{pid}/children")
    wait_for(lambda: children.read_text().split())
    (child,) = map(int, children.read_text().split())
    jobs.cancel(ADAPTER)
    assert not is_alive(pid)
    assert not is_alive(child)


def test_cancel_takes_back_what_the_job_had_just_registered(
    open_jobs: Open, tmp_path: Path
) -> None:
    jobs = open_jobs(hang="gate")
    jobs.start(a_request(tmp_path))
    in_stage(jobs, "gate")
    made = tmp_path / "made"
    made.mkdir()
    (made / "config.json").write_text("{}")
    ArtifactStore(tmp_path).register(
        made,
        adapter_digest=ADAPTER,
        base_digest="b" * 64,
        revision="bot@1",
        job="job-1",
        settings={},
        report={},
    )
    jobs.cancel(ADAPTER)
    assert ArtifactStore(tmp_path).every() == []


def test_a_job_outlives_who_started_it_and_is_found_again(open_jobs: Open, tmp_path: Path) -> None:
    jobs = open_jobs(stage_s=0.3)
    request = msgspec.json.encode(a_request(tmp_path)).decode()
    starter = subprocess.Popen(
        [sys.executable, "-c", STARTER, str(tmp_path), str(STUB_JOB), request],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert starter.stdout is not None
    pid = int(starter.stdout.readline())
    starter.kill()
    starter.wait()
    starter.stdout.close()

    jobs.recover()

    assert jobs.running() == [ADAPTER]
    assert jobs.process_id(ADAPTER) == pid
    state = jobs.state(ADAPTER)
    assert state is not None
    assert state.attempt == 1
    with pytest.raises(AdapterConflict):
        jobs.start(a_request(tmp_path))
    assert ended(jobs).status == "done"
    check_done(tmp_path)


def kill_job(jobs: Jobs, stage: str) -> None:
    """Kill the job in a stage, as the machine's end would; nobody notices."""
    os.killpg(in_stage(jobs, stage), signal.SIGKILL)
    wait_for(lambda: not JobFolder.of(jobs._store, ADAPTER).is_running())


def test_a_job_that_died_with_the_server_goes_on_from_its_last_finished_stage(
    open_jobs: Open, tmp_path: Path
) -> None:
    jobs = open_jobs(hang="quantize")
    jobs.start(a_request(tmp_path))
    kill_job(jobs, "quantize")
    merged = promotions_folder(tmp_path) / ADAPTER / "work" / "merge"
    merged.write_text("made before")

    jobs = open_jobs()
    jobs.recover()

    state = ended(jobs)
    assert (state.status, state.attempt) == ("done", 2)
    check_done(tmp_path)
    (artifact,) = ArtifactStore(tmp_path).every()
    made = ArtifactStore(tmp_path).path(artifact.digest) / "merge.safetensors"
    assert made.read_text().startswith("made before")


def test_a_job_that_dies_again_and_again_is_given_up_and_cleaned_up(
    open_jobs: Open, tmp_path: Path
) -> None:
    jobs = open_jobs(hang="gate")
    jobs.start(a_request(tmp_path))
    for _ in range(MAX_ATTEMPTS - 1):
        kill_job(jobs, "gate")
        jobs = open_jobs(hang="gate")
        jobs.recover()
    kill_job(jobs, "gate")
    jobs = open_jobs(hang="gate")
    jobs.recover()
    state = jobs.state(ADAPTER)
    assert state is not None
    assert state.status == "failed"
    assert state.message.startswith("its process died 3 times: its process ended")
    assert not (promotions_folder(tmp_path) / ADAPTER / "work").exists()
    assert ArtifactStore(tmp_path).every() == []


def test_a_job_killed_beside_the_server_is_failed_with_the_signals_name(
    open_jobs: Open, tmp_path: Path
) -> None:
    jobs = open_jobs(hang="gate")
    jobs.start(a_request(tmp_path))
    os.killpg(in_stage(jobs, "gate"), signal.SIGKILL)
    state = ended(jobs)
    assert (state.status, state.message) == ("failed", "its process was killed by SIGKILL")
    assert state.finished is not None
    assert not (promotions_folder(tmp_path) / ADAPTER / "work").exists()


@pytest.mark.parametrize("is_new_server", [False, True])
def test_a_job_killed_before_it_could_say_what_it_registered_is_done(
    open_jobs: Open, tmp_path: Path, is_new_server: bool
) -> None:
    """What is registered is served, so nobody may be told that nothing was."""
    jobs = open_jobs()
    jobs.start(a_request(tmp_path))
    state = ended(jobs)
    folder = JobFolder.of(tmp_path, ADAPTER)
    wait_for(lambda: not folder.is_running())
    before = msgspec.structs.replace(
        state, status="running", fraction=0.98, finished=None, result={}, attempt=MAX_ATTEMPTS
    )
    folder.write_state(before)
    if is_new_server:
        jobs = open_jobs()
        jobs.recover()
    found = jobs.state(ADAPTER)
    assert found is not None
    assert (found.result, found.fraction, found.message) == (state.result, 1.0, "")
    check_done(tmp_path)


def test_a_job_that_cannot_start_is_failed_with_the_last_line_of_its_log(tmp_path: Path) -> None:
    jobs = Jobs(tmp_path, (sys.executable, "-c", "raise SystemError('no such luck')"))
    jobs.start(a_request(tmp_path))
    assert ended(jobs).message == (
        "its process ended with exit code 1; the last line of its log: SystemError: no such luck"
    )


def test_a_new_job_may_begin_as_soon_as_the_last_one_said_how_it_ended(
    open_jobs: Open, tmp_path: Path
) -> None:
    jobs = open_jobs()
    for number in range(3):
        jobs.start(a_request(tmp_path, job=f"job-{number}", seed=number))
        assert ended(jobs).status == "done"


def test_a_revision_that_is_gone_takes_its_job_along(open_jobs: Open, tmp_path: Path) -> None:
    jobs = open_jobs(hang="merge")
    jobs.start(a_request(tmp_path))
    pid = in_stage(jobs, "merge")
    jobs.forget(ADAPTER)
    assert not is_alive(pid)
    assert jobs.state(ADAPTER) is None
    jobs.forget(ADAPTER)


@pytest.mark.parametrize("file", ["request.json", "state.json"])
def test_folders_nobody_can_read_are_deleted_when_the_server_starts(
    open_jobs: Open, tmp_path: Path, file: str
) -> None:
    folder = JobFolder.create(tmp_path, a_request(tmp_path), {})
    (folder.path / file).write_text("{")
    (promotions_folder(tmp_path) / ".new-1").mkdir()
    (promotions_folder(tmp_path) / ".not-ours").touch()
    open_jobs().recover()
    assert list(promotions_folder(tmp_path).iterdir()) == []


def test_a_store_that_was_moved_takes_no_job_of_its_old_place_on(
    open_jobs: Open, tmp_path: Path
) -> None:
    JobFolder.create(tmp_path, a_request(tmp_path / "elsewhere"), {})
    jobs = open_jobs()
    jobs.recover()
    assert jobs.running() == []


def test_what_an_ended_job_left_is_deleted_when_the_server_starts(
    open_jobs: Open, tmp_path: Path
) -> None:
    jobs = open_jobs()
    jobs.start(a_request(tmp_path))
    ended(jobs)
    wait_for(lambda: jobs.process_id(ADAPTER) is None)
    left = promotions_folder(tmp_path) / ADAPTER / "work" / ".merged-x"
    left.mkdir(parents=True)
    jobs.recover()
    assert not left.parent.exists()
    state = jobs.state(ADAPTER)
    assert state is not None
    assert state.status == "done"


def test_two_that_look_at_an_ended_job_at_once_both_get_its_state(
    open_jobs: Open, tmp_path: Path
) -> None:
    jobs = open_jobs()
    jobs.start(a_request(tmp_path))
    os.waitpid(jobs._children[ADAPTER], 0)  # as the other one does between our look and our wait
    for _ in range(2):
        state = jobs.state(ADAPTER)
        assert state is not None
        assert state.status == "done"
    assert jobs._children == {}


def test_a_process_is_not_mistaken_for_a_later_one_with_its_pid() -> None:
    me = Process.of(os.getpid())
    assert me is not None
    assert me.is_alive
    assert not Process(me.pid, me.began + "1").is_alive
    child = subprocess.Popen(["true"])
    wait_for(lambda: Process.of(child.pid) is None)  # ended, and not waited for
    child.wait()


def test_a_state_is_said_in_a_few_words() -> None:
    state = PromotionState(status="running", started=0.0, updated=0.0, fraction=0.5)
    assert describe(state) == "running, 50%"
    state = msgspec.structs.replace(state, stage="gate", message="row 3")
    assert describe(state) == "running, gate, 50% (row 3)"


def test_settings_are_what_changes_the_artifact() -> None:
    request = a_request(Path("/store"))
    assert request.settings == a_request(Path("/store"), device="cuda", num_threads=4).settings
    changed: dict[str, Any] = {
        "seed": 1,
        "gate": {"x": 1.0},
        "text_sha256": "t",
        "rows_sha256": "r",
    }
    for name, value in changed.items():
        other = msgspec.structs.replace(request, **{name: value})
        assert isinstance(other, PromotionRequest)
        assert other.settings != request.settings
