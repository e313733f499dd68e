"""Argument names of other tools' tutorials, and what they are called here."""

import math
from collections.abc import Callable, Mapping
from typing import Any

MICRO_BATCH = 4  # the default of the setting

# Names of other tools' tutorials, and ours.
RENAMED = {
    "adam_weight_decay": "weight_decay",
    "base_model": "base",
    "cutoff_len": "max_length",
    "dataset_name": "data",
    "data_path": "data",
    "dataset_path": "data",
    "early_stopping_patience": "patience",
    "eval_steps": "eval_every",
    "group_by_length": "group_lengths",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "rank",
    "lora_target_modules": "targets",
    "lr": "learning_rate",
    "max_seq_len": "max_length",
    "max_seq_length": "max_length",
    "micro_batch_size": "micro_batch",
    "model_id": "base",
    "model_name": "base",
    "model_name_or_path": "base",
    "max_new_tokens": "generation_tokens",
    "neftune_noise_alpha": "neftune_alpha",
    "num_epochs": "epochs",
    "num_train_epochs": "epochs",
    "output_dir": "out",
    "per_device_train_batch_size": "micro_batch",
    "r": "rank",
    "sample_packing": "packing",
    "save_steps": "save_every",
    "save_total_limit": "keep_checkpoints",
    "sequence_len": "max_length",
    "sequence_length": "max_length",
    "target_modules": "targets",
    "train_file": "data",
    "use_gradient_checkpointing": "gradient_checkpointing",
    "val_set_size": "eval_fraction",
    "validation_file": "eval_data",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
}

# Names whose value means something else here: each gives our fields, or a complaint.
_Translation = Callable[[Any, Mapping[str, Any]], dict[str, Any]]


def _strategy(every: str) -> _Translation:
    def translate(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
        value = "no" if value is False else value  # as YAML reads it
        if value == "no" and every == "eval_every":
            return {"eval_fraction": 0.0}
        if value not in ("epoch", "steps"):
            raise ValueError(f"{value!r} is neither 'epoch' nor 'steps'; set {every}")
        return {every: 0} if value == "epoch" else {}

    return translate


def _switch(then: Mapping[str, Any], else_: Mapping[str, Any]) -> _Translation:
    """Null and auto are other tools' words for the default."""

    def translate(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
        if value in (None, "auto"):
            return {}
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is neither true nor false")
        return dict(then if value else else_)

    return translate


def _ignored(_: Any, __: Mapping[str, Any]) -> dict[str, Any]:
    return {}


def _always(*same: Any) -> _Translation:
    """A choice that is made here; another value is refused."""

    def translate(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
        if value not in same:
            raise ValueError(f"it is {value!r}; here it is {same[0]!r} in every run")
        return {}

    return translate


def _schedule(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    return {"schedule": "constant" if value == "constant_with_warmup" else value}


def _compute_dtype(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    known = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
    return {"dtype": known.get(str(value).removeprefix("torch."), value)}


def _accumulation(value: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    counts = {"it": value, "micro_batch": given.get("micro_batch", MICRO_BATCH)}
    for name, count in counts.items():
        if isinstance(count, bool) or not str(count).isdecimal():
            raise ValueError(f"{name} is {count!r}, which is no whole number")
    return {"batch_size": math.prod(map(int, counts.values()))}


def _optim(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    known = {
        "adamw_torch": "adamw",
        "adamw_torch_fused": "adamw",
        "adamw_hf": "adamw",
        "adamw_8bit": "paged_adamw_8bit",
        "adamw_bnb_8bit": "paged_adamw_8bit",
        "paged_adamw_32bit": "paged_adamw",
    }
    return {"optimizer": known.get(str(value), value)}


def _text_field(value: Any, _: Mapping[str, Any]) -> dict[str, Any]:
    if value != "text":
        raise ValueError(f"it is {value!r}; rename that column to 'text'")
    return {"format": "text"}


TRANSLATED: dict[str, _Translation] = {
    "assistant_only_loss": _switch({"loss": "assistant"}, {}),
    "bf16": _switch({"dtype": "bf16"}, {}),
    "bias": _always("none"),
    "bnb_4bit_compute_dtype": _compute_dtype,
    "bnb_4bit_quant_type": _always("nf4"),
    "bnb_4bit_use_double_quant": _always(True),
    "completion_only_loss": _switch({"loss": "completion"}, {"loss": "all"}),
    "dataset_text_field": _text_field,
    "eval_strategy": _strategy("eval_every"),
    "evaluation_strategy": _strategy("eval_every"),
    "fp16": _switch({"dtype": "fp16"}, {}),
    "gradient_accumulation_steps": _accumulation,
    "load_best_model_at_end": _always(True),
    "load_in_4bit": _switch({"quantization": "nf4"}, {"quantization": "none"}),
    "load_in_8bit": _always(False),
    "logging_steps": _ignored,  # every step is logged
    "lora_bias": _always("none", False),
    "lr_scheduler": _schedule,
    "lr_scheduler_type": _schedule,
    "optim": _optim,
    "save_strategy": _strategy("save_every"),
    "task_type": _always("CAUSAL_LM"),
    "train_on_inputs": _switch({"loss": "all"}, {"loss": "assistant"}),
}


def field_of(name: str) -> str:
    """Our name of a setting."""
    return RENAMED.get(name, name)


def translate(settings: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our names for all settings, and a hint for each old one; ValueError for a contradiction."""
    ours: dict[str, Any] = {}
    hints = []
    for name, value in settings.items():
        if name in TRANSLATED:
            continue
        field = field_of(name)
        if field in ours:
            raise ValueError(f"{field} is given twice, once as {name}")
        if field != name:
            hints.append(f"{name} is called {field} here")
        ours[field] = value
    for name in sorted(settings.keys() & TRANSLATED.keys()):  # these may look at what is renamed
        try:
            found = TRANSLATED[name](settings[name], ours)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        means = ", ".join(f"{field}: {value}" for field, value in found.items())
        hints.append(f"{name} is taken as {means or 'the default'}")
        for field, value in found.items():
            if ours.setdefault(field, value) != value:
                raise ValueError(f"{name} contradicts {field}: {ours[field]}")
    return ours, sorted(hints)
