"""A checkpoint's tokenizer as GGUF fields, for the tokenizers that llama.cpp knows under a name."""

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType
from tokenizers import Tokenizer

# How text is cut before BPE merges bytes -> what llama.cpp calls it.
_PRE_TOKENIZERS = (
    (
        [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ],
        "smollm",
    ),
)
_NAMED = ("bos", "eos", "unk", "pad")


def add_vocab(writer: GGUFWriter, folder: Path, vocab_size: int) -> None:
    """Write tokens, merges, special ids and chat template; ValueError for an unknown tokenizer."""
    file, config_file = folder / "tokenizer.json", folder / "tokenizer_config.json"
    if not file.is_file():
        raise ValueError(f"{folder} holds no tokenizer.json, which a GGUF file needs")
    content = json.loads(file.read_text(encoding="utf-8"))
    config = json.loads(config_file.read_text(encoding="utf-8")) if config_file.is_file() else {}
    pre_tokenizer = _pre_tokenizer(folder, content)
    tokenizer = Tokenizer.from_file(str(file))
    tokens, types = _tokens(tokenizer, vocab_size)
    writer.add_tokenizer_model("gpt2")  # what GGUF calls byte-level BPE
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([_merge(merge) for merge in content["model"]["merges"]])
    writer.add_add_space_prefix(False)
    _add_special_ids(writer, tokenizer, config)
    template = _chat_template(folder, config)
    if template is not None:
        writer.add_chat_template(template)


def _pre_tokenizer(folder: Path, content: dict[str, Any]) -> str:
    found = content.get("pre_tokenizer") or {}
    parts = found.get("pretokenizers") or [found]
    if content["model"].get("type") == "BPE" and content.get("normalizer") is None:
        for known, name in _PRE_TOKENIZERS:
            if len(known) == len(parts) and all(
                part.items() >= wanted.items() for wanted, part in zip(known, parts, strict=True)
            ):
                return name
    raise ValueError(
        f"{folder}: its tokenizer is not one whose name in llama.cpp is known here "
        f"({', '.join(name for _, name in _PRE_TOKENIZERS)})"
    )


def _tokens(tokenizer: Tokenizer, vocab_size: int) -> tuple[list[str], list[TokenType]]:
    """Every token by id; ids that the tokenizer does not use are there and unused."""
    by_id = {index: token for token, index in tokenizer.get_vocab(with_added_tokens=True).items()}
    added = tokenizer.get_added_tokens_decoder()
    if max(by_id) >= vocab_size:
        raise ValueError(f"the tokenizer has token {max(by_id)}; the model knows {vocab_size}")
    types = []
    for index in range(vocab_size):
        if index not in by_id:
            types.append(TokenType.UNUSED)
        elif index in added:
            special = added[index].special
            types.append(TokenType.CONTROL if special else TokenType.USER_DEFINED)
        else:
            types.append(TokenType.NORMAL)
    return [by_id.get(index, f"[PAD{index}]") for index in range(vocab_size)], types


def _add_special_ids(writer: GGUFWriter, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    ids = {}
    for name in _NAMED:
        token = config.get(f"{name}_token")
        token = token["content"] if isinstance(token, dict) else token
        index = tokenizer.token_to_id(token) if token else None
        if index is not None:
            ids[name] = index
            getattr(writer, f"add_{name}_token_id")(index)
    start = tokenizer.encode("", add_special_tokens=True).ids
    writer.add_add_bos_token(bool(start) and start[0] == ids.get("bos"))


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The template that transformers and our server take: the file's, else the config's."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    return template if isinstance(template, str) else None


def _merge(merge: str | list[str]) -> str:
    return merge if isinstance(merge, str) else " ".join(merge)
