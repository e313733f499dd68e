"""RoPE scaling in training: the base's rotary embedding stretched before the first step."""

import json
from typing import Any

from adapters.manifest import BaseShape
from adapters.rope import RopeScaling
from training.config import TrainConfig


def run_scaling(config: TrainConfig) -> RopeScaling | None:
    """What the run trains with; None for the base's own rotary embedding.

    yarn stretches the length that the base was trained on, unless the settings name another.
    Raises ValueError, which names the setting, for what cannot be served.
    """
    if config.rope_scaling is None:
        return None
    rope = BaseShape.from_config(config.base, "base", "").rope
    kind = rope.get("rope_type", "default")
    if kind != "default":
        raise ValueError(f"rope_scaling: the base itself has {kind} scaling")
    text = (config.base / "config.json").read_text(encoding="utf-8")
    return RopeScaling.read(
        config.rope_scaling,
        theta=float(rope["rope_theta"]),
        max_positions=json.loads(text)["max_position_embeddings"],
        where="rope_scaling",
    )


def apply_scaling(model: Any, scaling: RopeScaling | None) -> None:
    """Give a transformers model the rotary embedding that its config has with this scaling."""
    if scaling is None:
        return
    theta = model.config.rope_parameters["rope_theta"]
    model.config.rope_parameters = scaling.as_parameters(theta)
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config).to(rotary.inv_freq.device)
