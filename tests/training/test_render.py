"""Masks: which tokens of a rendered document count in the loss."""

import json
from pathlib import Path
from typing import Any

import pytest

from training.render import Example, Renderer, end_ids
from training.rows import Chat, RowRefused, Text

TURNS = (
    {"role": "system", "content": "S"},
    {"role": "user", "content": "Hello"},
    {"role": "assistant", "content": "\n\nHi there"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you <3"},
)
END = "<|im_end|>"


class WithTemplate:
    """A tokenizer under another chat template."""

    def __init__(self, tokenizer: Any, template: str) -> None:
        self._tokenizer, self._template = tokenizer, template

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._tokenizer(*args, **options)

    def apply_chat_template(self, messages: Any, **options: Any) -> Any:
        options["chat_template"] = self._template
        return self._tokenizer.apply_chat_template(messages, **options)


def renderer(tokenizer: Any, loss: str = "assistant") -> Renderer:
    return Renderer(tokenizer, frozenset({tokenizer.eos_token_id}), loss)


def learned(example: Example, tokenizer: Any) -> list[str]:
    """The stretches of text that are learned."""
    runs: list[list[int]] = []
    was_learned = False
    for token, is_learned in zip(example.ids, example.is_learned, strict=True):
        if is_learned and not was_learned:
            runs.append([])
        if is_learned:
            runs[-1].append(token)
        was_learned = is_learned
    return [tokenizer.decode(run) for run in runs]


def test_every_reply_is_learned_with_the_end_of_its_turn(tokenizer: Any) -> None:
    example = renderer(tokenizer).example(Chat(TURNS))
    assert learned(example, tokenizer) == [f"\n\nHi there{END}", f"See you <3{END}"]
    assert example.ends_turn
    whole = tokenizer.apply_chat_template(list(TURNS), tokenize=False)
    assert tokenizer.decode(example.ids) == whole


def test_a_reply_to_nothing_is_one_refused_row(tokenizer: Any) -> None:
    document = Chat(({"role": "assistant", "content": "Hello"}, *TURNS[3:]))
    with pytest.raises(RowRefused, match="it begins with a reply"):
        renderer(tokenizer).example(document)
    last = renderer(tokenizer, "completion").example(document)
    assert learned(last, tokenizer) == [f"See you <3{END}"]
    whole = renderer(tokenizer, "all").example(Chat(document.messages[:1]))
    assert whole.reply_at is None


def reply(example: Example, tokenizer: Any) -> str:
    """From the last reply's first token on."""
    assert example.reply_at is not None
    return str(tokenizer.decode(example.ids[example.reply_at :]))


@pytest.mark.parametrize("loss", ["assistant", "completion", "all"])
def test_the_last_reply_is_found_whatever_is_learned(tokenizer: Any, loss: str) -> None:
    found = renderer(tokenizer, loss)
    example = found.example(Chat(TURNS))
    assert reply(example, tokenizer) == f"See you <3{END}\n"
    assert example.question == "Bye"
    short = found.example(Chat(TURNS[3:]))
    assert list(short.ids[: short.reply_at]) == found.prompt_ids(list(TURNS[3:4]))
    open_ended = found.example(Chat((*TURNS, {"role": "user", "content": "Hm?"})))
    assert reply(open_ended, tokenizer).startswith(f"See you <3{END}\n<|im_start|>user")
    plain = found.example(Text("Two and two is", " four"))
    assert reply(plain, tokenizer) == f" four{END}"
    assert plain.question == "Two and two is"


def test_rows_that_ask_nothing_or_lose_their_end_have_no_reply(tokenizer: Any) -> None:
    for loss in ("assistant", "all"):
        found = renderer(tokenizer, loss)
        assert found.example(Text("", "Plain.")).reply_at is None
        whole = found.example(Chat(TURNS))
        assert whole.cut(len(whole.ids)).reply_at == whole.reply_at
        assert whole.cut(len(whole.ids) - 1).reply_at is None


def test_a_template_without_a_prompt_for_the_reply_still_learns_all(tokenizer: Any) -> None:
    template = (
        "{% if add_generation_prompt %}{{ raise_exception('no') }}{% endif %}"
        "{% for m in messages %}{{ m.content }}{% endfor %}"
    )
    example = renderer(WithTemplate(tokenizer, template), "all").example(Chat(TURNS))
    assert example.reply_at is None
    assert all(example.is_learned)


def test_completion_alone_is_the_last_reply(tokenizer: Any) -> None:
    example = renderer(tokenizer, "completion").example(Chat(TURNS))
    assert learned(example, tokenizer) == [f"See you <3{END}"]


def test_all_means_every_token(tokenizer: Any) -> None:
    example = renderer(tokenizer, "all").example(Chat(TURNS))
    assert all(example.is_learned)
    assert example.num_learned == len(example.ids) - 1  # nothing comes before the first
    assert example.ends_turn


def test_what_is_read_before_a_reply_is_what_the_server_makes_of_the_request(
    tokenizer: Any,
) -> None:
    for turns in (TURNS, TURNS[:3]):  # the reply of the second begins as its prompt ends
        example = renderer(tokenizer, "completion").example(Chat(turns))
        first = example.is_learned.index(True)
        request = tokenizer.apply_chat_template(
            list(turns[:-1]), add_generation_prompt=True, return_dict=True
        )
        assert renderer(tokenizer).prompt_ids(list(turns[:-1])) == list(request["input_ids"])
        assert list(example.ids[:first]) == list(request["input_ids"])


def test_plain_text_is_masked_by_its_prompt_and_ended(tokenizer: Any) -> None:
    example = renderer(tokenizer).example(Text("Two and two", " make four."))
    assert learned(example, tokenizer) == [f" make four.{END}"]
    assert tokenizer.decode(example.ids) == f"Two and two make four.{END}"
    text = renderer(tokenizer).example(Text("", "Only this"))
    assert learned(text, tokenizer) == [f"Only this{END}"]
    assert text.ends_turn


def test_an_end_that_is_written_already_is_not_doubled(tokenizer: Any) -> None:
    example = renderer(tokenizer).example(Text("", f"Only this{END}"))
    assert tokenizer.decode(example.ids) == f"Only this{END}"


def test_a_start_token_is_added_once_where_the_tokenizer_adds_one(tokenizer: Any) -> None:
    class Starting(WithTemplate):
        def __call__(self, text: str, **options: Any) -> Any:
            if not text:
                return {"input_ids": [tokenizer.bos_token_id]}
            return tokenizer(text, **options)

    start = tokenizer.bos_token
    starting = renderer(Starting(tokenizer, ""))
    assert tokenizer.decode(starting.example(Text("", "a")).ids) == f"{start}a{END}"
    assert tokenizer.decode(starting.example(Text("", f"{start}a")).ids) == f"{start}a{END}"


def test_a_reply_cut_off_ends_no_turn(tokenizer: Any) -> None:
    example = renderer(tokenizer).example(Chat(TURNS))
    last = max(i for i, is_learned in enumerate(example.is_learned) if is_learned)
    assert example.cut(len(example.ids)) is example
    assert example.cut(last + 1).ends_turn  # only the template's newline is gone
    shorter = example.cut(last)
    assert len(shorter.ids) == len(shorter.is_learned) == last
    assert not shorter.ends_turn
    assert example.cut(3).num_learned == 0


def test_a_template_that_rewrites_earlier_replies_is_refused_but_for_the_last(
    tokenizer: Any,
) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>"
        "{{ m.content if loop.last or m.role != 'assistant' else '...' }}"
        "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    rewriting = WithTemplate(tokenizer, template)
    with pytest.raises(RowRefused, match="once later turns follow"):
        renderer(rewriting).example(Chat(TURNS))
    example = renderer(rewriting, "completion").example(Chat(TURNS))
    assert learned(example, tokenizer) == ["See you <3"]
    assert not example.ends_turn  # this template ends no turn


def test_a_template_whose_generation_prompt_is_not_its_own_is_refused(tokenizer: Any) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<think>{% endif %}"
    )
    with pytest.raises(RowRefused, match="not how it renders a reply"):
        renderer(WithTemplate(tokenizer, template)).example(Chat(TURNS))


def test_what_a_template_refuses_is_refused_as_a_row(tokenizer: Any) -> None:
    refusing = WithTemplate(tokenizer, "{{ raise_exception('no system prompts') }}")
    with pytest.raises(RowRefused, match="the template refuses it: no system prompts"):
        renderer(refusing).example(Chat(TURNS))


def test_a_tokenizer_without_offsets_is_refused(tokenizer: Any) -> None:
    class Slow(WithTemplate):
        is_fast = False

    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        renderer(Slow(tokenizer, ""))


def test_ends_of_turn_are_the_tokenizers_and_the_generation_configs(
    tokenizer: Any, tmp_path: Path
) -> None:
    assert end_ids(tmp_path, tokenizer) == {tokenizer.eos_token_id}
    for value, expected in (([7, 9], {7, 9}), (7, {7}), (None, set())):
        text = json.dumps({"eos_token_id": value})
        (tmp_path / "generation_config.json").write_text(text)
        assert end_ids(tmp_path, tokenizer) == {tokenizer.eos_token_id, *expected}
