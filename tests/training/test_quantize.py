"""What quantizing writes, and that an interrupted run goes on and never looks finished."""

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers
from safetensors.torch import load_file, save_file

from server.base_digest import base_digest
from tests.training import packing_by_hand
from training import quantize as quantize_module
from training.calibration import CalibrationOptions, load_calibration
from training.folder_lock import locked
from training.quantize import QuantizeOptions, quantize
from training.quantize_run import Event, WorkerFailed

cached_calibration = functools.cache(load_calibration)  # reading a tokenizer takes its time
Run = Callable[..., dict[str, Any]]


class Worker:
    """The stand-in, its jobs written down; fails as often as it is told to."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.went_on: list[bool] = []
        self.failures = 0
        self.look: Callable[[], None] = lambda: None

    def __call__(
        self,
        python: Path,
        job: dict[str, Any],
        folder: Path,
        on_event: Callable[[Event], None],
    ) -> list[Event]:
        self.jobs.append(job)
        kept = Path(job["checkpoints"])
        self.went_on.append(kept.exists())
        kept.mkdir(exist_ok=True)
        self.look()
        if self.failures:
            self.failures -= 1
            raise WorkerFailed("not today")
        return packing_by_hand.worker(python, job, folder, on_event)


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    made = Worker()
    monkeypatch.setattr(quantize_module, "run_worker", made)
    monkeypatch.setattr(quantize_module, "find_python", lambda wanted, kind: Path("python"))
    monkeypatch.setattr(quantize_module, "load_calibration", cached_calibration)
    return made


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Alone in a folder, so that what is left over would be seen."""
    return tmp_path / "outputs" / "quantized"


@pytest.fixture
def run(worker: Worker, chat_base: Path, rows_file: Path, out: Path) -> Run:
    """Quantize `chat_base` to `out`; keywords are options, `rows_seed` the calibration's."""

    def run_it(rows_seed: int = 0, **changes: Any) -> dict[str, Any]:
        options: dict[str, Any] = {
            "model": chat_base,
            "out": out,
            "calibration": CalibrationOptions(rows=rows_file, seed=rows_seed),
        }
        options |= changes
        return quantize(QuantizeOptions(**options), base_digest(options["model"]))

    return run_it


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_the_folder_is_the_models_own_with_packed_weights(
    run: Run, chat_base: Path, out: Path
) -> None:
    run()
    assert names(out.parent) == {"quantized"}
    assert names(out) == {
        *("config.json", "quantize_config.json", "model.safetensors", "turnout.json"),
        *("generation_config.json", "tokenizer.json", "tokenizer_config.json"),
    }
    config = json.loads((out / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == json.loads((chat_base / "config.json").read_text())
    assert settings == json.loads((out / "quantize_config.json").read_text())
    assert settings["meta"] == {"damp_percent": 0.05}, "no path of this machine"
    assert (settings["quant_method"], settings["bits"], settings["group_size"]) == ("gptq", 4, 64)
    weights = load_file(out / "model.safetensors")
    assert "model.layers.0.mlp.up_proj.qweight" in weights
    assert transformers.AutoConfig.from_pretrained(out).model_type == "mistral"


def test_the_provenance_says_what_was_quantized_on_what(
    run: Run, chat_base: Path, out: Path
) -> None:
    returned = run()
    found = json.loads((out / "turnout.json").read_text())
    assert found == returned
    assert found["kind"] == "gptq"
    assert found["source"] == {"digest": base_digest(chat_base), "provenance": None}
    assert (found["group_size"], found["desc_act"], found["seed"]) == (64, False, 0)
    assert found["calibration"]["num_tokens"] > 100
    assert found["calibration"]["num_held_out"] == 2
    assert found["versions"]["gptqmodel"] == "by hand"
    assert found["layers"][1] == {"layer": 1, "errors": {"mlp.up_proj": 0.5}}
    assert 0.01 < found["weight_error"]["mean"] < 0.2


def test_the_quantizer_sees_a_llama_and_no_row_that_is_held_out(
    run: Run, worker: Worker, chat_base: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    windowed = tmp_path / "windowed"
    shutil.copytree(chat_base, windowed)
    config = json.loads((windowed / "config.json").read_text())
    (windowed / "config.json").write_text(json.dumps(config | {"sliding_window": 9}))
    seen: dict[str, Any] = {}

    def look(python: Path, job: dict[str, Any], *rest: Any) -> list[Event]:
        source = Path(job["model"])
        seen.update(json.loads((source / "config.json").read_text()))
        assert not any(path.is_symlink() for path in source.iterdir()), "GPTQModel refuses those"
        return worker(python, job, *rest)

    monkeypatch.setattr(quantize_module, "run_worker", look)
    run(model=windowed)
    assert seen["model_type"] == "llama"
    assert seen["architectures"] == ["LlamaForCausalLM"]
    assert "sliding_window" not in seen
    (job,) = worker.jobs
    assert max(len(sample) for sample in job["samples"]) == 9, "a llama has no window"
    assert sum(map(len, job["samples"])) > 100
    assert (job["group_size"], job["num_layers"], job["desc_act"]) == (64, 2, False)


def test_an_interrupted_run_leaves_nothing_at_its_place_and_goes_on(
    run: Run, worker: Worker, out: Path
) -> None:
    worker.failures = 1
    with pytest.raises(WorkerFailed, match="not today"):
        run()
    assert names(out.parent) == {".quantized-unfinished"}
    run()
    assert worker.went_on == [False, True]
    assert names(out.parent) == {"quantized"}


def test_runs_that_are_killed_again_and_again_do_not_fill_the_disk(
    run: Run, worker: Worker, out: Path
) -> None:
    """Each one of GPTQModel's leaves all that it packed, beside what the next one goes on from."""
    worker.failures = 1
    with pytest.raises(WorkerFailed):
        run()
    kept = Path(worker.jobs[0]["checkpoints"])
    (kept / "attempt-1").mkdir()
    (kept / "CURRENT").write_text("layer 4")
    worker.failures = 2
    seen: list[set[str]] = []
    worker.look = lambda: seen.append(names(kept))
    with pytest.raises(WorkerFailed):
        run()
    assert seen == [{"CURRENT"}, set()]


def test_a_run_that_cannot_go_on_starts_over_once(run: Run, worker: Worker, out: Path) -> None:
    worker.failures = 2
    with pytest.raises(WorkerFailed):
        run()
    run()
    assert worker.went_on == [False, True, False]
    worker.failures = 1
    shutil.rmtree(out)
    with pytest.raises(WorkerFailed):
        run()
    assert worker.went_on == [False, True, False, False], "a first run is not tried twice"


def test_another_run_does_not_go_on_after_it(run: Run, worker: Worker) -> None:
    for changes in (
        {"rows_seed": 1},
        {"group_size": 32},
        {"desc_act": True},
        {"backend": "auto-round"},
        {},
    ):
        worker.failures = 1
        with pytest.raises(WorkerFailed):
            run(**changes)
    assert worker.went_on == [False] * 5


def test_a_finished_run_is_recognised(run: Run, worker: Worker, out: Path) -> None:
    first = run()
    assert run() == first
    assert len(worker.jobs) == 1
    with pytest.raises(ValueError, match="which exists"):
        run(rows_seed=1)
    (out / "turnout.json").unlink()
    with pytest.raises(ValueError, match="which exists"):
        run()


def test_what_a_run_killed_at_its_very_end_left_is_removed(
    run: Run, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def kill(folder: Path) -> None:
        if out.exists():
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(quantize_module, "sync_folder", kill)
        with pytest.raises(Killed):
            run()
    assert names(out.parent) == {"quantized", ".quantized-unfinished"}
    run()
    assert names(out.parent) == {"quantized"}


def test_two_processes_do_not_share_an_unfinished_run(run: Run, worker: Worker, out: Path) -> None:
    worker.failures = 1
    with pytest.raises(WorkerFailed):
        run()
    with (
        locked(out.parent / ".quantized-unfinished"),
        pytest.raises(ValueError, match="another process is at work"),
    ):
        run()
    run()


def test_weights_that_are_not_the_models_are_never_published(
    run: Run, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(python: Path, job: dict[str, Any], *rest: Any) -> list[Event]:
        events = packing_by_hand.worker(python, job, *rest)
        file = Path(job["out"]) / "model.safetensors"
        weights = load_file(file)
        weights["model.layers.1.mlp.up_proj.qweight"].bitwise_not_()
        save_file(weights, file)
        return events

    monkeypatch.setattr(quantize_module, "run_worker", spoil)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj is .* of its norm away"):
        run()
    assert not out.exists()


def test_errors_are_in_order_whichever_thread_was_first(
    run: Run, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"layer": layer, "linear": linear, "error": 0.5, "seconds": 0.1}
        for layer, linear in ((1, "c"), (0, "b"), (1, "a"), (0, "a"), (0, "c"))
    ]

    def worker(*args: Any) -> list[Event]:
        started, _, done = packing_by_hand.worker(*args)
        return [started, {"event": "errors", "rows": rows}, done]

    monkeypatch.setattr(quantize_module, "run_worker", worker)
    assert [(each["layer"], list(each["errors"])) for each in run()["layers"]] == [
        (0, ["a", "b", "c"]),
        (1, ["a", "c"]),
    ]


def test_layers_are_told_as_they_are_done(
    worker: Worker, chat_base: Path, rows_file: Path, out: Path
) -> None:
    options = QuantizeOptions(
        model=chat_base, out=out, calibration=CalibrationOptions(rows=rows_file)
    )
    told: list[tuple[int, int]] = []
    quantize(options, "digest", lambda done, of: told.append((done, of)))
    assert told == [(1, 2), (2, 2)]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kind": "exl2"}, "--format is 'exl2'"),
        ({"kind": "awq", "desc_act": True}, "--desc-act is GPTQ's own"),
        ({"backend": "auto-round", "desc_act": True}, "--desc-act is GPTQ's own"),
        ({"iterations": 0}, "--iterations is 0"),
        ({"device": "tpu"}, "--device is 'tpu'"),
        ({"backend": "auto-gptq"}, "no longer imports"),
        ({"model": Path("gone")}, "--model is 'gone'"),
        ({"out": Path(__file__).parent}, "which exists; name a new folder"),
    ],
)
def test_what_does_not_apply_is_refused(
    changes: dict[str, Any], complaint: str, chat_base: Path, rows_file: Path, out: Path
) -> None:
    options: dict[str, Any] = {
        "model": chat_base,
        "out": out,
        "calibration": CalibrationOptions(rows=rows_file),
    }
    with pytest.raises(ValueError, match=complaint):
        QuantizeOptions(**(options | changes))


def test_the_group_size_is_checked_before_anything_is_written(
    run: Run, worker: Worker, out: Path
) -> None:
    with pytest.raises(ValueError, match="what fits is 64 or 32"):
        run(group_size=128)
    assert not worker.jobs
    assert not out.parent.exists()


def test_a_model_whose_files_are_links_is_taken_as_files(
    run: Run, worker: Worker, chat_base: Path, tmp_path: Path
) -> None:
    """As the hub's cache keeps them: relative links, which lead nowhere from another folder."""
    shutil.copytree(chat_base, tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for path in chat_base.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(Path("..") / "blobs" / path.name)
    seen: list[bool] = []

    def look() -> None:
        source = Path(worker.jobs[-1]["model"])
        seen.extend(path.is_file() and not path.is_symlink() for path in source.iterdir())

    worker.look = look
    run(model=tmp_path / "snapshot")
    assert seen
    assert all(seen)


def test_a_file_system_without_links_gets_copies(
    run: Run, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(source: Path, new: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    expected = run(out=out.with_name("linked"))
    monkeypatch.setattr("training.quantize.os.link", refuse)
    assert run() == expected
