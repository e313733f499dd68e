from pathlib import Path

import torch

from adapters.registry import Registry
from server.adapter_admin import base_shape
from server.api.tokenizer import TextCodec
from server.bench.reference import register_adapters, save_reference_base
from server.config import ModelConfig
from server.model.loader import Checkpoint
from server.model.spec import FUSED, read_spec

SMALL = {
    "num_hidden_layers": 10,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 100,
}


def test_the_reference_has_every_tensor_of_a_mistral_and_a_word_for_each_token(
    tmp_path: Path,
) -> None:
    spec = save_reference_base(tmp_path / "base", torch.device("cpu"), **SMALL)
    assert spec == read_spec(tmp_path / "base")
    assert (spec.num_layers, spec.sliding_window) == (10, 4096)
    checkpoint = Checkpoint(tmp_path / "base")
    for name in (name for names in FUSED.values() for name in names):
        tensor = checkpoint.tensor(f"model.layers.9.{name}.weight")
        assert (tensor.shape, tensor.dtype) == (spec.linear_shape(name), torch.bfloat16)
        assert 0.015 < tensor.float().std() < 0.025
    assert checkpoint.tensor("lm_head.weight").shape == (100, 64)
    codec = TextCodec.load(tmp_path / "base")
    assert len(codec._pieces) == 100


def test_its_adapters_have_the_ranks_asked_for_and_digests_of_their_own(tmp_path: Path) -> None:
    spec = save_reference_base(tmp_path / "base", torch.device("cpu"), **SMALL)
    refs = register_adapters(tmp_path / "store", tmp_path / "base", spec, [4, 4, 16])
    assert [ref.num_rank_rows for ref in refs] == [4, 4, 16]
    assert len({ref.digest for ref in refs}) == 3
    registry = Registry.open(tmp_path / "store", base_shape(ModelConfig(path=tmp_path / "base")))
    assert [registry.lease(f"a{index}").revision.digest for index in range(3)] == [
        ref.digest for ref in refs
    ]
    registry.close()
