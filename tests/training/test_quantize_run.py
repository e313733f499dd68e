"""The quantizer's process: what it says, why it ended, and that it never outlives who began it."""

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from adapters.promotions import JobFolder
from training import quantize_run
from training.quantize_run import Event, WorkerFailed, choose_backend, find_python, run_worker

PYTHON = Path(sys.executable)
# GPTQModel and what it is asked for, as far as the worker knows it.
STUB = {
    "gptqmodel/__init__.py": """
import json, os, sys, pathlib
assert os.environ["GPTQMODEL_CPU_WORKERS"] == "2"
print("a banner")
class GPTQModel:
    @staticmethod
    def load(path, config, device):
        return Model(path, config, device)
class Model:
    def __init__(self, *parts):
        self.parts = parts
    def quantize(self, samples, **options):
        kept = options["checkpoint"]
        self.said = [self.parts[0], self.parts[1].fields, self.parts[2], samples,
                     kept.path, kept.interval]
        for layer in (0, 2, 1):  # threads tell of them
            self.layer_callback.layer_complete(layer_idx=layer, submodule_finalized=False)
            self.layer_callback.layer_complete(layer_idx=layer, submodule_finalized=True)
        row = {"layer": 1, "module": "mlp.up_proj", "loss": "0.25", "time": "1.5"}
        return {"gptq": [row, row | {"layer": 0, "loss": "fallback(rtn)", "time": ""}]}
    def save(self, path):
        pathlib.Path(path).write_text(json.dumps(self.said))
""",
    "gptqmodel/quantization/__init__.py": "",
    "gptqmodel/quantization/config.py": """
class GPTQConfig:
    def __init__(self, **fields):
        self.fields = fields
""",
    "gptqmodel/looper/__init__.py": "",
    "gptqmodel/looper/checkpoint_store.py": """
class CheckpointConfig:
    def __init__(self, path, interval):
        self.path, self.interval = path, interval
""",
}


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file to fill with what the worker does; `say` is there."""
    path = tmp_path / "worker.py"
    monkeypatch.setattr(quantize_run, "WORKER", path)
    return path


def run(folder: Path, job: dict[str, Any] | None = None) -> list[Event]:
    seen: list[Event] = []
    events = run_worker(PYTHON, {"backend": "gptqmodel", **(job or {})}, folder, seen.append)
    assert events == seen
    return events


@pytest.mark.parametrize(
    ("device", "packs_on", "interval"), [("cpu", "original", "layer:1"), ("cuda", "gpu", "layer:4")]
)
def test_the_worker_drives_gptqmodel_and_tells_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, packs_on: str, interval: str
) -> None:
    for name, source in STUB.items():
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    job = {
        "model": "source",
        "out": str(tmp_path / "made"),
        "checkpoints": "kept",
        "num_layers": 3,
        "group_size": 64,
        "desc_act": False,
        "device": device,
        "batch_size": 4,
        "samples": [[5, 6]],
    }

    events = run(tmp_path, job)

    assert [event["event"] for event in events] == ["started", "layer", "layer", "errors", "done"]
    assert events[0]["versions"]["torch"]
    assert [(event["done"], event["of"]) for event in events[1:3]] == [(1, 3), (3, 3)]
    assert events[3]["rows"] == [
        {"layer": 1, "linear": "mlp.up_proj", "error": 0.25, "seconds": 1.5},
        {"layer": 0, "linear": "mlp.up_proj", "error": None, "seconds": 0.0},
    ]
    model, config, *said, samples, kept, every = json.loads((tmp_path / "made").read_text())
    assert (model, said, kept, every) == ("source", [device], "kept", interval)
    assert samples == [{"input_ids": [5, 6], "attention_mask": [1, 1]}]
    assert config.items() >= {"bits": 4, "group_size": 64, "sym": True, "desc_act": False}.items()
    assert config["pack_impl"] == packs_on
    assert "a banner" in (tmp_path / "worker.log").read_text()


def test_a_worker_that_fails_says_why(worker: Path, tmp_path: Path) -> None:
    worker.write_text("raise RuntimeError('out of luck')")
    with pytest.raises(WorkerFailed, match=r"\(gptqmodel\) ended early: RuntimeError: out of luck"):
        run(tmp_path)


def test_a_worker_that_ends_without_a_word_has_failed_too(worker: Path, tmp_path: Path) -> None:
    worker.write_text("""print('{"event": "layer", "done": 1, "of": 2}')""")
    with pytest.raises(WorkerFailed, match="it said nothing"):
        run(tmp_path)


def test_an_interpreter_without_the_package_is_named(worker: Path, tmp_path: Path) -> None:
    worker.write_text("""raise ImportError("No module named 'gptqmodel'")""")
    with pytest.raises(WorkerFailed, match=r"has no gptqmodel; `make quantizer` makes"):
        run(tmp_path)


def test_what_a_listener_raises_ends_the_worker(worker: Path, tmp_path: Path) -> None:
    worker.write_text(
        "import os, time\n"
        """print('{"event": "started", "pid": %d}' % os.getpid(), flush=True)\n"""
        "time.sleep(600)"
    )
    pids = []

    def stop(event: Event) -> None:
        pids.append(event["pid"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_worker(PYTHON, {"backend": "gptqmodel"}, tmp_path, stop)
    assert not is_alive(pids[0])


def test_the_worker_ends_when_who_began_it_is_killed(tmp_path: Path) -> None:
    (tmp_path / "gptqmodel.py").write_text(
        "import os, pathlib, time\n"
        f"part = pathlib.Path({str(tmp_path / 'part')!r})\n"
        "part.write_text(str(os.getpid()))\n"
        f"part.rename({str(tmp_path / 'pid')!r})\n"
        "time.sleep(600)\n"
    )
    script = (
        "import pathlib, sys\n"
        "from training.quantize_run import run_worker\n"
        "job = {'backend': 'gptqmodel', 'device': 'cpu'}\n"
        "run_worker(pathlib.Path(sys.executable), job, pathlib.Path(sys.argv[1]), print)\n"
    )
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}:{quantize_run.ROOT}"}
    with subprocess.Popen([PYTHON, "-c", script, tmp_path], env=env) as parent:
        while not (tmp_path / "pid").exists():
            assert parent.poll() is None
            time.sleep(0.02)
        parent.kill()
    pid = int((tmp_path / "pid").read_text())
    while is_alive(pid):  # the test's own time limit bounds it
        time.sleep(0.02)


def test_the_worker_keeps_a_promotions_lock_as_long_as_it_lives(
    worker: Path, tmp_path: Path
) -> None:
    """Or a promotion that was cancelled would begin anew in a folder that is still written to."""
    worker.write_text(
        "import fcntl, json, pathlib, sys\n"
        "job = json.loads(pathlib.Path(sys.argv[1]).read_text())\n"
        "fcntl.flock(job['lock'], fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        """print('{"event": "done"}')"""
    )
    folder = JobFolder(tmp_path)
    lock = folder.take_lock()
    assert lock is not None
    os.set_inheritable(lock, True)  # as a job's process has it
    run(tmp_path, {"lock": lock})
    os.close(lock)
    assert not folder.is_running()


def is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def test_the_environment_of_its_own_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tool = tmp_path / "python"
    monkeypatch.setattr(quantize_run, "TOOL", tool)
    with pytest.raises(ValueError, match=r"gptqmodel is not installed: `make quantizer`"):
        find_python(None, "gptqmodel")
    monkeypatch.setitem(quantize_run.PACKAGES, "gptqmodel", "json")
    assert find_python(None, "gptqmodel") == PYTHON
    tool.touch()
    assert find_python(None, "gptqmodel") == tool
    assert find_python(PYTHON, "gptqmodel") == PYTHON
    with pytest.raises(ValueError, match="must be a Python interpreter"):
        find_python(tmp_path / "none", "gptqmodel")


def test_auto_gptq_explains_itself() -> None:
    with pytest.raises(ValueError, match=r"no longer imports .*--backend gptqmodel"):
        choose_backend("auto-gptq", "gptq")


def test_each_kind_of_file_has_its_writers() -> None:
    assert choose_backend("auto", "gptq") == choose_backend("gptqmodel", "gptq") == "gptqmodel"
    assert choose_backend("auto-round", "gptq") == "auto-round"
    assert choose_backend("auto", "awq") == choose_backend("auto-round", "awq") == "auto-round"
    with pytest.raises(ValueError, match=r"awq is written by auto-round$"):
        choose_backend("gptqmodel", "awq")
    with pytest.raises(ValueError, match=r"gptq is written by gptqmodel or auto-round$"):
        choose_backend("llm-compressor", "gptq")
