"""Several processes on one host that train one adapter, each on its share of every step's rows.

Only the adapter's gradients cross, once a step, so this is torch.distributed's all_reduce and
little else. accelerate would wrap the model for DistributedDataParallel, which sums gradients only
of calls through the wrapper; the loss here calls the decoder and the head apart, and weighs tokens
over all passes of a step. `accelerate launch` and `torchrun` both start runs: they set what `join`
reads.
"""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException, ProcessRaisedException, spawn

Work = Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Group:
    """The processes of a run. Every method but `share` is called by all of them together."""

    number: int = 0  # of this process; 0 alone writes and speaks
    size: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes and speaks."""
        return self.number == 0

    def share(self, rows: list[Any]) -> list[Any]:
        """This process's part of a step's rows; perhaps none."""
        return rows[self.number :: self.size]

    def agree(self, is_so: bool) -> bool:
        """Whether it is so in any process."""
        return self.sum([float(is_so)])[0] > 0

    def sum(self, figures: list[float]) -> list[float]:
        """The figures summed over all processes."""
        if self.size == 1:
            return figures
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        tensor = torch.tensor(figures, dtype=torch.float64, device=device)
        dist.all_reduce(tensor)
        return list(tensor.tolist())

    def sum_gradients(self, weights: Iterable[torch.nn.Parameter]) -> None:
        """Put the sum over all processes into every weight's gradient, which is there in each."""
        if self.size > 1:
            for weight in weights:
                dist.all_reduce(weight.grad)

    def leave(self) -> None:
        """Part from the others. NCCL waits for all of them here, and not for long."""
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


@contextlib.contextmanager
def join(num_processes: int = 1) -> Iterator[Group]:
    """The group of this process, if torchrun or `accelerate launch` started it; else of itself.

    Raises ValueError where `num_processes`, above 1, is not the number that they started.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Group()
        return
    if num_processes not in (1, size):
        raise ValueError(f"--num-processes is {num_processes}, but {size} have been started")
    if os.environ.get("LOCAL_WORLD_SIZE", str(size)) != str(size):
        raise ValueError("a run has all its processes on one host; start it on a single node")
    with _connected(int(os.environ["RANK"]), size, "env://") as group:
        yield group


def start(size: int, work: Work, *args: Any) -> None:
    """Call `work(group, *args)` in so many processes of this host and wait for all of them.

    Raises the first process's ValueError anew, with its own words; all others end then too.
    """
    has_gpu = torch.cuda.is_available()
    if has_gpu and size > torch.cuda.device_count():
        raise ValueError(
            f"{size} processes need as many GPUs; here are {torch.cuda.device_count()}"
        )
    complaints = multiprocessing.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "meeting").as_uri()
        try:
            spawn(_started, (size, meeting, complaints, work, args), nprocs=size)
        except (ProcessExitedException, ProcessRaisedException):
            if complaints.empty():
                raise
            raise ValueError(complaints.get()) from None


def _started(
    number: int, size: int, meeting: str, complaints: Any, work: Work, args: tuple[Any, ...]
) -> None:
    """What each process that `start` makes does."""
    torch.set_num_threads(max(1, torch.get_num_threads() // size))
    with _connected(number, size, meeting) as group:
        try:
            work(group, *args)
        except ValueError as error:
            complaints.put(str(error))  # before the others miss this process
            raise SystemExit(1) from None


@contextlib.contextmanager
def _connected(number: int, size: int, meeting: str) -> Iterator[Group]:
    """The group while its processes are connected; with GPUs each takes one."""
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "nccl"
        torch.cuda.set_device(number)
    dist.init_process_group(backend, init_method=meeting, rank=number, world_size=size)
    group = Group(number, size)
    yield group
    group.leave()  # not where one has failed: the others would not come to take leave of it
