"""Two processes train what one trains; the first one writes, all of them agree."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from tests.training.conftest import MakeConfig, cpu_trainer, dataset_of
from training import trainer as module
from training.checkpoint import RunState
from training.config import TrainConfig
from training.distributed import Group, join, start
from training.loss import summed_loss
from training.qlora import add_adapter, load_base, trained
from training.trainer import Trainer

CPU = torch.device("cpu")
BIN = Path(sys.executable).parent
VARIABLES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "RANK")


class Killed(Exception):
    """In the middle of a run."""


def trainer_of(config: TrainConfig, group: Group, **options: Any) -> Trainer:
    model = add_adapter(load_base(config.base, "nf4", torch.float32, CPU), config)
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.base)
    dataset = dataset_of(config, tokenizer)
    return cpu_trainer(config, model, dataset, group=group, **options)


def finished(config: TrainConfig, group: Group, **options: Any) -> Trainer:
    trainer = trainer_of(config, group, **options)
    trainer.run()
    return trainer


def told(trainer: Trainer, folder: Path, group: Group) -> None:
    """Leave what this process has in the end where the test finds it."""
    weights = {name: weight.detach() for name, weight in trained(trainer._model).items()}
    state = trainer.state
    found = {
        "weights": weights,
        "losses": [record["loss"] for record in state.history],
        "tokens": [(record["tokens"], record["learned"]) for record in state.history],
        "held_out": [record["loss"] for record in state.evaluations],
        "micro_batch": state.micro_batch,
    }
    torch.save(found, folder / f"{group.number}.pt")


def scenarios(group: Group, folder: Path, make: dict[str, TrainConfig]) -> None:
    """What each of the two processes does, one run after the other."""
    for name in ("plain", "packed"):
        told(finished(make[name], group), prepared(folder / name), group)
    scarce(group, make["scarce"], folder / "scarce")
    interrupted(group, make["cut"], folder / "cut")
    diverging(group, make["diverging"], folder / "diverging")


def prepared(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def scarce(group: Group, config: TrainConfig, folder: Path) -> None:
    """Memory runs out in the second process alone."""
    said: list[str] = []

    def in_scarce_memory(model: Any, batch: Any) -> torch.Tensor:
        if group.number == 1 and len(batch.ids) > 1:
            raise torch.OutOfMemoryError
        return summed_loss(model, batch)

    module.summed_loss = in_scarce_memory  # type: ignore[attr-defined]
    try:
        trainer = finished(config, group, say=said.append)
    finally:
        module.summed_loss = summed_loss  # type: ignore[attr-defined]
    assert said == ["out of memory: 1 rows in a pass from here on; a step still has 4"]
    told(trainer, prepared(folder), group)


def interrupted(group: Group, config: TrainConfig, folder: Path) -> None:
    """Both processes end after the second step, and new ones go on."""

    def kill(state: RunState) -> None:
        if state.step == 2:
            raise Killed

    with pytest.raises(Killed):
        finished(config, group, on_step=kill)
    group.sum([0.0])  # as new processes would, both begin when the first one has written
    again = trainer_of(config, group)
    assert again.resume()
    assert again.state.step == 2
    again.run()
    told(again, prepared(folder), group)


def diverging(group: Group, config: TrainConfig, folder: Path) -> None:
    """The fourth step's loss is no number, in the second process alone."""
    said: list[str] = []
    trainer = trainer_of(config, group, say=said.append)

    def diverged(model: Any, batch: Any) -> torch.Tensor:
        is_wrong = group.number == 1 and trainer.state.step == 3
        return summed_loss(model, batch) * (math.nan if is_wrong else 1.0)

    module.summed_loss = diverged  # type: ignore[attr-defined]
    try:
        trainer.run()
    finally:
        module.summed_loss = summed_loss  # type: ignore[attr-defined]
    assert said == [
        "the loss of step 4 is nan and its gradient nan: the run ends with the adapter of step 2"
    ]
    told(trainer, prepared(folder), group)


@pytest.fixture(scope="module")
def two(
    tmp_path_factory: pytest.TempPathFactory, chat_base: Path, rows_file: Path
) -> Callable[[str, int], dict[str, Any]]:
    """Run all the scenarios in two processes and in one; return what a process has of a run."""
    folder = tmp_path_factory.mktemp("two")
    base: dict[str, Any] = {"base": chat_base, "data": rows_file, "rank": 4, "dtype": "fp32"}
    base |= {"learning_rate": 5e-3, "batch_size": 4, "micro_batch": 2, "eval_fraction": 0.25}
    base |= {"max_length": 128, "max_steps": 5, "eval_every": 2, "save_every": 1}
    differing = {"plain": {}, "packed": {"packing": True, "batch_size": 3}, "scarce": {}, "cut": {}}
    differing["diverging"] = {}
    for size in (1, 2):
        configs = {
            name: TrainConfig(**{**base, **settings, "out": folder / f"{size}-{name}"})
            for name, settings in differing.items()
        }
        if size == 2:
            start(2, scenarios, folder / "2", configs)
            continue
        for name in ("plain", "packed"):
            told(finished(configs[name], Group()), prepared(folder / "1" / name), Group())

    def found(name: str, number: int) -> dict[str, Any]:
        path = "1" if number < 0 else "2"
        loaded: dict[str, Any] = torch.load(
            folder / path / name / f"{max(number, 0)}.pt", weights_only=True
        )
        return loaded

    found.folder = folder  # type: ignore[attr-defined]
    return found


ALONE = -1


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["plain", "packed"])
def test_two_processes_train_the_adapter_of_one_to_rounding(two: Any, name: str) -> None:
    alone, first = two(name, ALONE), two(name, 0)
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert first["held_out"] == pytest.approx(alone["held_out"], rel=1e-4)
    assert first["tokens"] == alone["tokens"]
    for key, weight in first["weights"].items():
        torch.testing.assert_close(weight, alone["weights"][key], rtol=1e-2, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["plain", "packed", "scarce", "cut", "diverging"])
def test_both_processes_hold_the_same_bits(two: Any, name: str) -> None:
    first, second = two(name, 0), two(name, 1)
    assert first["losses"] == second["losses"]
    assert first["held_out"] == second["held_out"]
    for key, weight in first["weights"].items():
        assert torch.equal(weight, second["weights"][key])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_out_of_memory_in_one_process_halves_the_pass_in_all(two: Any) -> None:
    first, plain = two("scarce", 0), two("plain", 0)
    assert first["micro_batch"] == two("scarce", 1)["micro_batch"] == 1
    assert plain["micro_batch"] == 2
    assert first["losses"] == pytest.approx(plain["losses"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_of_two_goes_on_bit_for_bit(two: Any) -> None:
    whole, cut = two("plain", 0), two("cut", 0)
    assert cut["losses"] == whole["losses"]
    for key, weight in cut["weights"].items():
        assert torch.equal(weight, whole["weights"][key])


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_loss_that_is_no_number_in_one_process_ends_the_run_in_all(two: Any) -> None:
    first, plain = two("diverging", 0), two("plain", 0)
    assert first["losses"] == plain["losses"][:3]
    assert first["held_out"] == plain["held_out"][:2]


def told_of(command: list[str], tmp_path: Path, **variables: str) -> str:
    """What a command prints; it must go well."""
    environment = {**os.environ, **variables, "TURNOUT_HOME": str(tmp_path / "state")}
    environment |= {"OMP_NUM_THREADS": "1", "COLUMNS": "100"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_command_trains_in_two_processes_and_registers_once(
    make: MakeConfig, tmp_path: Path
) -> None:
    config = make()
    options = [f"--base={config.base}", f"--data={config.data}", "--max-steps=2", "--rank=4"]
    out = [f"--out={tmp_path / 'out'}", "--register=mine", "--eval-generations=2"]
    said = told_of([str(BIN / "turnout"), "train", *options, *out, "--num-processes=2"], tmp_path)
    assert said.count("mine@1 registered") == 1
    assert said.count("step 2/2  loss") == 1
    assert said.count("exact match") == 1
    notes = json.loads((tmp_path / "out" / "turnout.json").read_text())
    assert notes["training"]["num_processes"] == 2
    assert notes["training"]["generations"]["count"] == 1
    launched = [f"--out={tmp_path / 'launched'}", "--eval-generations=0"]
    launch = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node=2", "--no-python"]
    said = told_of([*launch, str(BIN / "turnout"), "train", *options, *launched], tmp_path)
    assert said.count("step 2/2  loss") == 1
    one = load_file(tmp_path / "out" / "adapter_model.safetensors")
    other = load_file(tmp_path / "launched" / "adapter_model.safetensors")
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_a_step_is_dealt_out_whole_and_evenly() -> None:
    rows = list(range(7))
    for size in (1, 2, 3, 8):
        shares = [Group(number, size).share(rows) for number in range(size)]
        assert sorted(row for share in shares for row in share) == rows
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_alone_sums_and_agrees_with_itself() -> None:
    group = Group()
    assert group.is_first
    assert group.sum([1.5, 2.0]) == [1.5, 2.0]
    assert group.agree(True)
    assert not group.agree(False)
    assert not Group(1, 2).is_first
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), 3.0)
    group.sum_gradients([weight])
    assert weight.grad.tolist() == [3.0, 3.0]


def test_a_run_without_a_launcher_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    with join(2) as group:
        assert group == Group(0, 1)


def test_launchers_that_contradict_the_command_or_span_hosts_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in zip(VARIABLES, ("4", "4", "0"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--num-processes is 2, but 4 have been started"), join(2):
        pass
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="all its processes on one host"), join():
        pass


def test_more_processes_than_gpus_or_rows_are_refused(
    make: MakeConfig, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make(batch_size=1)
    with pytest.raises(ValueError, match="batch_size is 1: too few rows for 2 processes"):
        trainer_of(config, Group(0, 2))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="2 processes need as many GPUs; here are 1"):
        start(2, scenarios)


def fails(group: Group) -> None:
    if group.number == 1:
        raise ValueError("the second one's complaint")
    group.sum([1.0])  # waits for the other in vain


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_what_goes_wrong_in_one_process_ends_all_in_its_own_words() -> None:
    with pytest.raises(ValueError, match=r"^the second one's complaint$"):
        start(2, fails)
