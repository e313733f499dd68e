"""A promotion under kill -9: nothing half-registered is ever there, and it goes on or is gone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from adapters.artifacts import ArtifactStore
from adapters.promotions import JobFolder
from tests.server.promotion import stub_job
from tests.server.promotion.requests import a_request
from training.promotion_job import Job

ROOT = Path(__file__).parents[3]


def survives(what: str, place: Path) -> None:
    """See surviving.py."""
    script = str(Path(__file__).with_name("surviving.py"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, script, what, str(place)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_killed_at_twenty_points_all_or_nothing_is_registered_and_it_goes_on(
    tmp_path: Path,
) -> None:
    survives("twenty", tmp_path)


@pytest.mark.slow
def test_killed_at_every_point_all_or_nothing_is_registered_and_it_goes_on(tmp_path: Path) -> None:
    survives("all", tmp_path)


def test_a_job_is_begun_whole_or_not_at_all(tmp_path: Path) -> None:
    survives("beginning", tmp_path)


def test_an_artifact_is_deleted_whole(tmp_path: Path) -> None:
    survives("deleting", tmp_path)


def test_a_stage_that_was_finished_is_not_done_again(tmp_path: Path) -> None:
    folder = JobFolder.create(tmp_path, a_request(tmp_path), {})
    (folder.path / "work").mkdir()
    (folder.path / "work" / "merge").write_text("what the first try made")
    Job(folder, stub_job.make).run()
    (artifact,) = ArtifactStore(tmp_path).every()
    made = ArtifactStore(tmp_path).path(artifact.digest) / "merge.safetensors"
    assert made.read_text().startswith("what the first try made")
