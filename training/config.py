"""Everything a training run can be told: a closed schema, read from YAML and the command line."""

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from training.old_names import MICRO_BATCH, RENAMED, field_of, translate

TargetPreset = Literal["all-linear", "attention", "mlp"]
Tracker = Literal["tensorboard", "wandb", "mlflow"]
_PATHS = ("base", "data", "eval_data", "out")


class TrainConfig(BaseModel):
    """One run. Two equal configs over equal data give equal adapters on a CPU."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    base: Path = Field(description="Checkpoint folder of the base.")
    data: Path = Field(description="Rows: .jsonl, .json, .csv, .parquet or a datasets folder.")
    out: Path = Field(description="Folder for the adapter, its report and its checkpoints.")

    # Rows
    format: Literal["auto", "instruction", "chat", "prompt", "text"] = Field(
        default="auto", description="What a row is; auto: by its fields, row by row."
    )
    system: str | None = Field(
        default=None, description="System prompt of instruction rows, and of chats without one."
    )
    loss: Literal["assistant", "completion", "all"] = Field(
        default="assistant",
        description="Tokens that count: every reply, the last reply alone, or every token.",
    )
    max_length: int = Field(default=1024, ge=8, description="Tokens of a row, or of a packed row.")
    too_long: Literal["cut", "drop"] = Field(
        default="cut", description="What happens to the end of a row past max_length, or to it."
    )
    eval_data: Path | None = Field(
        default=None, description="Evaluation rows of their own; equal training rows are left out."
    )
    eval_fraction: float = Field(
        default=0.05, ge=0, le=0.5, description="Else: share of the rows held out; 0: none."
    )
    packing: bool = Field(
        default=False, description="Fill rows to max_length with several documents, kept apart."
    )
    group_lengths: bool = Field(
        default=False, description="Rows of like length in one micro-batch, to pad less."
    )

    # LoRA
    quantization: Literal["nf4", "none"] = Field(
        default="nf4", description="The base as it is served: 4 bits, or the checkpoint's 16."
    )
    rank: int = Field(default=16, ge=1, le=256, description="LoRA's r.")
    alpha: float | None = Field(default=None, gt=0, description="Default: twice the rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="On the input of lora_a.")
    use_rslora: bool = Field(
        default=False, description="Scaling alpha / sqrt(rank) instead of alpha / rank."
    )
    use_dora: bool = Field(default=False, description="Train each output's magnitude apart.")
    targets: TargetPreset | tuple[str, ...] = Field(
        default="all-linear", description="all-linear, attention, mlp, or names of linears."
    )
    rank_pattern: dict[str, int] = Field(
        default_factory=dict, description="Ranks of single linears, by the end of their name."
    )
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=dict, description="The same for alpha."
    )
    rope_scaling: dict[str, Any] | None = Field(
        default=None,
        description="Longer context: type (linear or yarn), factor; served with the adapter.",
    )

    # The run
    epochs: int = Field(default=3, ge=1, description="Times each row is seen.")
    max_steps: int = Field(
        default=0, ge=0, description="Exactly so many, whatever epochs says; 0: by epochs."
    )
    batch_size: int = Field(default=8, ge=1, description="Rows in one optimizer step.")
    micro_batch: int = Field(
        default=MICRO_BATCH, ge=1, description="Rows in one pass; halved if too many."
    )
    learning_rate: float = Field(default=2e-4, gt=0, le=1, description="At its highest.")
    schedule: Literal["cosine", "linear", "constant"] = Field(
        default="cosine", description="How the rate falls after the warm-up."
    )
    warmup: float = Field(
        default=0.03, ge=0, description="Steps of linear warm-up; below 1: share of all steps."
    )
    optimizer: Literal["adamw", "paged_adamw_8bit", "paged_adamw"] = Field(
        default="adamw", description="32-bit AdamW, or bitsandbytes' paged ones (8 or 32 bits)."
    )
    weight_decay: float = Field(default=0.0, ge=0, le=1, description="AdamW's.")
    max_grad_norm: float = Field(default=1.0, ge=0, description="Clip above it; 0: never.")
    neftune_alpha: float = Field(
        default=0.0, ge=0, description="Noise on embeddings (arXiv:2310.05914); 5 is usual."
    )
    dtype: Literal["auto", "bf16", "fp16", "fp32"] = Field(
        default="auto",
        description="Of activations; auto: bf16 where the hardware has it, else fp16 on a GPU.",
    )
    gradient_checkpointing: bool | None = Field(
        default=None, description="Recompute layers to save memory. Default: on a GPU."
    )
    kernels: Literal["auto", "fast", "reference"] = Field(
        default="auto",
        description="The fast step, or PyTorch's modules; auto: fast on a GPU where it can be.",
    )
    seed: int = Field(default=0, ge=0, lt=2**31, description="Of everything random.")

    # Evaluation and checkpoints
    eval_every: int = Field(default=0, ge=0, description="Steps; 0: after each epoch.")
    patience: int = Field(
        default=0, ge=0, description="Stop after so many evaluations without a better one; 0: no."
    )
    save_every: int = Field(default=0, ge=0, description="Steps; 0: after each epoch.")
    keep_checkpoints: int = Field(default=2, ge=1, description="Newest ones that stay.")
    save_dtype: Literal["bf16", "fp32"] = Field(default="fp32", description="Of the adapter.")
    eval_generations: int = Field(
        default=32, ge=0, description="Rows that base and adapter answer in the end; 0: none."
    )
    generation_tokens: int = Field(default=256, ge=1, description="Most tokens of such an answer.")
    report_to: tuple[Tracker, ...] | Literal["auto", "none"] = Field(
        default="auto",
        description="tensorboard, wandb, mlflow or none; auto: TensorBoard where installed.",
    )

    @property
    def lora_alpha(self) -> float:
        """Alpha, given or by rank."""
        return 2.0 * self.rank if self.alpha is None else self.alpha

    @model_validator(mode="after")
    def _check(self) -> "TrainConfig":
        if self.packing and self.group_lengths:
            raise ValueError("packing and group_lengths exclude each other; packing pads less")
        if not self.targets:
            raise ValueError("targets is empty; name all-linear, attention, mlp, or linears")
        if self.patience and not (self.eval_data or self.eval_fraction):
            raise ValueError("patience needs eval_data or eval_fraction above 0")
        return self


def make_config(settings: Mapping[str, Any]) -> tuple[TrainConfig, list[str]]:
    """Check the settings; return the config and a hint for each old name among them.

    Raises ValueError that names the field, its value and what would do.
    """
    ours, hints = translate(settings)
    for name in ours:
        if name not in TrainConfig.model_fields:
            raise ValueError(f"{name!r} is not a setting of a training run{_nearest(name)}")
        if isinstance(ours[name], bool) and not _is_switch(name):
            raise ValueError(f"{name} is {ours[name]}; it needs a value, it is no switch")
    for name, presets in (("targets", get_args(TargetPreset)), ("report_to", ("auto", "none"))):
        if isinstance(ours.get(name), str) and ours[name] not in presets:
            ours[name] = tuple(part.strip() for part in ours[name].split(","))
    try:
        return TrainConfig.model_validate(ours), hints
    except ValidationError as error:
        raise ValueError(_complaint(error)) from None


def read_settings(path: Path) -> dict[str, Any]:
    """Read a YAML file; paths in it are relative to its folder."""
    try:
        text = path.read_text(encoding="utf-8")
        settings = yaml.safe_load(text)
        _check_named_once(yaml.compose(text, yaml.SafeLoader))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from None
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ValueError(f"{path} must hold settings, a line each, as `rank: 16`")
    for name, value in settings.items():
        if field_of(name) in _PATHS and isinstance(value, str):
            settings[name] = str(path.parent / value)
    return settings


def parse_options(words: list[str]) -> dict[str, Any]:
    """`--rank 8 --use-dora --loss=all` as settings; a bare name is true.

    Values are read as YAML, save the system prompt and paths, which are taken as they are. Raises
    ValueError for a word that belongs to no option, and for an option given twice.
    """
    settings: dict[str, Any] = {}
    index = 0
    while index < len(words):
        word = words[index]
        if not word.startswith("--") or word == "--":
            raise ValueError(f"{word!r} belongs to no option")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        index += 1
        if not equals and index < len(words) and not words[index].startswith("--"):
            text, equals = words[index], "="
            index += 1
        if name.startswith("no_") and name[3:] in TrainConfig.model_fields and not equals:
            name, text, equals = name[3:], "false", "="
        if name in settings:
            raise ValueError(f"--{name.replace('_', '-')} is given twice")
        settings[name] = _value(name, text) if equals else True
    return settings


def _value(name: str, text: str) -> Any:
    """An option's value: YAML would cut a prompt at ` #` and join its lines."""
    if field_of(name) in (*_PATHS, "system") and text != "null":
        return text
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        option = name.replace("_", "-")
        raise ValueError(f"--{option} is {text!r}, which is not YAML: {error}") from None


def _check_named_once(settings: yaml.Node | None) -> None:
    """YAML would take the last of several lines for one setting."""
    if isinstance(settings, yaml.MappingNode):
        names = [key.value for key, _ in settings.value]
        for index, name in enumerate(names):
            if name in names[:index]:
                raise yaml.YAMLError(f"{name} is given twice")


def _is_switch(name: str) -> bool:
    kind = TrainConfig.model_fields[name].annotation
    return bool in (kind, *get_args(kind))


def _nearest(name: str) -> str:
    """What the writer may have meant, as the end of a complaint."""
    known = {**dict.fromkeys(TrainConfig.model_fields, ""), **RENAMED}
    found = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.5)
    return f"; did you mean {known[found[0]] or found[0]!r}?" if found else ""


def _complaint(error: ValidationError) -> str:
    """The first of pydantic's complaints, in one line."""
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"][:1])
    if first["type"] == "missing":
        return f"{name} is missing: --{name.replace('_', '-')} or a line in the YAML file"
    if not name:
        return first["msg"].removeprefix("Value error, ")
    return f"{name} is {first['input']!r}: {first['msg'][0].lower()}{first['msg'][1:]}"
