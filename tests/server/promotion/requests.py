"""A request to promote, and what a store must look like after it."""

from pathlib import Path

import msgspec

from adapters.artifacts import ArtifactStore
from adapters.promotions import PromotionRequest, job_folders

ADAPTER = "a" * 64
LEFT = {"request.json", "state.json", "lock", "log.txt"}  # of a job that has ended


def a_request(store: Path, **changes: object) -> PromotionRequest:
    request = PromotionRequest(
        job="job-1",
        adapter_digest=ADAPTER,
        revision="bot@1",
        store=str(store),
        base="/base",
        base_name="base",
        base_digest="b" * 64,
    )
    return msgspec.structs.replace(request, **changes)


def check_whole(store: Path) -> None:
    """Whatever is found is whole; a fresh look at the disk, as a server that starts takes it."""
    artifacts = ArtifactStore(store)
    for artifact in artifacts.every():
        assert artifacts.is_whole(artifact.digest)
        assert artifact.files.keys() == {
            "config.json",
            "gate.safetensors",
            "merge.safetensors",
            "quantize.safetensors",
        }
        assert artifacts.find(ADAPTER) == artifact


def check_done(store: Path) -> None:
    """One artifact is registered, the job says so, and nothing else is left."""
    check_whole(store)
    (artifact,) = ArtifactStore(store).every()
    (folder,) = job_folders(store)
    state = folder.state()
    assert state is not None
    assert (state.status, state.result["artifact"]) == ("done", artifact.digest)
    assert {path.name for path in folder.path.iterdir()} <= LEFT
    assert [path.name for path in (store / "artifacts").iterdir()] == [artifact.digest]
