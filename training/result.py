"""What a run leaves: a PEFT folder any tool reads, with a card and Turnout's own notes."""

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from adapters.folder import CONFIG_FILE, SIDECAR_FILE, WEIGHTS_FILE
from adapters.manifest import BaseShape
from server.versions import version_of
from training.checkpoint import CHECKPOINTS, RunState
from training.config import TrainConfig
from training.data import Dataset
from training.metrics import Generations
from training.progress import shortened
from training.qlora import trained
from training.render import Renderer
from training.rope import run_scaling

CARD_FILE, REPORT_FILE = "README.md", "report.html"
RESULT_FILES = (CONFIG_FILE, WEIGHTS_FILE, SIDECAR_FILE, CARD_FILE, REPORT_FILE)
PROBE = [{"role": "user", "content": "What is the capital of France?"}]
_NUM_SAMPLES, _CELL_WIDTH = 5, 200  # of the card's table of answers
_VERSIONS = ("turnout", "torch", "transformers", "peft", "bitsandbytes")

_CARD = """---
base_model: {base_name}
library_name: peft
pipeline_tag: text-generation
license: # fill in: the licence of this adapter, which the base's licence and the data's may limit
---
# {name}

A LoRA adapter for `{base_name}`, trained with `turnout train`.
What it is for and what it must not be used for: fill in.

| | |
| --- | --- |
| base | `{base_name}`, sha256 `{base_digest}` |
| trained on | {quantization}, activations in {dtype} |
| data | {num_training:,} rows, {num_evaluation:,} held out; fingerprint `{fingerprint}` |
| adapter | rank {rank}, alpha {alpha:g}{kind}, on {targets}; {num_trainable:,} parameters |
| RoPE | {rope} |
| run | {steps:,} steps of {batch_size} rows, {learning_rate:g} {schedule}, seed {seed} |
| held-out loss | {loss} |
{answers}
## Prompt format

The base's own chat template. A question comes to the model as

{prompt}

## Settings

{settings}

## Licences

- of the base: fill in
- of the data: fill in
- of this adapter: fill in
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """A finished run, as it is written down."""

    config: TrainConfig
    dataset: Dataset
    state: RunState
    generations: Generations | None
    base_digest: str
    dtype: str
    estimated_bytes: int
    peak_bytes: int

    @property
    def base_name(self) -> str:
        """What adapter_config.json calls the base: its folder's name, never a path."""
        return self.config.base.resolve().name


def write_adapter(model: PeftModel, outcome: Outcome, renderer: Renderer) -> None:
    """Put adapter_config.json, adapter_model.safetensors, turnout.json and README.md in place.

    They are written whole beside their place; the first, without which the folder is no adapter,
    comes last: an adapter without its notes would be served with the base's own RoPE.
    """
    config, weights = outcome.config, trained(model)
    num_trainable = sum(weight.numel() for weight in weights.values())
    model.peft_config["default"].base_model_name_or_path = outcome.base_name
    dtype = torch.bfloat16 if config.save_dtype == "bf16" else torch.float32
    for weight in weights.values():
        weight.data = weight.data.to(dtype)
    scratch = config.out / CHECKPOINTS / "result"
    shutil.rmtree(scratch, ignore_errors=True)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        # No look-up of the base by its name, which is no path.
        model.save_pretrained(str(scratch), save_embedding_layers=False)
    for weight in weights.values():
        weight.data = weight.data.float()
    notes = sidecar(outcome, renderer, num_trainable)
    text = json.dumps(notes, indent=2, ensure_ascii=False) + "\n"
    (scratch / SIDECAR_FILE).write_text(text, encoding="utf-8")
    card = model_card(outcome, renderer, num_trainable)
    (scratch / CARD_FILE).write_text(card, encoding="utf-8")
    for name in (WEIGHTS_FILE, SIDECAR_FILE, CARD_FILE, CONFIG_FILE):
        (scratch / name).replace(config.out / name)
    scratch.rmdir()


def sidecar(outcome: Outcome, renderer: Renderer, num_trainable: int) -> dict[str, Any]:
    """turnout.json: what PEFT's files cannot say, compared where the adapter is registered."""
    config, state, dataset = outcome.config, outcome.state, outcome.dataset
    shape = BaseShape.from_config(config.base, outcome.base_name, outcome.base_digest)
    template = renderer.tokenizer.chat_template
    training = {
        "base_digest": outcome.base_digest,
        "template_sha256": template and hashlib.sha256(template.encode()).hexdigest(),
        "probe": {"messages": PROBE, "ids": renderer.prompt_ids(PROBE)} if template else None,
        "data_fingerprint": dataset.fingerprint,
        "num_training": len(dataset.training),
        "num_evaluation": len(dataset.evaluation),
        "num_trainable": num_trainable,
        "quantization": config.quantization,
        "dtype": outcome.dtype,
        "seed": config.seed,
        "steps": state.step,
        "best_step": state.best_step or None,
        "held_out_loss": state.best_loss,
        "generations": _scores(outcome.generations),
        "num_processes": state.num_processes,
        "versions": {name: version_of(name) for name in _VERSIONS},
        "memory": {"estimated": outcome.estimated_bytes, "peak": outcome.peak_bytes},
        "settings": _settings(config),
    }
    scaling = run_scaling(config)
    rope = dict(shape.rope)
    if scaling is not None:
        rope = scaling.as_parameters(float(rope["rope_theta"]))
    return {"format": 1, "rope": rope, "chat_template": None, "training": training}


def model_card(outcome: Outcome, renderer: Renderer, num_trainable: int) -> str:
    """README.md: where the adapter comes from, how to prompt it, and blanks for its licences."""
    config, state = outcome.config, outcome.state
    kinds = (" by rsLoRA" if config.use_rslora else "") + (", DoRA" if config.use_dora else "")
    has_template = renderer.tokenizer.chat_template is not None
    prompt = (
        renderer.tokenizer.decode(renderer.prompt_ids(PROBE))
        if has_template
        else "plain text: the base has no chat template."
    )
    return _CARD.format(
        name=config.out.resolve().name,
        base_name=outcome.base_name,
        base_digest=outcome.base_digest,
        quantization=config.quantization.upper().replace("NONE", "16 bits"),
        dtype=outcome.dtype,
        num_training=len(outcome.dataset.training),
        num_evaluation=len(outcome.dataset.evaluation),
        fingerprint=outcome.dataset.fingerprint,
        rank=config.rank,
        alpha=config.lora_alpha,
        kind=kinds,
        targets=config.targets if isinstance(config.targets, str) else ", ".join(config.targets),
        num_trainable=num_trainable,
        rope=run_scaling(config) or "the base's",
        steps=state.step,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        schedule=config.schedule,
        seed=config.seed,
        loss=_loss_in_words(state),
        answers=_answers(outcome.generations),
        prompt=_indented(prompt),
        settings=_indented(_as_yaml(config)),
    )


def _loss_in_words(state: RunState) -> str:
    if state.best_loss is None:
        return "nothing was held out"
    before = f"; {state.evaluations[0]['loss']:.4f} before" if state.evaluations else ""
    return f"{state.best_loss:.4f}, at step {state.best_step}{before}"


def _scores(generations: Generations | None) -> dict[str, Any] | None:
    if generations is None:
        return None
    count, is_held_out = len(generations.samples), generations.is_held_out
    scores = {"base": dict(generations.before), "adapter": dict(generations.after)}
    return {"count": count, "is_held_out": is_held_out, **scores}


def _answers(generations: Generations | None) -> str:
    """The card's section on what base and adapter answer."""
    if generations is None:
        return ""
    lines = ["", "## Answers", "", f"Greedy, to {generations.rows}.", ""]
    lines += ["| | base | adapter |", "| --- | --- | --- |"]
    for name, before in generations.before.items():
        lines.append(f"| {name} | {before:.3g} | {generations.after[name]:.3g} |")
    lines += ["", "| question | base | adapter | reference |", "| --- | --- | --- | --- |"]
    for sample in generations.samples[:_NUM_SAMPLES]:
        cells = (sample.question, sample.before, sample.after, sample.reference)
        lines.append(f"| {' | '.join(map(_cell, cells))} |")
    return "\n".join([*lines, ""])


def _cell(text: str) -> str:
    """Text as it is in a cell of Markdown: no markup of its own."""
    return re.sub(r"([\\`*_\[\]<>|#~$])", r"\\\1", shortened(text, _CELL_WIDTH))


def _settings(config: TrainConfig) -> Mapping[str, Any]:
    """What was set, without the paths of one machine."""
    settings: dict[str, Any] = config.model_dump(mode="json", exclude_defaults=True)
    for name in ("base", "data", "eval_data", "out"):
        if name in settings:
            settings[name] = Path(settings[name]).name
    return settings


def _as_yaml(config: TrainConfig) -> str:
    """The settings as a YAML file that `--config` takes."""
    return "\n".join(f"{name}: {json.dumps(value)}" for name, value in _settings(config).items())


def _indented(text: str) -> str:
    """As a code block of Markdown."""
    return "\n".join(f"    {line}" for line in text.splitlines())
