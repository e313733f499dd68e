"""A merged path that the test directs, and jobs whose stages are stubs."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from server.errors import WeightSetRefused
from server.promotion.jobs import Jobs

STUB_JOB = Path(__file__).parent / "stub_job.py"


def stub_jobs(store: Path, monkeypatch: pytest.MonkeyPatch, **stub: Any) -> Jobs:
    """Jobs of the store that run `stub_job.py`; keywords are what $STUB says."""
    monkeypatch.setenv("STUB", json.dumps(stub))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    return Jobs(store, (sys.executable, str(STUB_JOB)))


class FakeMerged:
    """Remembers what it was asked, and refuses with `refusal`."""

    def __init__(self) -> None:
        self.routes: dict[str, str] = {}
        self.loads: list[tuple[str, str, Path]] = []
        self.unloads: list[str] = []
        self.refusal: str | None = None
        self.has_streams = False  # that run on what is to leave

    async def load(self, adapter_digest: str, artifact_digest: str, folder: Path) -> None:
        if self.refusal is not None:
            raise WeightSetRefused(self.refusal)
        assert (folder / "config.json").is_file()
        self.loads.append((adapter_digest, artifact_digest, folder))
        self.routes[adapter_digest] = artifact_digest

    async def unload(self, adapter_digest: str) -> None:
        self.unloads.append(adapter_digest)
        self.routes.pop(adapter_digest, None)
        while self.has_streams:
            await asyncio.sleep(0.005)

    def route(self, adapter_digest: str) -> str | None:
        return self.routes.get(adapter_digest)
