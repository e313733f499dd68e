"""Text to tokens and back: exact bytes, whole characters, stop strings however text is cut."""

import asyncio
import itertools
import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, processors

from server.api.detokenizer import Detokenizer, StopSearch
from server.api.tokenizer import TextCodec
from server.errors import ServeError
from tests.server.api.harness import EOS, TEMPLATE, small_codec, small_tokenizer

CODEC = small_codec()
TEXTS = st.text(alphabet=st.sampled_from("abc é😀\n中"), max_size=40)
HELLO = [{"role": "user", "content": "hello"}]


def sentencepiece() -> Tokenizer:
    """As Mistral 7B v0.1 has it: blanks are ▁, unknown characters are bytes, <s> goes first."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "a", "b", "c", "▁a", "▁b", "ab", "▁ab"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("▁", "b"), ("a", "b"), ("▁a", "b")]
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


MISTRAL = TextCodec(sentencepiece(), chat_template=None, named_tokens={})


def whole_text_search(text: str, stops: list[str]) -> str:
    """The text before the stop string that is complete first; of two that end there, the longer."""
    ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    return text[: min(ends)[1]] if ends else text


STOP_TEXT = st.text(alphabet="ab", max_size=24)
STOPS = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4)


@settings(max_examples=500)
@given(STOP_TEXT, STOPS, st.lists(st.integers(0, 24), max_size=12))
def test_any_way_of_cutting_a_text_gives_the_result_of_searching_it_whole(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    search = StopSearch(stops)
    given_out = ""
    edges = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    for start, end in itertools.pairwise(edges):
        given_out += search.feed(text[start:end])
        if search.has_stopped:
            break
    if not search.has_stopped:
        given_out += search.flush()
    assert given_out == whole_text_search(text, stops)
    assert search.has_stopped == any(stop in text for stop in stops)


@given(STOP_TEXT, STOPS)
def test_nothing_is_held_back_that_could_not_become_a_stop_string(
    text: str, stops: list[str]
) -> None:
    search = StopSearch(stops)
    out = search.feed(text)
    if not search.has_stopped:
        held = text[len(out) :]
        assert not held or any(stop.startswith(held) for stop in stops)


@given(STOP_TEXT, STOPS, st.integers(0, 24))
def test_a_stop_string_complete_too_early_never_stops(
    text: str, stops: list[str], num_free: int
) -> None:
    search = StopSearch(stops)
    out = "".join(search.feed(char, may_stop=False) for char in text[:num_free])
    for position, char in enumerate(text[num_free:], start=num_free):
        out += search.feed(char)
        ended = any(text[: position + 1].endswith(stop) for stop in stops)
        assert search.has_stopped == ended
        if ended:
            return
    assert out + search.flush() == text


def test_what_was_complete_too_early_does_not_stop_while_it_is_held_back() -> None:
    search = StopSearch(["abcdef", "bc"])
    out = search.feed("abc", may_stop=False)  # held: it may become the first
    out += search.feed("x")
    assert (out, search.has_stopped) == ("abcx", False)


def test_a_long_near_miss_is_cheap_to_tell() -> None:
    search = StopSearch(["a" * 255 + "b"] * 16)
    for _ in range(200):
        search.feed("a" * 50)
    assert search.flush() == "a" * 255


@settings(max_examples=200)
@given(TEXTS, st.lists(st.integers(1, 5), max_size=20))
@pytest.mark.parametrize("codec", [CODEC, MISTRAL], ids=["byte-level", "sentencepiece"])
def test_tokens_in_any_groups_give_the_text_of_them_all(
    codec: TextCodec, text: str, groups: list[int]
) -> None:
    prompt, rest = codec.encode("ab"), codec.encode(text, add_special_tokens=False)
    detokenizer = Detokenizer(codec, prompt, (), 0)
    parts, remaining = [], rest
    for size in groups:
        parts.append(detokenizer.feed(remaining[:size]))
        remaining = remaining[size:]
    parts += [detokenizer.feed(remaining), detokenizer.flush()]
    assert not any("\ufffd" in part for part in parts)
    assert "".join(parts) == codec.decode(prompt + rest)[len(codec.decode(prompt)) :]
    assert detokenizer.num_tokens == len(rest)


def test_the_first_word_keeps_its_blank_after_a_prompt_and_loses_the_mark_without() -> None:
    ids = [MISTRAL.encode("ab")[-1]]
    assert Detokenizer(MISTRAL, MISTRAL.encode("a"), (), 0).feed(ids) == " ab"
    assert Detokenizer(MISTRAL, [1], (), 0).feed(ids) == "ab"


@given(st.lists(st.integers(0, 300), max_size=30))
def test_any_tokens_at_all_are_decoded_as_the_tokenizer_decodes_them(ids: list[int]) -> None:
    detokenizer = Detokenizer(CODEC, CODEC.encode("x"), (), 0)
    text = "".join(detokenizer.feed([token_id]) for token_id in ids) + detokenizer.flush()
    assert text == CODEC.decode(ids)


def test_a_long_run_of_invalid_bytes_takes_no_longer_a_token_than_a_short_one() -> None:
    [continuation] = [i for i in range(300) if CODEC.piece(i) == b"\x80"]
    detokenizer = Detokenizer(CODEC, [5], (), 0)
    assert detokenizer.feed([continuation] * 100_000) == "\ufffd" * 100_000


def test_special_tokens_are_no_text_and_have_bytes_for_logprobs() -> None:
    assert CODEC.visible_piece(EOS) == b""
    assert CODEC.text_of(EOS) == "</s>"


def test_a_token_id_past_the_table_is_nothing() -> None:
    assert CODEC.piece(10**6) == b""
    assert CODEC.raw_token(10**6) == ""


def test_a_decoder_that_we_do_not_know_is_refused_by_name() -> None:
    tokenizer = Tokenizer.from_str(small_tokenizer().to_str())
    tokenizer.decoder = decoders.WordPiece()
    with pytest.raises(ValueError, match="WordPiece"):
        TextCodec(tokenizer, chat_template=None, named_tokens={})


def test_a_prompt_gets_the_beginning_of_text_and_a_rendered_chat_does_not() -> None:
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    codec = TextCodec(sentencepiece(), chat_template=template, named_tokens={"bos_token": "<s>"})
    assert codec.encode("a").count(1) == 1
    assert codec.encode_chat([{"role": "user", "content": "a"}]).count(1) == 1


def test_a_template_of_an_adapter_s_own_replaces_the_base_s() -> None:
    ids = CODEC.encode_chat(HELLO, template="<{{ messages[0]['content'] }}>")
    assert CODEC.decode(ids) == "<hello>"


def test_without_a_template_there_is_no_chat() -> None:
    with pytest.raises(ServeError, match="no chat template"):
        MISTRAL.encode_chat(HELLO)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('no') }}",
        "{{ messages.__class__.__mro__ }}",
        "{{ messages[0]['content'] + 5 }}",
        "{{ nothing.at.all }}",
        "{% for %}",
        "{{ 1 / 0 }}",
        "{{ range(1000000) }}",
        "{{ messages[0]['content'].index('z') }}",
        "{{ '%(a)s' % {} }}",
        "{{ ''|xmlattr }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 2**62 }}",
        "{% break %}",
        "{{ '\\ud800' }}",
    ],
)
def test_a_template_that_fails_or_reaches_out_is_a_refusal(template: str) -> None:
    with pytest.raises(ServeError) as caught:
        CODEC.encode_chat(HELLO, template=template)
    assert (caught.value.status, caught.value.param) == (400, "messages")


@pytest.mark.parametrize("where", ["file", "config", "named"])
def test_a_checkpoint_folder_is_read(tmp_path: Path, where: str) -> None:
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    config: dict[str, object] = {"bos_token": {"content": "<s>"}, "eos_token": "</s>"}
    if where == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    elif where == "config":
        config["chat_template"] = TEMPLATE
    else:
        config["chat_template"] = [{"name": "default", "template": TEMPLATE}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert TextCodec.load(tmp_path).encode_chat(HELLO) == CODEC.encode_chat(HELLO)


def test_a_folder_without_a_tokenizer_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        TextCodec.load(tmp_path)


def test_a_long_text_is_encoded_in_another_thread_and_a_short_one_in_place() -> None:
    def where() -> int:
        return threading.get_ident()

    async def both() -> tuple[int, int]:
        return await CODEC.run(10, where), await CODEC.run(10**6, where)

    short, long = asyncio.run(both())
    assert short == threading.get_ident()
    assert long != threading.get_ident()


def test_the_http_side_imports_no_torch() -> None:
    code = "import sys, server.api.app; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
