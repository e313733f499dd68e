"""The base on the grid it is served on, and a LoRA over it (QLoRA, arXiv:2305.14314)."""

from server.quant import nf4  # first, since it quiets a logger of bitsandbytes

# isort: split
import difflib
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.nn import modules as bnb_modules
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from transformers import AutoConfig, AutoModelForCausalLM

from training.config import TrainConfig

Linears = dict[str, tuple[int, int]]  # full name -> (out, in)


def pick_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """bf16 where the hardware multiplies it, unless the operator says otherwise."""
    if wanted != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[wanted]
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if has_bf16 else torch.float16
    has_bf16 = torch.cpu._is_avx512_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def skeleton(base: Path) -> Any:
    """The base's modules without their weights."""
    if not (base / "config.json").is_file():
        raise ValueError(f"base is {str(base)!r}; it must be a folder that holds config.json")
    stored = json.loads((base / "config.json").read_text(encoding="utf-8"))
    model_type = stored.get("model_type")
    if stored.get("quantization_config"):
        raise ValueError(
            f"base is {str(base)!r}, which is quantized already; name the 16-bit checkpoint that "
            "it was made from"
        )
    if model_type not in ("mistral", "llama"):
        raise ValueError(f"{base}: model_type is {model_type!r}; mistral and llama are trained")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))


def find_linears(model: Any) -> Linears:
    """Every linear layer but the head."""
    head = model.get_output_embeddings()
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }


def load_base(
    folder: Path,
    quantization: str,
    dtype: torch.dtype,
    device: torch.device,
    *,
    is_packed: bool | None = None,
) -> Any:
    """The base, its linears on the NF4 grid unless `quantization` is "none".

    `is_packed` keeps the 4 bits in memory (by default on a GPU); else linears hold the values that
    the codes stand for, in `dtype`, as the server's do on a CPU: the same numbers either way.
    """
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", output_loading_info=True
    )
    model, found = loaded
    if found["missing_keys"]:  # transformers would draw them at random
        raise ValueError(f"the base {folder} lacks {', '.join(sorted(found['missing_keys'])[:3])}")
    model.requires_grad_(False)
    model.config.use_cache = False
    if quantization == "nf4":
        is_packed = device.type == "cuda" if is_packed is None else is_packed
        for name in find_linears(model):
            parent, _, leaf = name.rpartition(".")
            module: Any = model.get_submodule(name)
            if is_packed:
                module = packed_linear(module.weight.data, dtype, device)
                setattr(model.get_submodule(parent), leaf, module)
            else:
                module.weight.data = nf4.quantize(module.weight.data).dequantize(dtype)
        model.is_loaded_in_4bit = is_packed  # what PEFT asks before it wraps Linear4bit
    return model.to(device)


def packed_linear(weight: torch.Tensor, dtype: torch.dtype, device: torch.device) -> Any:
    """bitsandbytes' linear over a weight [out, in]; moving it to the device quantizes it."""
    packed: Any = bnb_modules.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        compute_dtype=dtype,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",  # else it would draw a weight of its own first
    )
    # Otherwise the first evaluation repacks the weight for a kernel that has no autograd, for good.
    packed.support_avx512bf16_for_cpu = False
    packed.weight = bnb_modules.Params4bit(
        weight,
        requires_grad=False,
        blocksize=nf4.GROUP_SIZE,
        compress_statistics=True,
        quant_type="nf4",
    )
    return packed.to(device)


def resolve_targets(config: TrainConfig, linears: Linears) -> list[str]:
    """The ends of the names of the linears to train, from a preset or as listed."""
    leaves = sorted({name.rpartition(".")[2] for name in linears})
    if not isinstance(config.targets, str):
        for target in config.targets:
            _check_known("targets", target, linears, leaves)
        return list(config.targets)
    part = {"all-linear": "", "attention": "attn", "mlp": "mlp"}[config.targets]
    split = [name.split(".") for name in linears]
    found = {leaf for *_, block, leaf in split if part in block}
    if not found:
        raise ValueError(f"targets is {config.targets!r}, but the base has no such linears")
    return sorted(found)


def trained_ranks(config: TrainConfig, linears: Linears) -> dict[str, int]:
    """The rank of each linear that gets an adapter. ValueError for an idle pattern."""
    targets = resolve_targets(config, linears)
    chosen = [name for name in linears if any(_ends(name, target) for target in targets)]
    ranks = {}
    for field, pattern in (
        ("alpha_pattern", config.alpha_pattern),
        ("rank_pattern", config.rank_pattern),
    ):
        try:
            keys = {name: get_pattern_key(list(pattern), name) for name in chosen}
        except re.error as error:
            raise ValueError(f"{field} has a key that is no regular expression: {error}") from None
        for key in set(pattern) - set(keys.values()):
            raise ValueError(f"{field} names {key!r}, which is no linear that is trained")
        ranks = {name: int(pattern.get(keys[name], config.rank)) for name in chosen}
    for name, rank in ranks.items():
        if not 1 <= rank <= 256:
            raise ValueError(f"rank_pattern gives {name} rank {rank}, not 1 to 256")
    return ranks


def count_trainable(config: TrainConfig, linears: Linears) -> int:
    """Exactly how many numbers the run trains."""
    total = 0
    for name, rank in trained_ranks(config, linears).items():
        out_features, in_features = linears[name]
        total += rank * (out_features + in_features) + out_features * config.use_dora
    return total


def add_adapter(model: Any, config: TrainConfig) -> PeftModel:
    """Wrap the base. What is trained is fp32, so that a resumed run is the same run."""
    linears = find_linears(model)
    trained_ranks(config, linears)  # checks the patterns
    lora = LoraConfig(
        r=config.rank,
        lora_alpha=_whole(config.lora_alpha),
        lora_dropout=config.dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        target_modules=resolve_targets(config, linears),
        rank_pattern=dict(config.rank_pattern),
        alpha_pattern={name: _whole(alpha) for name, alpha in config.alpha_pattern.items()},
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # PEFT's own call
        adapted = get_peft_model(model, lora, autocast_adapter_dtype=True)
    kinds = {weight.dtype for weight in trained(adapted).values()}
    assert kinds == {torch.float32}, f"PEFT made {kinds}: a resumed run would be another one"
    return adapted


def trained(model: PeftModel) -> dict[str, torch.nn.Parameter]:
    """The adapter's parameters, by name."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _whole(alpha: float) -> Any:
    """PEFT writes 32, not 32.0."""
    return int(alpha) if alpha == int(alpha) else alpha


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _check_known(field: str, target: str, linears: Mapping[str, Any], leaves: list[str]) -> None:
    if any(_ends(name, target) for name in linears):
        return
    close = difflib.get_close_matches(target, leaves, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"the base has {', '.join(leaves)}"
    raise ValueError(f"{field} names {target!r}, which is no linear of the base; {hint}")
