"""A GGUF file holds the merged model: read by transformers, by our own reader, and bit by bit."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from gguf import GGMLQuantizationType, GGUFReader, Keys, TokenType
from rich.console import Console
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from server.default_base import convert, ensure_default_base, split_halves
from tests.conftest import MakeAdapter
from tests.training.test_merge_oracle import logits, merge, options, quiet
from training import gguf_export
from training.gguf_export import compare, export, interleave_halves
from training.merge_checkpoint import Checkpoint

CORPUS = ["the train leaves at 12:30", "a turnout sends each train down its own line"] * 3


def add_tokenizer(folder: Path, digits: bool = True) -> None:
    """Byte-level BPE with digits apart, as SmolLM2's; some of the model's 256 ids are not used."""
    tokenizer = Tokenizer(models.BPE())
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False)
    parts = [pre_tokenizers.Digits(individual_digits=True), bytes_] if digits else [bytes_]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(parts)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=80, special_tokens=["<pad>", "<s>", "</s>"])
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([AddedToken("<tool>", special=False)])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "pad_token": "<pad>"}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": "THEIRS"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def merged(tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> Path:
    """A merged model with a tokenizer."""
    out = tmp_path / "merged"
    merge(options(tiny_base, make_adapter(target_modules="all-linear"), out))
    add_tokenizer(out)
    return out


def field(reader: GGUFReader, key: str) -> Any:
    found = reader.get_field(key)
    assert found is not None, key
    return found.contents()


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.02), ("q8_0", 0.4)])
def test_transformers_reads_the_file_and_answers_as_the_merged_model(
    kind: str, tolerance: float, merged: Path, tmp_path: Path
) -> None:
    export(merged, tmp_path / "model.gguf", kind, quiet())

    load = transformers.AutoModelForCausalLM.from_pretrained
    found = load(tmp_path, gguf_file="model.gguf", dtype=torch.float32).eval()
    expected = load(merged, dtype=torch.float32).eval()
    assert (logits(found) - logits(expected)).abs().max() < tolerance  # logits of about 10
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "model.gguf"}


def test_our_own_reader_makes_the_same_checkpoint_of_it(merged: Path, tmp_path: Path) -> None:
    config = json.loads((merged / "config.json").read_text())
    weights = load_file(merged / "model.safetensors")
    tied = {name: weight for name, weight in weights.items() if name != "lm_head.weight"}
    (merged / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    tied = {name: weight.bfloat16() for name, weight in tied.items()}
    buffer = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}  # as old ones hold
    save_file(tied | buffer, merged / "model.safetensors", metadata={"format": "pt"})

    names = json.loads((merged / "tokenizer_config.json").read_text())
    (merged / "tokenizer_config.json").write_text(json.dumps(names | {"unk_token": "<pad>"}))

    export(merged, tmp_path / "model.gguf", "f16", quiet())
    convert(tmp_path / "model.gguf", tmp_path / "again", console=quiet())

    found = load_file(tmp_path / "again" / "model.safetensors")
    assert found.keys() == tied.keys()
    for name, weight in tied.items():
        rounded = weight if weight.ndim == 1 else weight.half()
        assert torch.equal(found[name], rounded.bfloat16()), name


def test_q8_0_is_on_its_grid_and_norms_stay_exact(merged: Path, tmp_path: Path) -> None:
    export(merged, tmp_path / "model.gguf", "q8_0", quiet())
    tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "model.gguf").tensors}
    assert len(tensors) == 2 * 9 + 3
    for name, tensor in tensors.items():
        is_norm = "norm" in name
        expected = GGMLQuantizationType.F32 if is_norm else GGMLQuantizationType.Q8_0
        assert tensor.tensor_type == expected, name


def test_shape_and_vocabulary_are_written(merged: Path, tmp_path: Path) -> None:
    (merged / "chat_template.jinja").write_text("MINE")
    export(merged, tmp_path / "model.gguf", "f16", quiet())
    reader = GGUFReader(tmp_path / "model.gguf")
    expected = {
        Keys.General.ARCHITECTURE: "llama",
        Keys.General.NAME: "merged",
        "llama.context_length": 512,
        "llama.embedding_length": 64,
        "llama.block_count": 2,
        "llama.feed_forward_length": 128,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.rope.dimension_count": 16,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 256,
        Keys.Tokenizer.MODEL: "gpt2",
        Keys.Tokenizer.PRE: "smollm",
        Keys.Tokenizer.BOS_ID: 1,
        Keys.Tokenizer.EOS_ID: 2,
        Keys.Tokenizer.PAD_ID: 0,
        Keys.Tokenizer.ADD_BOS: False,
        Keys.Tokenizer.ADD_PREFIX: False,
        Keys.Tokenizer.CHAT_TEMPLATE: "MINE",
    }
    assert {key: field(reader, key) for key in expected} == expected
    assert reader.get_field(Keys.Tokenizer.UNK_ID) is None
    tokens, types = (
        field(reader, key) for key in (Keys.Tokenizer.LIST, "tokenizer.ggml.token_type")
    )
    tokenizer = Tokenizer.from_file(str(merged / "tokenizer.json"))
    used = tokenizer.get_vocab_size()
    assert tokens[:used] == [tokenizer.id_to_token(index) for index in range(used)]
    assert len(tokens) == len(types) == 256
    assert types[:3] == [TokenType.CONTROL] * 3
    assert types[3] == TokenType.NORMAL
    assert types[tokenizer.token_to_id("<tool>")] == TokenType.USER_DEFINED
    assert types[used:] == [TokenType.UNUSED] * (256 - used)
    merges = json.loads((merged / "tokenizer.json").read_text())["model"]["merges"]
    assert field(reader, Keys.Tokenizer.MERGES) == [" ".join(merge) for merge in merges]


def test_a_tokenizer_that_begins_every_text_says_so(merged: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((merged / "tokenizer.json").read_text())
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [start, {"Sequence": {"id": "A", "type_id": 0}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }
    (merged / "tokenizer.json").write_text(json.dumps(tokenizer))
    export(merged, tmp_path / "model.gguf", "f16", quiet())
    assert field(GGUFReader(tmp_path / "model.gguf"), Keys.Tokenizer.ADD_BOS) is True


def test_a_sliding_window_bounds_the_context(merged: Path, tmp_path: Path) -> None:
    config = json.loads((merged / "config.json").read_text())
    (merged / "config.json").write_text(json.dumps(config | {"sliding_window": 128}))
    export(merged, tmp_path / "model.gguf", "f16", quiet())
    assert field(GGUFReader(tmp_path / "model.gguf"), "llama.context_length") == 128


def test_rows_are_interleaved_as_our_reader_takes_them_apart() -> None:
    weight = np.arange(48.0).reshape(12, 4)
    assert interleave_halves(weight, 2)[:, 0].tolist() == [
        *(0, 12, 4, 16, 8, 20),
        *(24, 36, 28, 40, 32, 44),
    ]
    assert np.array_equal(split_halves(interleave_halves(weight, 3), 3), weight)


@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_a_file_that_differs_in_one_weight_is_told(kind: str, merged: Path, tmp_path: Path) -> None:
    export(merged, tmp_path / "model.gguf", kind, quiet())
    config = json.loads((merged / "config.json").read_text())
    weights = load_file(merged / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 5] += 0.02
    other = tmp_path / "other"
    shutil.copytree(merged, other)
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    checkpoint = Checkpoint(other)
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight is not the checkpoint's"):
        compare(checkpoint, config, tmp_path / "model.gguf")
    checkpoint.close()
    with pytest.raises(ValueError, match=r"other tensors: \['output\.weight'\]"):
        compare(Checkpoint(merged), config | {"tie_word_embeddings": True}, tmp_path / "model.gguf")


def test_a_file_that_does_not_hold_what_was_written_never_appears(
    merged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(values: np.ndarray[Any, Any], kind: GGMLQuantizationType) -> np.ndarray[Any, Any]:
        return (values * 1.5).astype(np.float16 if kind == GGMLQuantizationType.F16 else np.float32)

    monkeypatch.setattr(gguf_export, "quantize", wrong)
    with pytest.raises(ValueError, match="is not the checkpoint's"):
        export(merged, tmp_path / "model.gguf", "f16", quiet())
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_what_a_killed_export_left_goes_with_the_next_one(merged: Path, tmp_path: Path) -> None:
    left = tmp_path / ".model.gguf-exporting"
    left.mkdir()
    (left / "made.gguf").write_bytes(b"half")
    export(merged, tmp_path / "model.gguf", "f16", quiet())
    assert {path.name for path in tmp_path.iterdir()} == {"merged", "model.gguf"}


def test_what_llama_cpp_would_run_differently_is_refused(merged: Path, tmp_path: Path) -> None:
    out, config = tmp_path / "model.gguf", json.loads((merged / "config.json").read_text())

    def refused(match: str, kind: str = "f16") -> None:
        with pytest.raises(ValueError, match=match):
            export(merged, out, kind, quiet())
        assert not out.exists()

    refused(r"must be f16 or q8_0", kind="q4_0")
    rope = {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}
    (merged / "config.json").write_text(json.dumps(config | rope))
    refused("RoPE scaling 'yarn'")
    (merged / "config.json").write_text(json.dumps(config | {"vocab_size": 40}))
    refused("the model knows 40")
    (merged / "config.json").write_text(json.dumps(config))
    add_tokenizer(merged, digits=False)
    refused(r"is known here \(smollm\)")
    (merged / "tokenizer.json").unlink()
    refused(r"holds no tokenizer\.json")
    add_tokenizer(merged)
    weights = load_file(merged / "model.safetensors")
    weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
    save_file(weights, merged / "model.safetensors")
    refused("q_proj.bias has no name")


def test_f16_that_overflows_and_rows_that_q8_0_cannot_cut_are_refused(
    merged: Path, tmp_path: Path
) -> None:
    weights = load_file(merged / "model.safetensors")
    weights["lm_head.weight"][0, 0] = 1e6
    save_file(weights, merged / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight overflows F16"):
        export(merged, tmp_path / "model.gguf", "f16", quiet())
    weights["lm_head.weight"] = torch.zeros(256, 40)
    save_file(weights, merged / "model.safetensors")
    with pytest.raises(ValueError, match=r"multiple of 32; lm_head\.weight has 40"):
        export(merged, tmp_path / "model.gguf", "q8_0", quiet())


def test_an_output_that_exists_is_refused(merged: Path, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_text("mine")
    with pytest.raises(ValueError, match="exists"):
        export(merged, tmp_path / "model.gguf", "f16", quiet())
    assert (tmp_path / "model.gguf").read_text() == "mine"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_the_default_base_is_exported_with_its_tokenizer(kind: str, tmp_path: Path) -> None:
    base, out = ensure_default_base(), tmp_path / "model.gguf"

    export(base, out, kind, Console(quiet=True))

    if kind == "f16":
        convert(out, tmp_path / "again", console=quiet())
        for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
            assert (tmp_path / "again" / name).read_bytes() == (base / name).read_bytes()
        again = load_file(tmp_path / "again" / "model.safetensors")
        for name, weight in load_file(base / "model.safetensors").items():
            rounded = weight if weight.ndim == 1 else weight.half()
            assert torch.equal(again[name], rounded.bfloat16()), name
