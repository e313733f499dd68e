"""Read PEFT's adapter_config.json (0.21): each field is served, harmless, or refused by name."""

import math
from dataclasses import dataclass
from typing import Any

from adapters.manifest import AdapterRefused, BaseShape, Limits, ModuleEntry, show
from adapters.strict_json import parse_json_object
from adapters.targets import Targets, first_pattern, select_modules

MAX_ALPHA = 1e6

# What these hold changes nothing in an adapter that is already trained.
_HARMLESS = {
    "auto_mapping",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "inference_mode",
    "loftq_config",
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "runtime_config",
}
_SERVED = {
    "alpha_pattern",
    "base_model_name_or_path",
    "exclude_modules",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "task_type",
    "use_dora",
    "use_rslora",
}
_REFUSED = {
    "alora_invocation_tokens": "activated LoRA is not served",
    "arrow_config": "Arrow routing is not served",
    "bias": "trained biases are not served",
    "fan_in_fan_out": "transposed weights are not served",
    "kasa_config": "KaSA changes the base's weights and is not served",
    "layer_replication": "replicated layers are not served",
    "lora_bias": "a bias on lora_B is not served",
    "megatron_config": "Megatron layers are not served",
    "modules_to_save": "fully trained modules are not served",
    "monteclora_config": "MonteCLoRA is not served",
    "target_parameters": "LoRA on bare parameters is not served",
    "trainable_token_indices": "trained tokens are not served",
    "use_bdlora": "block-diagonal LoRA is not served",
    "use_qalora": "QA-LoRA is not served",
    "velora_config": "VeLoRA is not served",
}
# These begin from the base's own weights and leave them unchanged; all others subtract from them.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")  # a tuple: the value may be unhashable


@dataclass(frozen=True, slots=True, kw_only=True)
class PeftConfig:
    """What an adapter_config.json comes to over one base."""

    modules: tuple[ModuleEntry, ...]
    declared_base: str | None  # what the config calls its base


def read_peft_config(text: bytes, base: BaseShape, limits: Limits) -> PeftConfig:
    """Work out rank, scaling and DoRA of each module, or refuse the config by name of field."""
    config = parse_json_object(text, "adapter_config.json")
    _check_fields(config)
    _check_kind(config)
    declared = _check_base(config, base, limits)
    modules = _modules(config, base, limits)
    return PeftConfig(modules=modules, declared_base=declared)


def _check_fields(config: dict[str, Any]) -> None:
    for field, value in config.items():
        if field in _REFUSED:
            if value not in (None, False, [], {}, "") and (field, value) != ("bias", "none"):
                raise AdapterRefused(field, f"{_REFUSED[field]}; it is {show(value)}")
        elif field not in _HARMLESS and field not in _SERVED:
            raise AdapterRefused(show(field)[1:-1], "is not a field of PEFT's LoraConfig")


def _check_kind(config: dict[str, Any]) -> None:
    if config.get("peft_type") != "LORA":
        raise AdapterRefused("peft_type", f"{show(config.get('peft_type'))} is not LORA")
    if config.get("task_type") not in (None, "CAUSAL_LM"):
        raise AdapterRefused("task_type", f"{show(config['task_type'])} is not CAUSAL_LM")
    init = config.get("init_lora_weights", True)
    if not isinstance(init, bool | None) and init not in _PLAIN_INITS:
        raise AdapterRefused(
            "init_lora_weights",
            f"{show(init)} trains over changed base weights, which the adapter does not hold; "
            "save it with PEFT's path_initial_model_for_weight_conversion",
        )


def _check_base(config: dict[str, Any], base: BaseShape, limits: Limits) -> str | None:
    declared, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(declared, str | None):
        raise AdapterRefused("base_model_name_or_path", f"{show(declared)} is not a string")
    if limits.allow_other_base:
        return declared
    if declared and not base.is_called(declared):
        raise AdapterRefused(
            "base_model_name_or_path",
            f"{show(declared)} is not this server's base ({show(base.name)})",
        )
    if revision not in (None, "", "main"):
        raise AdapterRefused(
            "revision", f"{show(revision)} of the base is not known to be this one"
        )
    return declared


def _modules(config: dict[str, Any], base: BaseShape, limits: Limits) -> tuple[ModuleEntry, ...]:
    """One entry per linear that the config targets, in the base's order."""
    use_dora, use_rslora = _flag(config, "use_dora"), _flag(config, "use_rslora")
    names = select_modules(_targets(config), base)
    ranks = _pattern(config, "rank_pattern", "r", names, 8)
    alphas = _pattern(config, "alpha_pattern", "lora_alpha", names, 8)
    entries = []
    for name, rank, alpha in zip(names, ranks, alphas, strict=True):
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise AdapterRefused("r", f"rank {show(rank)} of {name} is not a positive integer")
        if rank > limits.max_rank:
            raise AdapterRefused(
                "r", f"rank {show(rank)} of {name} is over the limit of {limits.max_rank}"
            )
        if not isinstance(alpha, int | float) or isinstance(alpha, bool) or abs(alpha) > MAX_ALPHA:
            raise AdapterRefused(
                "lora_alpha", f"{show(alpha)} of {name} is not a number within ±{MAX_ALPHA:.0f}"
            )
        _, _, layer, linear = name.split(".", 3)
        scaling = alpha / (math.sqrt(rank) if use_rslora else rank)
        entries.append(
            ModuleEntry(
                layer=int(layer), linear=linear, rank=rank, scaling=scaling, use_dora=use_dora
            )
        )
    return tuple(entries)


def _pattern(
    config: dict[str, Any], field: str, default_field: str, names: list[str], default: int
) -> list[Any]:
    """The value that `field`, or failing that `default_field`, gives each module."""
    pattern = config.get(field) or {}
    if not isinstance(pattern, dict):
        raise AdapterRefused(field, f"{show(pattern)} is not an object")
    chosen = first_pattern(field, list(pattern), names)
    fallback = config.get(default_field, default)
    return [pattern[chosen[name]] if name in chosen else fallback for name in names]


def _flag(config: dict[str, Any], field: str) -> bool:
    value = config.get(field, False)
    if not isinstance(value, bool):
        raise AdapterRefused(field, f"{show(value)} is neither true nor false")
    return value


def _targets(config: dict[str, Any]) -> Targets:
    target_modules = _names(config, "target_modules")
    layers, pattern = _layers(config), _names(config, "layers_pattern")
    if isinstance(target_modules, str) and (layers is not None or pattern):
        field = "layers_to_transform" if layers is not None else "layers_pattern"
        raise AdapterRefused(field, "PEFT takes it only with a list of target_modules")
    if pattern and layers is None:
        raise AdapterRefused("layers_pattern", "PEFT takes it only with layers_to_transform")
    return Targets(
        target_modules=target_modules,
        exclude_modules=_names(config, "exclude_modules"),
        layers_to_transform=layers,
        layers_pattern=(pattern,) if isinstance(pattern, str) else pattern or (),
    )


def _names(config: dict[str, Any], field: str) -> str | tuple[str, ...] | None:
    """A string, a list of strings, or nothing."""
    value = config.get(field)
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise AdapterRefused(field, f"{show(value)} is neither a string nor a list of strings")
    return tuple(value)


def _layers(config: dict[str, Any]) -> tuple[int, ...] | None:
    value = config.get("layers_to_transform")
    items = value if isinstance(value, list) else [value]
    if value is None:
        return None
    if not all(isinstance(item, int) and not isinstance(item, bool) for item in items):
        raise AdapterRefused("layers_to_transform", f"{show(value)} is not a list of layer numbers")
    return tuple(items)
