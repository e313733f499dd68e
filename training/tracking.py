"""A run's curves for tools that teams watch already: TensorBoard, Weights & Biases, MLflow."""

import importlib.util
import shutil
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from training.checkpoint import RunState
from training.config import Tracker, TrainConfig

TENSORBOARD = "tensorboard"  # the folder of its files, in the run's
_STEP_FIGURES = ("loss", "learning_rate", "grad_norm")


class Writer(Protocol):
    """One tool."""

    where: str  # for the operator

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Note figures of a step; steps only grow."""

    def close(self, is_done: bool) -> None:
        """Hand over what is left."""


def chosen(config: TrainConfig) -> tuple[Tracker, ...]:
    """Whom the run reports to. Raises ValueError where one that is named is not installed."""
    if config.report_to == "none":
        return ()
    if config.report_to == "auto":
        return ("tensorboard",) if _is_installed("tensorboard") else ()
    for name in config.report_to:
        if not _is_installed(name):
            raise ValueError(f"report_to names {name}, which is not installed: pip install {name}")
    return config.report_to


class Tracking:
    """Hands every figure of a run to each writer, once.

    A resumed run is told from its first step on, so that its curves are whole.
    """

    def __init__(self, config: TrainConfig, names: Sequence[Tracker]) -> None:
        self._writers = [WRITERS[name](config) for name in names]
        self._num_steps = self._num_evaluations = 0  # that are written

    @property
    def where(self) -> list[str]:
        """Where each writer's curves are found."""
        return [writer.where for writer in self._writers]

    def __enter__(self) -> "Tracking":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for writer in self._writers:
            writer.close(kind is None)

    def update(self, state: RunState) -> None:
        """Write what is new."""
        if not self._writers:
            return
        found: dict[int, dict[str, float]] = defaultdict(dict)
        for record in state.history[self._num_steps :]:
            figures = {f"train/{name}": record[name] for name in _STEP_FIGURES}
            figures["train/tokens_per_second"] = record["tokens"] / max(record["seconds"], 1e-9)
            found[int(record["step"])] |= figures
        for record in state.evaluations[self._num_evaluations :]:
            figures = {f"eval/{name}": record[name] for name in ("loss", "perplexity")}
            found[int(record["step"])] |= figures
        self._num_steps, self._num_evaluations = len(state.history), len(state.evaluations)
        for step in sorted(found):
            self.log(found[step], step)

    def log(self, figures: Mapping[str, float], step: int) -> None:
        """Write one step's figures."""
        for writer in self._writers:
            writer.log(figures, step)


class _TensorBoard:
    """Event files in the run's folder, begun anew by each process."""

    def __init__(self, config: TrainConfig) -> None:
        folder = config.out / TENSORBOARD
        shutil.rmtree(folder, ignore_errors=True)
        tensorboard: Any = importlib.import_module("torch.utils.tensorboard")
        self._writer = tensorboard.SummaryWriter(str(folder))
        self.where = f"TensorBoard files are written: tensorboard --logdir {folder}"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self, is_done: bool) -> None:
        self._writer.close()


class _WandB:
    """A W&B run; project, account and offline mode are set by its own WANDB_ variables."""

    def __init__(self, config: TrainConfig) -> None:
        wandb: Any = importlib.import_module("wandb")
        try:
            self._run = wandb.init(
                name=config.out.resolve().name, config=config.model_dump(mode="json")
            )
        except wandb.errors.Error as error:
            raise ValueError(f"report_to names wandb, which does not start: {error}") from None
        self.where = f"W&B run: {self._run.url or self._run.dir}"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._run.log(dict(figures), step=step)

    def close(self, is_done: bool) -> None:
        self._run.finish(exit_code=0 if is_done else 1)


class _MLflow:
    """An MLflow run; server and experiment are set by its own MLFLOW_ variables."""

    def __init__(self, config: TrainConfig) -> None:
        mlflow: Any = importlib.import_module("mlflow")
        self._mlflow = mlflow
        try:
            run = mlflow.start_run(run_name=config.out.resolve().name)
            mlflow.log_params(config.model_dump(mode="json"))
        except mlflow.exceptions.MlflowException as error:
            raise ValueError(f"report_to names mlflow, which does not start: {error}") from None
        self.where = f"MLflow run {run.info.run_id} at {mlflow.get_tracking_uri()}"

    def log(self, figures: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics(dict(figures), step=step)

    def close(self, is_done: bool) -> None:
        self._mlflow.end_run("FINISHED" if is_done else "FAILED")


WRITERS: dict[Tracker, Callable[[TrainConfig], Writer]] = {
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}


def _is_installed(library: str) -> bool:
    return importlib.util.find_spec(library) is not None
