"""What a merged model takes, from the base's shapes alone."""

import json
from pathlib import Path

_GROUP = 128  # of the estimate; 64 takes 4 % more, 32 takes 11 %


def weight_set_bytes(base: Path) -> int:
    """GPU memory of a 4-bit GPTQ model beside the checkpoint in `base`.

    Its linears: embeddings, head and norms are the base's own.
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    hidden, intermediate = int(config["hidden_size"]), int(config["intermediate_size"])
    num_heads = config["num_attention_heads"]
    head_dim = config.get("head_dim") or hidden // num_heads
    kv_out = (config.get("num_key_value_heads") or num_heads) * head_dim
    layer = hidden * (2 * num_heads * head_dim + 2 * kv_out) + 3 * hidden * intermediate
    per_weight = 0.5 + (2 + 0.5) / _GROUP  # 4 bits; a 16-bit scale and a 4-bit zero for each group
    return int(config["num_hidden_layers"] * layer * per_weight)
