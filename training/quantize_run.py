"""Starts training/quantize_worker.py in the interpreter that has the quantizer, and follows it."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
TOOL = ROOT / ".turnout" / "tools" / "quantizer" / "bin" / "python"  # `make quantizer` makes it
WORKER = Path(__file__).with_name("quantize_worker.py")
PACKAGES = {"gptqmodel": "gptqmodel", "auto-round": "auto_round"}  # by backend
_WRITERS = {"gptq": ("gptqmodel", "auto-round"), "awq": ("auto-round",)}  # the default first
AUTO_GPTQ = (
    "--backend auto-gptq: AutoGPTQ's last release (0.7.1, 2024) no longer imports under today's "
    "transformers (no_init_weights is gone). GPTQModel is its successor and writes the same files: "
    "--backend gptqmodel"
)
_LOG_TAIL = 4000  # characters of the worker's log that are looked at for the reason it ended

Event = dict[str, Any]


class WorkerFailed(ValueError):
    """The quantizer ended without a result."""


def find_python(wanted: Path | None, backend: str) -> Path:
    """The interpreter that has the backend's package. ValueError says how to get one."""
    package = PACKAGES[backend]
    if wanted is not None:
        if not os.access(wanted, os.X_OK):
            raise ValueError(f"--quantizer is {str(wanted)!r}; it must be a Python interpreter")
        return wanted
    if TOOL.exists():
        return TOOL
    if importlib.util.find_spec(package) is not None:
        return Path(sys.executable)
    raise ValueError(
        f"{package} is not installed: `make quantizer` installs it beside Turnout, in an "
        "environment of its own (its numpy is another one); or name the interpreter that has it "
        "with --quantizer"
    )


def choose_backend(backend: str, kind: str) -> str:
    """Return what writes this kind of file. ValueError for a backend that does not."""
    if backend == "auto-gptq":
        raise ValueError(AUTO_GPTQ)
    writers = _WRITERS[kind]
    if backend not in ("auto", *writers):
        raise ValueError(f"--backend is {backend!r}; {kind} is written by {' or '.join(writers)}")
    return writers[0] if backend == "auto" else backend


def run_worker(
    python: Path, job: dict[str, Any], folder: Path, on_event: Callable[[Event], None]
) -> list[Event]:
    """Do the job in a process that ends with this one; return all it said.

    `folder` gets job.json and worker.log. Raises WorkerFailed with the log's last words.
    """
    job_file, log_file = folder / "job.json", folder / "worker.log"
    job_file.write_text(json.dumps(job), encoding="utf-8")
    events: list[Event] = []
    with (
        log_file.open("ab") as log,
        subprocess.Popen(
            [python.absolute(), "-P", WORKER, job_file.absolute()],
            cwd=folder,  # GPTQModel leaves a folder of logs where it is
            stdin=subprocess.PIPE,  # its end is what tells the worker that we are gone
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,  # Ctrl-C is for this process, which then lets go of stdin
            close_fds=False,  # a promotion's lock is held until the worker, too, has ended
            text=True,
        ) as worker,
    ):
        assert worker.stdout is not None
        try:
            for line in worker.stdout:
                events.append(json.loads(line))
                on_event(events[-1])
        finally:
            if not events or events[-1]["event"] != "done":
                worker.kill()
    if not events or events[-1]["event"] != "done":
        raise WorkerFailed(_reason(log_file, python, job["backend"]))
    return events


def _reason(log_file: Path, python: Path, backend: str) -> str:
    """Why the worker ended: the exception at the end of its log."""
    tail = log_file.read_text(encoding="utf-8", errors="replace")[-_LOG_TAIL:]
    lines = [line.strip() for line in tail.splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    package = PACKAGES[backend]
    if f"No module named '{package}'" in last:
        return f"{python} has no {package}; `make quantizer` makes an environment that has it"
    return f"the quantizer ({package}) ended early: {last}"
