"""Curves handed to TensorBoard, W&B and MLflow, or to what stands for them here."""

import sys
from collections import defaultdict
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests.training.conftest import MakeConfig
from tests.training.test_run import finish
from training import run
from training.checkpoint import RunState
from training.tracking import WRITERS, Tracking, chosen

Figures = dict[int, dict[str, float]]
Install = Callable[..., None]
STEP_NAMES = {f"train/{n}" for n in ("loss", "learning_rate", "grad_norm", "tokens_per_second")}
EVALUATION_NAMES = {"eval/loss", "eval/perplexity"}


def state(num_steps: int) -> RunState:
    """A run evaluated before its first step and after every second."""
    record = {"learning_rate": 1e-3, "grad_norm": 0.5, "tokens": 100, "seconds": 0.25}
    steps = range(1, num_steps + 1)
    return RunState(
        step=num_steps,
        history=[{**record, "step": step, "loss": 1 / step} for step in steps],
        evaluations=[
            {"step": step, "loss": 2.0, "perplexity": 7.4} for step in range(0, num_steps + 1, 2)
        ],
    )


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Install:
    """Return a function that puts a module of our own in a library's place; or nothing there."""

    def put(name: str, *, is_there: bool = True, **content: Any) -> None:
        module = ModuleType(name)
        module.__spec__ = ModuleSpec(name, None)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module if is_there else None)

    return put


@pytest.fixture
def tensorboard(install: Install) -> list[Any]:
    """A TensorBoard that keeps what it is given: its writers."""
    writers: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            self.folder, self.figures, self.is_closed = folder, defaultdict[int, Any](dict), False
            writers.append(self)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            assert name not in self.figures[step], "told twice"
            self.figures[step][name] = value

        def close(self) -> None:
            self.is_closed = True

    install("tensorboard")
    install("torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    return writers


def test_every_step_and_evaluation_is_told_once(make: MakeConfig, tensorboard: list[Any]) -> None:
    config = make(report_to="tensorboard")
    with Tracking(config, chosen(config)) as tracking:
        for step in (1, 2, 3):
            tracking.update(state(step))
        tracking.update(state(3))
        tracking.log({"eval/ROUGE-L": 0.5}, 3)
    (writer,) = tensorboard
    assert writer.is_closed
    assert writer.folder == str(config.out / "tensorboard")
    assert {step: set(found) for step, found in writer.figures.items()} == {
        0: EVALUATION_NAMES,
        1: STEP_NAMES,
        2: STEP_NAMES | EVALUATION_NAMES,
        3: STEP_NAMES | {"eval/ROUGE-L"},
    }
    assert writer.figures[2]["train/loss"] == 0.5
    assert writer.figures[2]["train/tokens_per_second"] == 400
    assert tracking.where == [
        f"TensorBoard files are written: tensorboard --logdir {config.out / 'tensorboard'}"
    ]


def test_a_resumed_run_is_told_whole_and_old_files_go(
    make: MakeConfig, tensorboard: list[Any]
) -> None:
    config = make(report_to="tensorboard")
    old = config.out / "tensorboard" / "events.of-the-killed-process"
    old.parent.mkdir(parents=True)
    old.write_text("step 3, which the checkpoint has not")
    with Tracking(config, chosen(config)) as tracking:
        assert not old.exists()
        tracking.update(state(4))
    assert sorted(tensorboard[0].figures) == [0, 1, 2, 3, 4]


def test_whom_a_run_reports_to(make: MakeConfig, install: Install) -> None:
    for name in WRITERS:
        install(name)
    assert chosen(make()) == ("tensorboard",)
    assert chosen(make(report_to="none")) == ()
    assert chosen(make(report_to="mlflow, wandb")) == ("mlflow", "wandb")
    assert chosen(make(report_to=["wandb"])) == ("wandb",)
    with pytest.raises(ValueError, match="report_to is 'wanbd': input should be 'tensorboard', 'w"):
        make(report_to="wanbd")


@pytest.mark.parametrize("name", sorted(WRITERS))
def test_a_library_that_is_named_and_not_there_is_an_error_before_the_run(
    make: MakeConfig, install: Install, name: str
) -> None:
    install(name, is_there=False)
    config = make(report_to=name)
    with pytest.raises(ValueError, match=f"report_to names {name}, which is not installed: pip"):
        run.prepare(config)
    assert not config.out.exists()


def test_without_tensorboard_the_default_writes_no_files(
    make: MakeConfig, install: Install
) -> None:
    install("tensorboard", is_there=False)
    assert chosen(make()) == ()
    with Tracking(make(), ()) as tracking:
        tracking.update(state(2))
    assert tracking.where == []


class WandBError(Exception):
    """What wandb raises."""


@pytest.mark.parametrize("fails", [False, True])
def test_wandb_gets_name_settings_figures_and_how_it_ended(
    make: MakeConfig, install: Install, fails: bool
) -> None:
    told: Figures = {}
    ended, begun = [], {}
    started = SimpleNamespace(
        url=None,
        dir="wandb/run-1",
        log=lambda figures, step: told.update({step: figures}),
        finish=lambda exit_code: ended.append(exit_code),
    )

    def init(**options: Any) -> Any:
        begun.update(options)
        return started

    install("wandb", init=init, errors=SimpleNamespace(Error=WandBError))
    config = make(report_to="wandb")

    def go() -> None:
        with Tracking(config, chosen(config)) as tracking:
            assert tracking.where == ["W&B run: wandb/run-1"]
            tracking.update(state(2))
            if fails:
                raise KeyboardInterrupt

    if fails:
        with pytest.raises(KeyboardInterrupt):
            go()
    else:
        go()
    assert begun["name"] == "out"
    assert begun["config"]["rank"] == 4
    assert list(told) == [0, 1, 2]
    assert told[1].keys() == STEP_NAMES
    assert ended == [int(fails)]


def test_a_tracker_that_does_not_start_is_said_in_a_line(
    make: MakeConfig, install: Install
) -> None:
    def init(**_: Any) -> None:
        raise WandBError("no API key")

    install("wandb", init=init, errors=SimpleNamespace(Error=WandBError))
    config = make(report_to="wandb")
    with pytest.raises(ValueError, match="wandb, which does not start: no API key"):
        Tracking(config, chosen(config))
    install(
        "mlflow",
        start_run=lambda **_: init(),
        exceptions=SimpleNamespace(MlflowException=WandBError),
    )
    config = make(report_to="mlflow")
    with pytest.raises(ValueError, match="mlflow, which does not start: no API key"):
        Tracking(config, chosen(config))


def test_mlflow_gets_settings_figures_and_how_it_ended(make: MakeConfig, install: Install) -> None:
    told: Figures = {}
    ended: list[str] = []
    settings: dict[str, Any] = {}
    install(
        "mlflow",
        start_run=lambda run_name: SimpleNamespace(info=SimpleNamespace(run_id=f"{run_name}-7")),
        log_params=settings.update,
        log_metrics=lambda figures, step: told.update({step: figures}),
        end_run=ended.append,
        get_tracking_uri=lambda: "http://here",
        exceptions=SimpleNamespace(MlflowException=WandBError),
    )
    config = make(report_to="mlflow")
    with Tracking(config, chosen(config)) as tracking:
        tracking.update(state(2))
    assert tracking.where == ["MLflow run out-7 at http://here"]
    assert settings["learning_rate"] == 5e-3
    assert list(told) == [0, 1, 2]
    assert ended == ["FINISHED"]
    with pytest.raises(KeyboardInterrupt), Tracking(config, chosen(config)):
        raise KeyboardInterrupt
    assert ended == ["FINISHED", "FAILED"]


def test_a_run_hands_its_curves_over(make: MakeConfig, tensorboard: list[Any]) -> None:
    config = make(max_steps=2, eval_every=1, eval_generations=2, generation_tokens=2)
    outcome = finish(config)
    figures = tensorboard[0].figures
    assert [figures[step]["train/loss"] for step in (1, 2)] == [
        record["loss"] for record in outcome.state.history
    ]
    assert [figures[step]["eval/loss"] for step in (0, 1, 2)] == [
        record["loss"] for record in outcome.state.evaluations
    ]
    assert "eval/exact match" in figures[2]
    assert tensorboard[0].is_closed


def test_real_event_files_hold_the_run(make: MakeConfig) -> None:
    pytest.importorskip("tensorboard")
    accumulator: Any = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = make(report_to="tensorboard")
    with Tracking(config, chosen(config)) as tracking:
        tracking.update(state(3))
    found = accumulator.EventAccumulator(str(config.out / "tensorboard"))
    found.Reload()
    assert [(e.step, e.value) for e in found.Scalars("train/loss")] == [
        (1, 1.0),
        (2, 0.5),
        (3, pytest.approx(1 / 3)),
    ]
    assert [e.step for e in found.Scalars("eval/loss")] == [0, 2]
