"""A random base made where it is measured, layer by layer in 4 bits, and rows to train it on."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, MistralConfig

from training.packing import Batch, collate, pack
from training.qlora import find_linears, packed_linear
from training.render import Example

STD = 0.02  # of every matrix; norms are 1
NUM_WORDS = 256  # different tokens in the rows, so that there is something to learn


def shape_7b(num_layers: int = 32) -> MistralConfig:
    """Mistral-7B-v0.1's."""
    return MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=num_layers,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=32768,
        sliding_window=None,
        tie_word_embeddings=False,
        rms_norm_eps=1e-5,
        use_cache=False,
    )


def random_base(config: MistralConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """The model as `qlora.load_base` gives it, packed; no matrix is ever held whole but one."""
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    generator = torch.Generator(device).manual_seed(0)

    def drawn(shape: torch.Size) -> torch.Tensor:
        empty = torch.empty(shape, dtype=dtype, device=device)
        return empty.normal_(std=STD, generator=generator) if len(shape) == 2 else empty.fill_(1)

    for name in find_linears(model):
        parent, _, leaf = name.rpartition(".")
        weight = drawn(model.get_submodule(name).weight.shape)
        setattr(model.get_submodule(parent), leaf, packed_linear(weight, dtype, device))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            parent, _, leaf = name.rpartition(".")
            ready = torch.nn.Parameter(drawn(parameter.shape), requires_grad=False)
            setattr(model.get_submodule(parent), leaf, ready)
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True
    return model


def full_batches(count: int, num_rows: int, length: int) -> list[Batch]:
    """Batches whose rows hold one document of `length` tokens each."""
    examples = _examples([length] * (count * num_rows))
    return [
        collate(examples, [(i,) for i in range(start, start + num_rows)], 0, is_packed=False)
        for start in range(0, len(examples), num_rows)
    ]


def short_batches(
    count: int, num_rows: int, length: int, mean: int, *, is_packed: bool
) -> list[Batch]:
    """The same from documents of `mean` tokens on average, a row each or packed into rows."""
    generator = torch.Generator().manual_seed(1)
    num_documents = count * num_rows * (length // mean if is_packed else 1)
    spread = torch.rand(num_documents, generator=generator)
    lengths = [max(16, int(2 * mean * float(share))) for share in spread]
    examples = _examples(lengths)
    rows = pack(lengths, length) if is_packed else [(i,) for i in range(num_documents)]
    batches = [
        collate(examples, rows[start : start + num_rows], 0, is_packed=is_packed)
        for start in range(0, len(rows), num_rows)
    ]
    return batches[:count]


def _examples(lengths: list[int]) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randperm(32000, generator=generator)[:NUM_WORDS]
    return [
        Example(
            tuple(words[torch.randint(NUM_WORDS, (length,), generator=generator)].tolist()),
            (True,) * length,
            False,
        )
        for length in lengths
    ]
