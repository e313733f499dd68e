"""The training loop: a run is a function of its config and data, however often it is killed."""

import contextlib
import hashlib
import math
import time
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from bitsandbytes.optim import adamw as bnb_adamw
from peft import PeftModel

from training.checkpoint import CHECKPOINTS, Checkpoint, CheckpointFolder, RunState, Tensors
from training.config import TrainConfig
from training.data import Dataset
from training.distributed import Group
from training.fast.choice import Choice
from training.fast.flat import flatten
from training.fast.model import FastModel
from training.loss import add_noise, summed_loss
from training.packing import Batch, Packed, collate, epoch_order, group_lengths
from training.qlora import trained
from training.steps import Steps

OnStep = Callable[[RunState], None]
Say = Callable[[str], None]
Result = TypeVar("Result")
_FIRST_SCALE = 2.0**16  # of the loss in fp16; halved where gradients overflow,
_SCALE_STEPS = 1000  # and doubled after so many steps, up to where it was
_MAX_LOSS = 709.0  # nats a token; past it no float holds the perplexity


class Trainer:
    """Owns the adapter's weights, their optimizer and the run's state.

    Invariant: after `step` steps all three, bit for bit on a CPU, are what config and data give;
    each step seeds its own randomness, so nothing else need be kept. Where several processes train,
    all of them hold the same; each computes a share of the rows, and the first one writes.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: PeftModel,
        dataset: Dataset,
        *,
        pad_id: int,
        device: torch.device,
        kernels: Choice,
        say: Say = lambda _: None,
        on_step: OnStep = lambda _: None,
        group: Group = Group(),  # noqa: B008  frozen
        base_digest: str = "",
    ) -> None:
        if group.size > config.batch_size:
            raise ValueError(
                f"batch_size is {config.batch_size}: too few rows for {group.size} processes"
            )
        self._group, self._base_digest = group, base_digest
        self._config, self._model, self._data = config, model, dataset
        self._pad_id, self._device, self._say, self._on_step = pad_id, device, say, on_step
        causal: Any = model.base_model.model
        self._causal = causal
        self._check_window()
        self.steps = Steps.plan(config, dataset.training)
        self._lengths = [len(example.ids) for example in dataset.training]
        self._weights = trained(model)
        self._flat = flatten(list(self._weights.values()))
        self._optimizer = make_optimizer(config, [self._flat])
        self._folder = CheckpointFolder(config.out / CHECKPOINTS, config.keep_checkpoints)
        self.state = RunState(
            micro_batch=min(config.micro_batch, math.ceil(config.batch_size / group.size)),
            loss_scale=_FIRST_SCALE if causal.dtype == torch.float16 else 1.0,
            num_processes=group.size,
        )
        self._best: Tensors | None = None
        if config.neftune_alpha:
            add_noise(self._causal, config.neftune_alpha)
        self._fast = None if kernels.options is None else FastModel(causal, kernels.options)
        is_saving = config.gradient_checkpointing
        if self._fast is None and (device.type == "cuda" if is_saving is None else is_saving):
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                # Its new name, activation_checkpointing_enable, is younger than what we support.
                causal.gradient_checkpointing_enable({"use_reentrant": False})

    def resume(self) -> bool:
        """Go back to the newest checkpoint of this very run; False where there is none."""
        found = self._folder.load(self._fingerprint())
        if found is None:
            return False
        before, now = found.state.num_processes, self._group.size
        if before != now:
            self._say(f"begun in {before} processes, now in {now}: sums differ by rounding")
        self.state, self._best = found.state, found.best
        self.state.num_processes = now
        self._put(found.adapter)
        self._optimizer.load_state_dict(found.optimizer)
        return True

    def run(self) -> RunState:
        """Train to the end, early stopping or divergence, and leave the best adapter in the model.

        ValueError where it diverges before there is a best one.
        """
        state, config = self.state, self._config
        if not state.step and not state.evaluations:
            self._evaluate()
        while state.step < self.steps.total and not state.is_stopped:
            if not self._step():
                self._save()
                break
            is_last = state.step == self.steps.total
            if is_last or state.step % (config.eval_every or self.steps.per_epoch) == 0:
                self._evaluate()
            is_last = is_last or state.is_stopped
            if is_last or state.step % (config.save_every or self.steps.per_epoch) == 0:
                self._save()
            self._on_step(state)
        if self._best is not None:
            self._put(self._best)
        return state

    def held_out_loss(self) -> float:
        """Mean loss of a held-out token, every row padded alone: what serving sees."""
        total, count = self._group.sum(self._shrinking(self._held_out_sums))
        return total / count

    def _held_out_sums(self) -> list[float]:
        """This process's share of the held-out loss and tokens."""
        self._model.eval()
        total, count = 0.0, 0
        rows = [(i,) for i in range(len(self._data.evaluation))]
        rows.sort(key=lambda row: len(self._data.evaluation[row[0]].ids))
        rows = self._group.share(rows)
        with torch.no_grad():
            for start in range(0, len(rows), self.state.micro_batch):
                chosen = rows[start : start + self.state.micro_batch]
                batch = collate(self._data.evaluation, chosen, self._pad_id, is_packed=False)
                count += batch.num_learned
                total += float(self._summed_loss(batch))
        self._model.train()
        return [total, count]

    def _step(self) -> bool:
        """One optimizer step; False where it diverged instead, which ends the run."""
        state, config = self.state, self._config
        started = time.perf_counter()
        rows = self._rows_of(state.step)
        self._model.train()
        loss, norm = self._gradients_of(rows)
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._end_diverged(
                f"the loss of step {state.step + 1} is {loss} and its gradient {norm}"
            )
            return False
        rate = config.learning_rate * self.steps.rate(state.step, config.schedule)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        state.step += 1
        state.history.append(
            {
                "step": state.step,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": norm,
                "tokens": sum(self._lengths[i] for row in rows for i in row),
                "learned": self._num_learned(rows),
                "seconds": time.perf_counter() - started,
            }
        )
        return True

    def _gradients_of(self, rows: list[Packed]) -> tuple[float, float]:
        """Leave the step's clipped gradients in the weights; return the loss and their norm.

        In fp16 the loss is scaled up, so that small gradients do not vanish; where that makes
        others overflow, the scale is halved and the step done again. Both figures are the same in
        all processes, being of sums over them; NaN or Inf where no scale helps.
        """
        state, weights = self.state, [self._flat]
        share, num_learned = self._group.share(rows), self._num_learned(rows)
        if state.step % _SCALE_STEPS == 0 and state.loss_scale != 1:
            state.loss_scale = min(2 * state.loss_scale, _FIRST_SCALE)
        while True:
            mine = self._shrinking(lambda: self._gradients(share, num_learned))
            (loss,) = self._group.sum([mine])
            self._group.sum_gradients(weights)
            if state.loss_scale != 1:
                for weight in weights:
                    assert weight.grad is not None
                    weight.grad /= state.loss_scale
            norm = float(
                torch.nn.utils.clip_grad_norm_(weights, self._config.max_grad_norm or math.inf)
            )
            if state.loss_scale <= 1 or (math.isfinite(loss) and math.isfinite(norm)):
                return loss, norm
            state.loss_scale /= 2

    def _shrinking(self, work: Callable[[], Result]) -> Result:
        """Do the work, again with half the rows in a pass for as long as memory runs out.

        Where it runs out in one of several processes, all of them begin again.
        """
        while True:
            found: Result | None = None
            with contextlib.suppress(torch.OutOfMemoryError):
                found = work()
            if not self._group.agree(found is None):
                assert found is not None
                return found
            if self.state.micro_batch == 1:
                raise ValueError(
                    f"memory is too small for one row of {self._config.max_length} tokens; "
                    "lower max_length, or set gradient_checkpointing"
                )
            self.state.micro_batch //= 2
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self._say(
                f"out of memory: {self.state.micro_batch} rows in a pass from here on; a step "
                f"still has {self._config.batch_size}"
            )

    def _gradients(self, rows: list[Packed], num_learned: int) -> float:
        """Leave these rows' part of the step's gradients in the weights; return that of its loss.

        Every learned token of the step, `num_learned` in all processes, weighs the same, however
        the rows are cut into passes.
        """
        assert self._flat.grad is not None
        self._flat.grad.zero_()
        seed = self._config.seed * 1_000_003 + self.state.step + self._group.number * 2**40
        torch.manual_seed(seed % 2**63)
        size, total = self.state.micro_batch, torch.zeros((), device=self._device)
        for start in range(0, len(rows), size):
            chosen = rows[start : start + size]
            batch = collate(
                self._data.training, chosen, self._pad_id, is_packed=self._config.packing
            )
            loss = self._summed_loss(batch) / num_learned
            with torch.autograd.set_multithreading_enabled(False):  # one thread, one workspace
                (loss * self.state.loss_scale).backward()
            total += loss.detach()
        return float(total)  # not earlier: the host would wait for every pass

    def _summed_loss(self, batch: Batch) -> torch.Tensor:
        """By the kernels that were chosen, from a batch on the host."""
        if self._fast is not None:
            return self._fast.summed_loss(batch)
        return summed_loss(self._causal, batch.to(self._device))

    def _num_learned(self, rows: list[Packed]) -> int:
        return sum(self._data.training[i].num_learned for row in rows for i in row)

    def _rows_of(self, step: int) -> list[Packed]:
        """The rows of one step, from seed, epoch and step alone."""
        config = self._config
        epoch, index = divmod(step, self.steps.per_epoch)
        order = epoch_order(self.steps.rows, config.seed, epoch)
        if config.group_lengths:
            order = group_lengths(order, self._lengths, config.batch_size, config.seed, epoch)
        return order[index * config.batch_size : (index + 1) * config.batch_size]

    def _evaluate(self) -> None:
        """Note the held-out loss; keep the weights if they are the best so far."""
        if not self._data.evaluation:
            return
        state = self.state
        loss = self.held_out_loss()
        if not loss < _MAX_LOSS:  # NaN too
            self._end_diverged(f"the held-out loss after step {state.step} is {loss}")
            return
        state.evaluations.append({"step": state.step, "loss": loss, "perplexity": math.exp(loss)})
        if state.step and (state.best_loss is None or loss < state.best_loss):
            state.best_loss, state.best_step, state.num_worse = loss, state.step, 0
            self._best = self._taken()
        elif state.step:
            state.num_worse += 1
            state.is_stopped = 0 < self._config.patience <= state.num_worse
            if state.is_stopped:
                self._say(f"Stopped at step {state.step}: no better since step {state.best_step}")

    def _end_diverged(self, what: str) -> None:
        """End with the best adapter. ValueError where there is none yet."""
        state = self.state
        if state.best_loss is None:
            raise ValueError(
                f"{what}: lower learning_rate (now {self._config.learning_rate:g}), or set dtype "
                "to fp32"
            )
        self._say(f"{what}: the run ends with the adapter of step {state.best_step}")
        state.is_stopped = True

    def _save(self) -> None:
        if not self._group.is_first:
            return
        self._folder.save(
            Checkpoint(
                fingerprint=self._fingerprint(),
                state=self.state,
                adapter=self._taken(),
                best=self._best,
                optimizer=self._optimizer.state_dict(),
            )
        )

    def _taken(self) -> Tensors:
        """A copy of the adapter on the host."""
        return {
            name: weight.detach().to("cpu", copy=True) for name, weight in self._weights.items()
        }

    def _put(self, tensors: Tensors) -> None:
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(tensors[name])

    def _fingerprint(self) -> str:
        """Of all that decides the outcome; where it is read, written and kept does not."""
        free = {"out", "data", "eval_data", "base", "keep_checkpoints", "save_every", "save_dtype"}
        free |= {"eval_generations", "generation_tokens", "report_to"}
        settings = self._config.model_dump_json(exclude=free)
        return hashlib.sha256(
            f"{settings}{self._data.fingerprint}{self._base_digest}".encode()
        ).hexdigest()

    def _check_window(self) -> None:
        window = getattr(self._causal.config, "sliding_window", None)
        if self._config.packing and window and window < self._config.max_length:
            raise ValueError(
                f"packing to max_length {self._config.max_length} would pass over the base's "
                f"sliding window of {window} tokens; lower max_length to it"
            )


def make_optimizer(config: TrainConfig, weights: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over the adapter's weights."""
    options: dict[str, Any] = {"lr": config.learning_rate, "weight_decay": config.weight_decay}
    if config.optimizer == "adamw":
        return torch.optim.AdamW(weights, **options)
    bits = 8 if config.optimizer == "paged_adamw_8bit" else 32
    is_paged = weights[0].is_cuda  # without a GPU there is nothing to page
    optimizer: torch.optim.Optimizer = bnb_adamw.AdamW(
        weights, **options, optim_bits=bits, is_paged=is_paged
    )
    return optimizer
