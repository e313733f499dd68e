"""The training loop: a run is a function of its config and data, however often it is killed."""

import hashlib
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from bitsandbytes.optim import adamw as bnb_adamw
from peft import PeftModel

from training.checkpoint import CHECKPOINTS, Checkpoint, CheckpointFolder, RunState, Tensors
from training.config import TrainConfig
from training.data import Dataset
from training.loss import add_noise, summed_loss
from training.packing import Packed, collate, epoch_order, group_lengths, pack
from training.qlora import trained
from training.render import Example

OnStep = Callable[[RunState], None]
Say = Callable[[str], None]
Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Steps:
    """How a run divides into optimizer steps."""

    rows: tuple[Packed, ...]  # of one epoch
    per_epoch: int
    total: int
    warmup: int

    @classmethod
    def plan(cls, config: TrainConfig, examples: tuple[Example, ...]) -> "Steps":
        """Pack where asked, and count."""
        lengths = [len(example.ids) for example in examples]
        rows = (
            pack(lengths, config.max_length)
            if config.packing
            else [(i,) for i in range(len(lengths))]
        )
        per_epoch = math.ceil(len(rows) / config.batch_size)
        total = config.max_steps or per_epoch * config.epochs
        warmup = config.warmup * total if config.warmup < 1 else config.warmup
        return cls(rows=tuple(rows), per_epoch=per_epoch, total=total, warmup=math.ceil(warmup))

    def rate(self, step: int, schedule: str) -> float:
        """The learning rate of a step as a factor of the highest: never 0, never above 1."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        if schedule == "constant":
            return 1.0
        done = (step - self.warmup) / max(1, self.total - self.warmup)
        return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done


class Trainer:
    """Owns the adapter's weights, their optimizer and the run's state.

    Invariant: after `step` steps all three, bit for bit on a CPU, are what config and data give;
    each step seeds its own randomness, so nothing else need be kept.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: PeftModel,
        dataset: Dataset,
        *,
        pad_id: int,
        device: torch.device,
        say: Say = lambda _: None,
        on_step: OnStep = lambda _: None,
    ) -> None:
        self._config, self._model, self._data = config, model, dataset
        self._pad_id, self._device, self._say, self._on_step = pad_id, device, say, on_step
        causal: Any = model.base_model.model
        self._causal = causal
        self._check_window()
        self.steps = Steps.plan(config, dataset.training)
        self._lengths = [len(example.ids) for example in dataset.training]
        self._weights = trained(model)
        self._optimizer = make_optimizer(config, list(self._weights.values()))
        self._folder = CheckpointFolder(config.out / CHECKPOINTS, config.keep_checkpoints)
        self.state = RunState(micro_batch=min(config.micro_batch, config.batch_size))
        self._best: Tensors | None = None
        if config.neftune_alpha:
            add_noise(self._causal, config.neftune_alpha)
        is_saving = config.gradient_checkpointing
        if device.type == "cuda" if is_saving is None else is_saving:
            with warnings.catch_warnings(action="ignore", category=FutureWarning):
                # Its new name, activation_checkpointing_enable, is younger than what we support.
                causal.gradient_checkpointing_enable({"use_reentrant": False})

    def resume(self) -> bool:
        """Go back to the newest checkpoint of this very run; False where there is none."""
        found = self._folder.load(self._fingerprint())
        if found is None:
            return False
        self.state, self._best = found.state, found.best
        self._put(found.adapter)
        self._optimizer.load_state_dict(found.optimizer)
        return True

    def run(self) -> RunState:
        """Train to the end or to early stopping, and leave the best adapter in the model."""
        state, config = self.state, self._config
        if not state.step and not state.evaluations:
            self._evaluate()
        while state.step < self.steps.total and not state.is_stopped:
            self._step()
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
        self._model.eval()
        total, count = 0.0, 0
        rows = [(i,) for i in range(len(self._data.evaluation))]
        rows.sort(key=lambda row: len(self._data.evaluation[row[0]].ids))
        with torch.no_grad():
            for start in range(0, len(rows), self.state.micro_batch):
                chosen = rows[start : start + self.state.micro_batch]
                batch = collate(self._data.evaluation, chosen, self._pad_id, is_packed=False)
                count += batch.num_learned
                total += float(summed_loss(self._causal, batch.to(self._device)))
        self._model.train()
        return total / count

    def _step(self) -> None:
        """One optimizer step."""
        state, config = self.state, self._config
        started = time.perf_counter()
        rows = self._rows_of(state.step)
        self._model.train()
        loss, num_tokens, num_learned = self._shrinking(lambda: self._gradients(rows))
        rate = config.learning_rate * self.steps.rate(state.step, config.schedule)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        norm = torch.nn.utils.clip_grad_norm_(
            self._weights.values(), config.max_grad_norm or math.inf
        )
        self._optimizer.step()
        state.step += 1
        state.history.append(
            {
                "step": state.step,
                "loss": loss,
                "learning_rate": rate,
                "grad_norm": float(norm),
                "tokens": num_tokens,
                "learned": num_learned,
                "seconds": time.perf_counter() - started,
            }
        )

    def _shrinking(self, work: Callable[[], Result]) -> Result:
        """Do the work, again with half the rows in a pass for as long as memory runs out."""
        while True:
            try:
                return work()
            except torch.OutOfMemoryError:
                if self.state.micro_batch == 1:
                    raise ValueError(
                        f"memory is too small for one row of {self._config.max_length} tokens; "
                        "lower max_length, or set gradient_checkpointing"
                    ) from None
                self.state.micro_batch //= 2
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            self._say(
                f"out of memory: {self.state.micro_batch} rows in a pass from here on; a step "
                f"still has {self._config.batch_size}"
            )

    def _gradients(self, rows: list[Packed]) -> tuple[float, int, int]:
        """Leave the gradients of the step's mean loss in the weights; loss, tokens, learned ones.

        Every learned token of the step weighs the same, however the rows are cut into passes.
        """
        self._optimizer.zero_grad()
        torch.manual_seed((self._config.seed * 1_000_003 + self.state.step) % 2**63)
        size = self.state.micro_batch
        batches = [
            collate(
                self._data.training,
                rows[start : start + size],
                self._pad_id,
                is_packed=self._config.packing,
            )
            for start in range(0, len(rows), size)
        ]
        num_learned = sum(batch.num_learned for batch in batches)
        total = 0.0
        for batch in batches:
            loss = summed_loss(self._causal, batch.to(self._device)) / num_learned
            loss.backward()
            total += loss.item()
        num_tokens = sum(self._lengths[i] for row in rows for i in row)
        return total, num_tokens, num_learned

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
        loss = self._shrinking(self.held_out_loss)
        state.evaluations.append({"step": state.step, "loss": loss, "perplexity": math.exp(loss)})
        if state.step and (state.best_loss is None or loss < state.best_loss):
            state.best_loss, state.best_step, state.num_worse = loss, state.step, 0
            self._best = self._taken()
        elif state.step:
            state.num_worse += 1
            state.is_stopped = 0 < self._config.patience <= state.num_worse

    def _save(self) -> Path:
        return self._folder.save(
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
        """Of all that decides the outcome; where it is written and kept does not."""
        free = {"out", "data", "eval_data", "base", "keep_checkpoints", "save_every", "save_dtype"}
        settings = self._config.model_dump_json(exclude=free)
        return hashlib.sha256(f"{settings}{self._data.fingerprint}".encode()).hexdigest()

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
