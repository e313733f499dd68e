"""Runs: they learn, they repeat, they survive."""

import contextlib
import json
import math
import multiprocessing
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from tests.training.conftest import MakeConfig, cpu_trainer, dataset_of
from training import trainer as module
from training.checkpoint import Checkpoint, CheckpointFolder, RunState
from training.config import TrainConfig, make_config
from training.loss import summed_loss
from training.packing import collate
from training.qlora import add_adapter, load_base, trained
from training.steps import Steps
from training.trainer import Trainer

CPU = torch.device("cpu")
Tensors = dict[str, torch.Tensor]
MakeTrainer = Callable[..., Trainer]


@pytest.fixture
def new(make: MakeConfig, tokenizer: Any) -> MakeTrainer:
    """Return a function that makes a trainer as a fresh process would; keywords are settings."""

    def trainer(config: TrainConfig | None = None, **settings: Any) -> Trainer:
        on_step = settings.pop("on_step", lambda _: None)
        say = settings.pop("say", lambda _: None)
        config = config or make(**settings)
        dtype = torch.float16 if config.dtype == "fp16" else torch.float32
        model = add_adapter(load_base(config.base, "nf4", dtype, CPU), config)
        dataset = dataset_of(config, tokenizer)
        return cpu_trainer(config, model, dataset, say=say, on_step=on_step)

    return trainer


def weights(trainer: Trainer) -> Tensors:
    return {name: weight.detach().clone() for name, weight in trained(trainer._model).items()}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def losses(state: RunState) -> list[float]:
    return [record["loss"] for record in state.history]


def test_the_loss_falls_and_the_held_out_one_is_noted(new: MakeTrainer) -> None:
    trainer = new(epochs=4)
    state = trainer.run()
    assert state.step == trainer.steps.total == 12
    assert losses(state)[-1] < losses(state)[0] - 0.3
    assert [record["step"] for record in state.evaluations] == [0, 3, 6, 9, 12]
    assert state.best_loss == min(record["loss"] for record in state.evaluations[1:])
    assert state.best_loss < state.evaluations[0]["loss"]
    last = state.evaluations[-1]
    assert last["perplexity"] == math.exp(last["loss"])
    assert trainer.held_out_loss() == state.best_loss


@pytest.mark.parametrize(
    "settings",
    [
        {"dropout": 0.2, "neftune_alpha": 5.0},
        {"packing": True, "batch_size": 2},
        {"optimizer": "paged_adamw_8bit", "use_dora": True, "group_lengths": True},
        {"optimizer": "paged_adamw", "use_rslora": True, "schedule": "linear"},
    ],
)
def test_a_run_stopped_anywhere_goes_on_bit_for_bit(
    new: MakeTrainer, make: MakeConfig, tmp_path: Path, settings: dict[str, Any]
) -> None:
    settings = {**settings, "max_steps": 5, "eval_every": 2, "save_every": 1}

    class Killed(BaseException):
        pass

    def kill(state: RunState) -> None:
        if state.step in (2, 3):
            raise Killed

    whole = new(**settings, out=tmp_path / "whole")
    expected = whole.run()
    config = make(**settings, out=tmp_path / "cut")
    for _ in range(2):
        cut = new(config, on_step=kill)
        cut.resume()
        with pytest.raises(Killed):
            cut.run()
    again = new(config)
    assert again.resume()
    assert again.state.step == 3
    state = again.run()
    assert losses(state) == losses(expected)
    assert state.evaluations == expected.evaluations
    assert same(weights(again), weights(whole))


def test_the_same_run_twice_gives_the_same_adapter_and_another_seed_another(
    new: MakeTrainer, tmp_path: Path
) -> None:
    runs = []
    for number, seed in enumerate((3, 3, 4)):
        trainer = new(max_steps=3, seed=seed, dropout=0.1, out=tmp_path / str(number))
        trainer.run()
        runs.append(weights(trainer))
    assert same(runs[0], runs[1])
    assert not same(runs[0], runs[2])


def test_the_micro_batch_changes_nothing_but_rounding(new: MakeTrainer, tmp_path: Path) -> None:
    found = []
    for size in (1, 2, 4):
        trainer = new(micro_batch=size, max_steps=2, out=tmp_path / str(size))
        found.append(losses(trainer.run()))
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-4)


def test_gradients_are_those_of_the_mean_over_all_learned_tokens(new: MakeTrainer) -> None:
    trainer = new(micro_batch=3, batch_size=4)
    rows = trainer._rows_of(0)
    loss = trainer._gradients(rows, trainer._num_learned(rows))
    ours = {name: weight.grad.clone() for name, weight in trainer._weights.items()}  # type: ignore[union-attr]
    batch = collate(trainer._data.training, rows, 2, is_packed=False)
    labels = torch.full_like(batch.ids, -100)
    labels[:, 1:] = batch.labels[:, :-1]
    trainer._model.zero_grad()
    theirs = trainer._model(batch.ids, labels=labels).loss
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), rel=1e-5)
    assert trainer._num_learned(rows) == batch.num_learned
    for name, weight in trainer._weights.items():
        torch.testing.assert_close(ours[name], weight.grad, rtol=1e-3, atol=1e-6)


def test_checkpointed_layers_give_the_same_gradients(new: MakeTrainer, tmp_path: Path) -> None:
    grads = []
    for checkpointing in (False, True):
        trainer = new(gradient_checkpointing=checkpointing, dropout=0.1)
        trainer._model.train()
        trainer._gradients(trainer._rows_of(0), 1)
        grads.append([weight.grad for weight in trainer._weights.values()])
        assert trainer._causal.model.layers[0].gradient_checkpointing is checkpointing
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def test_out_of_memory_halves_the_pass_and_keeps_the_step(
    new: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    said: list[str] = []

    def scarce(model: Any, batch: Any) -> torch.Tensor:
        if len(batch.ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return summed_loss(model, batch)

    for fraction in (0.0, 0.25):  # memory runs out in a step, or in the first evaluation
        plain = new(
            micro_batch=1, max_steps=2, out=tmp_path / f"a{fraction}", eval_fraction=fraction
        )
        expected = losses(plain.run())
        said.clear()
        with monkeypatch.context() as patch:
            patch.setattr(module, "summed_loss", scarce)
            trainer = new(
                micro_batch=4,
                max_steps=2,
                out=tmp_path / f"b{fraction}",
                say=said.append,
                eval_fraction=fraction,
            )
            assert losses(trainer.run()) == expected
        assert trainer.state.micro_batch == 1
        assert said == [
            f"out of memory: {size} rows in a pass from here on; a step still has 4"
            for size in (2, 1)
        ]


def test_fp16_scales_the_loss_and_learns_as_fp32_does(new: MakeTrainer, tmp_path: Path) -> None:
    plain = new(max_steps=4, out=tmp_path / "fp32").run()
    half = new(max_steps=4, out=tmp_path / "fp16", dtype="fp16")
    assert half.state.loss_scale == 2**16
    state = half.run()
    assert losses(state) == pytest.approx(losses(plain), rel=5e-3)
    for one, other in zip(state.history, plain.history, strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.05)


def test_where_fp16_overflows_the_step_is_done_again_with_half_the_scale(
    new: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plain = new(max_steps=2, out=tmp_path / "a", dtype="fp16")
    expected = losses(plain.run())
    trainer = new(max_steps=2, out=tmp_path / "b", dtype="fp16", save_every=1)
    real = trainer._gradients

    def overflowing(rows: Any, num_learned: int) -> float:
        loss = real(rows, num_learned)
        if trainer.state.loss_scale > 2**14:
            trainer._flat.grad.fill_(math.inf)  # type: ignore[union-attr]
        return loss

    monkeypatch.setattr(trainer, "_gradients", overflowing)
    assert losses(trainer.run()) == pytest.approx(expected, rel=1e-3)
    assert trainer.state.loss_scale == 2**14
    again = new(max_steps=2, out=tmp_path / "b", dtype="fp16", save_every=1)
    assert again.resume()
    assert again.state.loss_scale == 2**14
    again.state.step = 1000
    again._gradients_of(again._rows_of(0))
    assert again.state.loss_scale == 2**15


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_with_the_remedy(
    new: MakeTrainer, monkeypatch: pytest.MonkeyPatch, wrong: float
) -> None:
    def diverged(model: Any, batch: Any) -> torch.Tensor:
        return summed_loss(model, batch) * wrong

    trainer = new(max_steps=2, eval_fraction=0)
    before = weights(trainer)
    monkeypatch.setattr(module, "summed_loss", diverged)
    with pytest.raises(ValueError, match=rf"loss of step 1 is {wrong}.* lower learning_rate \(now"):
        trainer.run()
    assert same(weights(trainer), before)


@pytest.mark.parametrize(("wrong", "eval_every"), [(math.nan, 1), (math.inf, 2)])
def test_a_loss_that_is_no_number_ends_the_run_with_the_best_adapter_if_there_is_one(
    new: MakeTrainer, monkeypatch: pytest.MonkeyPatch, wrong: float, eval_every: int
) -> None:
    said: list[str] = []
    steps: list[int] = []
    settings: dict[str, Any] = {"max_steps": 5, "eval_every": eval_every, "save_every": 1}
    trainer = new(**settings, say=said.append, on_step=lambda state: steps.append(state.step))
    best = eval_every
    scripted = {0: 9.0, 1: 5.0, 2: 5.0, 3: 6.0, best: 4.0}
    seen: dict[int, Tensors] = {}

    def held_out_loss() -> float:
        seen[trainer.state.step] = weights(trainer)
        return scripted[trainer.state.step]

    def diverged(model: Any, batch: Any) -> torch.Tensor:
        return summed_loss(model, batch) * (wrong if trainer.state.step == 3 else 1.0)

    monkeypatch.setattr(trainer, "held_out_loss", held_out_loss)
    monkeypatch.setattr(module, "summed_loss", diverged)
    state = trainer.run()

    assert (state.step, state.best_step, state.is_stopped) == (3, best, True)
    assert steps == [1, 2, 3]
    assert sorted(seen) == [0, *range(eval_every, 4, eval_every)]
    assert same(weights(trainer), seen[best])
    (told,) = said
    assert told.startswith(f"the loss of step 4 is {wrong} and its gradient ")
    assert told.endswith(f": the run ends with the adapter of step {best}")
    again = new(**settings)
    assert again.resume()
    again.run()
    assert (again.state.step, again.state.is_stopped) == (3, True)
    assert same(weights(again), seen[best])


def test_the_number_of_processes_may_change_and_is_said(new: MakeTrainer) -> None:
    said: list[str] = []
    trainer = new(max_steps=2, save_every=1)
    trainer.state.num_processes = 4
    trainer.run()
    again = new(max_steps=2, save_every=1, say=said.append)
    assert again.resume()
    assert said == ["begun in 4 processes, now in 1: sums differ by rounding"]
    assert again.state.num_processes == 1


def test_memory_too_small_for_one_row_is_said(
    new: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(model: Any, batch: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(module, "summed_loss", none_left)
    with pytest.raises(ValueError, match="too small for one row of 128 tokens"):
        new(max_steps=1).run()


def test_training_stops_early_and_keeps_the_best(
    new: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = new(epochs=9, eval_every=1, patience=2)
    scripted = iter([9.0, 5.0, 4.0, 4.5, 4.0, 3.0])
    at_best: Tensors = {}

    def held_out_loss() -> float:
        loss = next(scripted)
        if loss == 4.0 and not at_best:
            at_best.update(weights(trainer))
        return loss

    monkeypatch.setattr(trainer, "held_out_loss", held_out_loss)
    state = trainer.run()
    assert (state.step, state.best_step, state.best_loss) == (4, 2, 4.0)
    assert state.is_stopped
    assert same(weights(trainer), at_best)
    again = new(epochs=9, eval_every=1, patience=2)
    assert again.resume()  # a run that has stopped stays stopped
    assert again.run().step == 4
    assert same(weights(again), at_best)


def test_clipping_bounds_the_step_and_0_turns_it_off(
    new: MakeTrainer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for limit, expected in ((0.01, 0.01), (0.0, None)):
        trainer = new(max_grad_norm=limit, max_steps=1, out=tmp_path / str(limit))
        norms: list[float] = []
        real = trainer._optimizer.step

        def step(trainer: Trainer = trainer, norms: list[float] = norms, real: Any = real) -> None:
            grads = [weight.grad.norm() for weight in trainer._weights.values()]  # type: ignore[union-attr]
            norms.append(float(torch.stack(grads).norm()))
            real()

        monkeypatch.setattr(trainer._optimizer, "step", step)
        state = trainer.run()
        before = state.history[0]["grad_norm"]
        assert norms[0] == pytest.approx(expected or before, rel=1e-3)
        assert before > 0.01


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_the_rate_warms_up_and_falls_as_asked(make: MakeConfig, schedule: str) -> None:
    steps = Steps(rows=((0,),), per_epoch=1, total=20, warmup=4)
    rates = [steps.rate(step, schedule) for step in range(20)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    if schedule == "constant":
        assert set(rates[3:]) == {1.0}
    else:
        assert rates[4:] == sorted(rates[4:], reverse=True)
        assert 0 < rates[-1] < 0.1
        middle = 0.5
        assert rates[12] == pytest.approx(middle)


def test_steps_are_counted_from_rows_epochs_and_packing(make: MakeConfig, tokenizer: Any) -> None:
    config = make(epochs=3, warmup=0.1)
    examples = dataset_of(config, tokenizer).training
    steps = Steps.plan(config, examples)
    assert (len(examples), steps.per_epoch, steps.total, steps.warmup) == (9, 3, 9, 1)
    assert Steps.plan(make(max_steps=7, warmup=5), examples).total == 7
    assert Steps.plan(make(max_steps=7, warmup=5), examples).warmup == 5
    packed = Steps.plan(make(packing=True), examples)
    assert len(packed.rows) < 9
    assert sorted(i for row in packed.rows for i in row) == list(range(9))


def test_every_row_is_seen_once_an_epoch(new: MakeTrainer) -> None:
    for settings in ({}, {"group_lengths": True}, {"packing": True, "batch_size": 2}):
        trainer = new(**settings)
        for epoch in range(2):
            steps = range(epoch * trainer.steps.per_epoch, (epoch + 1) * trainer.steps.per_epoch)
            seen = [i for step in steps for row in trainer._rows_of(step) for i in row]
            assert sorted(seen) == list(range(9))


def test_packing_past_a_sliding_window_is_refused(
    make: MakeConfig, tokenizer: Any, chat_base: Path
) -> None:
    config = make(packing=True, max_length=128)
    base = load_base(chat_base, "nf4", torch.float32, CPU)
    base.config.sliding_window = 100
    model = add_adapter(base, config)
    with pytest.raises(ValueError, match="sliding window of 100 tokens"):
        cpu_trainer(config, model, dataset_of(config, tokenizer))


def test_another_runs_checkpoint_is_refused(new: MakeTrainer) -> None:
    new(max_steps=1, save_every=1).run()
    with pytest.raises(ValueError, match="is of a run with other settings, data or base"):
        new(max_steps=1, learning_rate=1e-3).resume()
    with pytest.raises(ValueError, match="is of a run with other settings, data or base"):
        new(max_steps=1, system="Be brief.").resume()
    free = {"save_every": 5, "save_dtype": "bf16", "eval_generations": 3, "report_to": "none"}
    assert new(max_steps=1, **free).resume()  # these change no weight


def test_a_checkpoint_of_another_base_is_refused(
    new: MakeTrainer, make: MakeConfig, tokenizer: Any
) -> None:
    new(max_steps=1, save_every=1).run()
    config = make(max_steps=1, save_every=1)
    model = add_adapter(load_base(config.base, "nf4", torch.float32, CPU), config)
    other = cpu_trainer(config, model, dataset_of(config, tokenizer), base_digest="other")
    with pytest.raises(ValueError, match="is of a run with other settings, data or base"):
        other.resume()


@pytest.mark.parametrize("wrong", [math.nan, math.inf, 1e4])
def test_a_held_out_loss_that_is_no_number_is_never_the_best(
    new: MakeTrainer, monkeypatch: pytest.MonkeyPatch, wrong: float, tmp_path: Path
) -> None:
    said: list[str] = []
    trainer = new(max_steps=4, eval_every=1, say=said.append, out=tmp_path / "a")
    scripted = iter([5.0, 4.0, wrong])
    at_best: Tensors = {}

    def held_out_loss() -> float:
        at_best.update({} if at_best or trainer.state.step != 1 else weights(trainer))
        return next(scripted)

    monkeypatch.setattr(trainer, "held_out_loss", held_out_loss)
    state = trainer.run()
    assert (state.step, state.best_step, state.best_loss) == (2, 1, 4.0)
    assert same(weights(trainer), at_best)
    assert len(state.evaluations) == 2
    assert said == [
        f"the held-out loss after step 2 is {wrong}: the run ends with the adapter of step 1"
    ]
    first = new(max_steps=4, eval_every=1, out=tmp_path / "b")
    scripted = iter([5.0, wrong])
    monkeypatch.setattr(first, "held_out_loss", lambda: next(scripted))
    with pytest.raises(ValueError, match=rf"after step 1 is {wrong}: lower learning_rate"):
        first.run()


def checkpoint(step: int) -> Checkpoint:
    state = RunState(step=step)
    return Checkpoint(
        fingerprint="f", state=state, adapter={"a": torch.ones(2)}, best=None, optimizer={}
    )


def test_a_checkpoint_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = CheckpointFolder(tmp_path / "c", keep=2)
    assert folder.load("f") is None
    folder.save(checkpoint(1))

    def torn(content: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", torn)
    with pytest.raises(OSError, match="no space"):
        folder.save(checkpoint(2))
    found = folder.load("f")
    assert found is not None
    assert found.state.step == 1
    assert torch.equal(found.adapter["a"], torch.ones(2))


def test_what_a_killed_process_was_writing_is_removed(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path, keep=2)
    (tmp_path / "step-00000003.partial").write_bytes(b"half")
    folder.save(checkpoint(4))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004.pt"]


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    folder = CheckpointFolder(tmp_path / "c", keep=2)
    for step in (1, 2, 10):
        folder.save(checkpoint(step))
    assert [path.name for path in folder.files()] == ["step-00000002.pt", "step-00000010.pt"]


def work(settings: str, pipe: Connection) -> None:
    """Go on with the run as a fresh process would, and tell when it begins and when it is done."""
    config, _ = make_config(json.loads(settings))
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.base)
    model = add_adapter(load_base(config.base, "nf4", torch.float32, CPU), config)
    trainer = cpu_trainer(config, model, dataset_of(config, tokenizer))
    trainer.resume()
    pipe.send(trainer.state.step)
    trainer.run()
    pipe.send("done")


def killed_run(config: TrainConfig, after_s: float | None) -> list[Any]:
    """Run in a process of its own, kill -9 it so long after its first checkpoint; what it told."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.run"])  # imports take seconds, once
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(config.model_dump_json(), theirs))
    process.start()
    theirs.close()
    told: list[Any] = []
    with ours, contextlib.suppress(EOFError):
        told.append(ours.recv())
        if after_s is not None:
            folder = CheckpointFolder(config.out / "checkpoints", 1)
            before = folder.files()[-1:]
            while process.is_alive() and folder.files()[-1:] == before:
                time.sleep(0.002)
            time.sleep(after_s)
            process.kill()
        told.append(ours.recv())
    process.join()
    process.close()
    return told


def newest(config: TrainConfig) -> dict[str, Any]:
    path = CheckpointFolder(config.out / "checkpoints", 1).files()[-1]
    found: dict[str, Any] = torch.load(path, weights_only=True)
    return found


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_ten_kills_in_the_middle_change_not_one_bit(make: MakeConfig, tmp_path: Path) -> None:
    settings = {"max_steps": 400, "save_every": 3, "eval_every": 80, "dropout": 0.1}
    whole = make(**settings, out=tmp_path / "whole")
    assert killed_run(whole, None)[-1] == "done"
    cut = make(**settings, out=tmp_path / "cut")
    starts = []
    for kill in range(10):
        told = killed_run(cut, 0.013 * (kill % 4))
        assert "done" not in told, "the run is too short for ten kills"
        starts += told
    assert starts == sorted(set(starts)), "each of them got on"
    assert killed_run(cut, None)[-1] == "done"
    one, other = newest(whole), newest(cut)
    assert same(one["adapter"], other["adapter"])
    assert same(one["best"], other["best"])
    assert losses(RunState(**one["state"])) == losses(RunState(**other["state"]))
    assert json.dumps(one["state"]["evaluations"]) == json.dumps(other["state"]["evaluations"])
