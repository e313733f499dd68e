"""Promotions under kill -9, in a process that forks quickly: `python surviving.py WHAT FOLDER`."""

import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from adapters.artifacts import ArtifactStore
from adapters.promotions import JobFolder, job_folders, promotions_folder, sweep_promotions
from tests.server.promotion import stub_job
from tests.server.promotion.killing import count_touches, run_and_kill
from tests.server.promotion.requests import ADAPTER, a_request, check_done, check_whole
from training.promotion_job import Job


def start(store: Path) -> JobFolder:
    return JobFolder.create(store, a_request(store), {"rows": b"rows"})


def run(folder: JobFolder) -> None:
    Job(folder, stub_job.make).run()


def survive_kill(root: Path, at: int) -> None:
    """Kill a promotion at a point, look, start it anew, look."""
    store = root / f"store-{at}"
    store.mkdir()
    folder = start(store)
    ended = run_and_kill(lambda: run(folder), at)
    check_whole(store)
    assert (len(ArtifactStore(store).every()) == 1) or not ended
    assert run_and_kill(lambda: run(folder), None)
    check_done(store)
    shutil.rmtree(store)


def promotion(root: Path, num_kills: int | None) -> None:
    """Kill it at so many random points, or at every one there is."""
    (root / "counted").mkdir()
    folder = start(root / "counted")
    points = range(count_touches(lambda: run(folder)))
    assert len(points) > 40
    for at in points if num_kills is None else random.Random(5).sample(points, num_kills):
        survive_kill(root, at)


def survive(
    root: Path, prepare: Callable[[Path], object], act: Callable[[Path], object]
) -> list[Path]:
    """Kill `act` on a prepared store at every point; return the stores that are left."""
    (root / "counted").mkdir()
    prepare(root / "counted")
    stores = []
    for at in range(count_touches(lambda: act(root / "counted"))):
        store = root / str(at)
        store.mkdir()
        prepare(store)
        run_and_kill(lambda store=store: act(store), at)  # type: ignore[misc]
        stores.append(store)
    assert len(stores) > 3
    return stores


def beginning(root: Path) -> None:
    """A job takes the place of an ended one."""

    def begin_again(store: Path) -> None:
        JobFolder.create(store, a_request(store, job="job-2"), {"rows": b"rows"})

    for store in survive(root, lambda store: run(start(store)), begin_again):
        sweep_promotions(store)
        for folder in job_folders(store):
            request, state = folder.request(), folder.state()
            assert request is not None
            assert state is not None
            assert (request.job, state.status) in {("job-1", "done"), ("job-2", "waiting")}
        assert {path.name for path in promotions_folder(store).iterdir()} <= {ADAPTER, "queue"}


def deleting(root: Path) -> None:
    """An artifact goes."""

    def remove(store: Path) -> None:
        ArtifactStore(store).remove_of(ADAPTER)

    for store in survive(root, lambda store: run(start(store)), remove):
        check_whole(store)
        artifacts = ArtifactStore(store)
        num_left = len(artifacts.every())
        artifacts.sweep({ADAPTER})
        assert len(list(artifacts.folder.iterdir())) == num_left


if __name__ == "__main__":
    os.fsync = lambda fd: None  # kill -9 leaves the page cache as it is, and syncing takes seconds
    place = Path(sys.argv[2])
    {
        "twenty": lambda: promotion(place, 20),
        "all": lambda: promotion(place, None),
        "beginning": lambda: beginning(place),
        "deleting": lambda: deleting(place),
    }[sys.argv[1]]()
