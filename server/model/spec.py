"""What a checkpoint's config.json says about the base, and which bases we can run."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FUSED = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}  # one matrix each at run time -> the linears that are stacked in it, in order


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The shape of a Mistral-family decoder."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    tie_word_embeddings: bool
    eos_token_ids: tuple[int, ...]

    def linear_shape(self, name: str) -> tuple[int, int]:
        """(out, in) of a linear such as `mlp.down_proj`."""
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return {
            "self_attn.q_proj": (q_width, self.hidden_size),
            "self_attn.k_proj": (kv_width, self.hidden_size),
            "self_attn.v_proj": (kv_width, self.hidden_size),
            "self_attn.o_proj": (self.hidden_size, q_width),
            "mlp.gate_proj": (self.intermediate_size, self.hidden_size),
            "mlp.up_proj": (self.intermediate_size, self.hidden_size),
            "mlp.down_proj": (self.hidden_size, self.intermediate_size),
        }[name]

    def out_splits(self, group: str) -> tuple[int, ...]:
        """Output features of each linear stacked in a fused group."""
        return tuple(self.linear_shape(name)[0] for name in FUSED[group])

    def in_features(self, group: str) -> int:
        """Input features of a fused group."""
        return self.linear_shape(FUSED[group][0])[1]


def read_spec(folder: Path) -> ModelSpec:
    """Read a checkpoint folder; ValueError names what we cannot run."""
    config = json.loads((folder / "config.json").read_text())
    try:
        return _spec(folder, config)
    except KeyError as error:
        raise ValueError(f"{folder}: config.json does not say {error}") from None


def _spec(folder: Path, config: dict[str, Any]) -> ModelSpec:
    architecture = (config.get("architectures") or ["?"])[0]
    if architecture not in ("MistralForCausalLM", "LlamaForCausalLM"):
        raise ValueError(f"{folder}: architecture {architecture} is not MistralForCausalLM")
    for field in ("attention_bias", "mlp_bias"):
        if config.get(field):
            raise ValueError(f"{folder}: {field} is not supported")
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"{folder}: hidden_act {config['hidden_act']!r} is not silu")
    num_heads = config["num_attention_heads"]
    return ModelSpec(
        num_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_heads=num_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_heads,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_heads,
        vocab_size=config["vocab_size"],
        max_positions=config["max_position_embeddings"],
        rms_norm_eps=config["rms_norm_eps"],
        rope_theta=_rope_theta(folder, config),
        sliding_window=_sliding_window(architecture, config),
        tie_word_embeddings=bool(config.get("tie_word_embeddings")),
        eos_token_ids=_eos_token_ids(folder, config),
    )


def _sliding_window(architecture: str, config: dict[str, Any]) -> int | None:
    """As transformers takes it: Mistral's is 4,096 where nothing is said; Llama has none."""
    found: int | None = config.get("sliding_window", 4096)
    return found if architecture == "MistralForCausalLM" else None


def _rope_theta(folder: Path, config: dict[str, Any]) -> float:
    """transformers 5 writes rope_parameters; before it, rope_theta and rope_scaling."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"{folder}: RoPE scaling {kind!r} of the base is not supported")
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)


def _eos_token_ids(folder: Path, config: dict[str, Any]) -> tuple[int, ...]:
    generation = folder / "generation_config.json"
    found = json.loads(generation.read_text()) if generation.exists() else {}
    eos = found.get("eos_token_id", config.get("eos_token_id"))
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list) else (eos,)
