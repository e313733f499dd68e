"""Mistrals small enough for a test, with weights large enough to matter."""

from pathlib import Path
from typing import Any

import torch
import transformers

_SMALL = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "sliding_window": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def random_mistral(
    folder: Path,
    *,
    std: float = 0.15,  # transformers' 0.02 would leave every next token equally likely
    has_random_norms: bool = False,
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> Path:
    """Save one to `folder`; keywords are MistralConfig's, by default those of `tiny_base`."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = transformers.MistralConfig(**{**_SMALL, **config})
        model: Any = transformers.MistralForCausalLM(shape)  # its types know no `to(dtype)`
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(std=std)
                elif has_random_norms:
                    parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder)
    return folder
