"""A run's state on disk: whole or not there, whatever kills the process."""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

CHECKPOINTS = "checkpoints"  # the folder of them, in the run's
Tensors = dict[str, torch.Tensor]


@dataclass(slots=True)
class RunState:
    """Where a run stands after `step` optimizer steps, beside weights and optimizer."""

    step: int = 0
    micro_batch: int = 0  # rows of one process in a pass; halved where memory ran out
    loss_scale: float = 1.0  # of fp16, halved where gradients overflowed
    num_processes: int = 1
    best_loss: float | None = None
    best_step: int = 0
    num_worse: int = 0  # evaluations since the best one
    is_stopped: bool = False  # by too many of them
    history: list[dict[str, float]] = field(default_factory=list)  # a record for each step
    evaluations: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """One file: everything that a process needs to go on as if nothing had happened."""

    fingerprint: str  # of config and data; another run's checkpoint is refused
    state: RunState
    adapter: Tensors
    best: Tensors | None
    optimizer: dict[str, Any]


class CheckpointFolder:
    """Keeps the newest checkpoints of one run."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self._keep = folder, keep

    def files(self) -> list[Path]:
        """The checkpoints, oldest first."""
        return sorted(self.folder.glob("step-*.pt"))

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write beside its place, sync, rename, sync the folder; then remove what is too old."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"step-{checkpoint.state.step:08}.pt"
        scratch = path.with_suffix(".partial")
        for left in self.folder.glob("*.partial"):  # of a process that was killed
            left.unlink()
        content = {
            "fingerprint": checkpoint.fingerprint,
            "state": asdict(checkpoint.state),
            "adapter": checkpoint.adapter,
            "best": checkpoint.best,
            "optimizer": checkpoint.optimizer,
        }
        with scratch.open("wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        handle = os.open(self.folder, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)
        for old in self.files()[: -self._keep]:
            old.unlink()
        return path

    def load(self, fingerprint: str) -> Checkpoint | None:
        """The newest one; None where there is none. ValueError if it is of another run."""
        files = self.files()
        if not files:
            return None
        content = torch.load(files[-1], map_location="cpu", weights_only=True)
        if content["fingerprint"] != fingerprint:
            raise ValueError(
                f"{files[-1]} is of a run with other settings, data or base; go on with those, or "
                "train into another folder"
            )
        return Checkpoint(**{**content, "state": RunState(**content["state"])})
