"""Chat messages to token ids, and the bytes that each token id stands for."""

import asyncio
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

from jinja2.exceptions import TemplateError
from tokenizers import Tokenizer
from transformers.utils.chat_template_utils import render_jinja_template

from server.errors import bad_request

_Args = ParamSpec("_Args")
_Result = TypeVar("_Result")

_SHORT_CHARS = 2048  # a text up to this long is encoded in place: a thread would cost more
_TEMPLATE_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
# What a template may raise: its own words, or its own mistake.
_TEMPLATE_ERRORS = (
    *(TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
    *(RuntimeError, MemoryError, SyntaxError),
)
_SPACE = "\u2581"  # how SentencePiece writes a blank


class TextCodec:
    """The base's tokenizer and chat template. Holds no tensors and imports no torch."""

    def __init__(
        self, tokenizer: Tokenizer, *, chat_template: str | None, named_tokens: dict[str, str]
    ) -> None:
        """`named_tokens` are those that a template may write by name: bos_token, eos_token, …

        Raises ValueError for a tokenizer whose decoder is neither byte-level nor SentencePiece's.
        """
        self._tokenizer = tokenizer
        self.chat_template = chat_template
        self._named_tokens = named_tokens
        self._pieces = _byte_pieces(tokenizer)
        self._strips_first_space = _SPACE in _decoder_text(tokenizer)
        added = tokenizer.get_added_tokens_decoder()
        self._special_ids = {token_id for token_id, token in added.items() if token.special}
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="tokenize")

    @classmethod
    def load(cls, folder: Path) -> "TextCodec":
        """Read tokenizer.json and the template beside it from a checkpoint folder."""
        file = folder / "tokenizer.json"
        if not file.is_file():
            raise ValueError(f"model.path is {folder}; it must hold a tokenizer.json")
        config_file, template_file = (
            folder / "tokenizer_config.json",
            folder / "chat_template.jinja",
        )
        config = json.loads(config_file.read_text()) if config_file.is_file() else {}
        template = config.get("chat_template")
        if template_file.is_file():
            template = template_file.read_text()
        elif isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        named = {name: _content(config[name]) for name in _TEMPLATE_TOKENS if config.get(name)}
        tokenizer = Tokenizer.from_file(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return cls(tokenizer, chat_template=template, named_tokens=named)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a prompt, with the tokenizer's own beginning-of-text where it has one."""
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def encode_chat(
        self,
        messages: list[dict[str, str]],
        *,
        template: str | None = None,
        add_generation_prompt: bool = True,
        add_special_tokens: bool = False,
    ) -> list[int]:
        """Render the messages and encode the result; the template itself writes special tokens.

        `template` replaces the base's. Raises ServeError 400 for messages it does not take.
        """
        template = template or self.chat_template
        if template is None:
            raise bad_request("This model has no chat template.", param="messages")
        try:
            texts = render_jinja_template(
                conversations=[messages],
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                **cast("dict[str, Any]", self._named_tokens),
            )[0]  # the other is where the assistant's turns are
            return self.encode(texts[0], add_special_tokens=add_special_tokens)
        except _TEMPLATE_ERRORS as error:
            raise bad_request(
                f"The chat template refuses the messages: {error}", param="messages"
            ) from None

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """The text of token ids as a whole."""
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)
        return text

    def piece(self, token_id: int) -> bytes:
        """The exact bytes that a token stands for, a special token's name included."""
        return self._pieces[token_id] if 0 <= token_id < len(self._pieces) else b""

    def visible_piece(self, token_id: int) -> bytes:
        """The bytes that a token adds to the text: none if it is special."""
        return b"" if token_id in self._special_ids else self.piece(token_id)

    def text_of(self, token_id: int) -> str:
        """A token by itself, for logprobs; incomplete UTF-8 shows as U+FFFD."""
        return self.piece(token_id).decode("utf-8", "replace")

    def raw_token(self, token_id: int) -> str:
        """A token as the vocabulary writes it."""
        return self._tokenizer.id_to_token(token_id) or ""

    def strips_first_space(self, prompt_ids: Sequence[int]) -> bool:
        """Whether the first token's leading blank marks the text's start and is no part of it."""
        if not self._strips_first_space:
            return False
        return not any(self.visible_piece(token_id) for token_id in prompt_ids)

    async def run(
        self,
        num_chars: int,
        function: Callable[_Args, _Result],
        *args: _Args.args,
        **kwargs: _Args.kwargs,
    ) -> _Result:
        """Call `function`, in a thread of its own if it has many characters to go through."""
        if num_chars <= _SHORT_CHARS:
            return function(*args, **kwargs)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, partial(function, *args, **kwargs))


def _content(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _decoder_text(tokenizer: Tokenizer) -> str:
    return json.dumps(json.loads(tokenizer.to_str())["decoder"], ensure_ascii=False)


def _byte_pieces(tokenizer: Tokenizer) -> list[bytes]:
    """The bytes of every token id: a table, so that decoding a token is a look-up.

    tokenizers' own DecodeStream decodes three times a token, and keeps (and decodes again) every
    token of a run that is not valid UTF-8.
    """
    decoder = _decoder_text(tokenizer)
    if '"ByteLevel"' in decoder:
        alphabet = {char: byte for byte, char in _byte_level_alphabet().items()}
        to_bytes: Callable[[str], bytes] = partial(_from_byte_level, alphabet=alphabet)
    elif _SPACE in decoder:
        to_bytes = _from_sentencepiece
    else:
        raise ValueError(f"the tokenizer's decoder is {decoder[:200]}; it must be byte-level or ▁")
    pieces = [b""] * (max(tokenizer.get_vocab().values(), default=-1) + 1)
    for token, token_id in tokenizer.get_vocab().items():
        pieces[token_id] = to_bytes(token)
    for token_id, added in tokenizer.get_added_tokens_decoder().items():
        if added.special:
            pieces[token_id] = added.content.encode()
    return pieces


def _byte_level_alphabet() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + index) for index, byte in enumerate(others)
    }


def _from_byte_level(token: str, alphabet: dict[str, int]) -> bytes:
    if all(char in alphabet for char in token):
        return bytes(alphabet[char] for char in token)
    return token.encode()


def _from_sentencepiece(token: str) -> bytes:
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return bytes([int(token[3:5], 16)])
    return token.replace(_SPACE, " ").encode()
