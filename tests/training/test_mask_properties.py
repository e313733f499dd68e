"""Masks hold for any conversation: hypothesis writes it."""

from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from training.packing import IGNORED, collate
from training.render import Renderer
from training.rows import Chat

texts = st.text(st.sampled_from("ab \n\t.,<|é漢🙂1"), min_size=1, max_size=12)
chats = st.lists(st.tuples(texts, texts), min_size=1, max_size=3)
relaxed = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def chat(pairs: list[tuple[str, str]]) -> Chat:
    """Question and reply by turns."""
    return Chat(
        tuple(
            {"role": role, "content": content}
            for pair in pairs
            for role, content in zip(("user", "assistant"), pair, strict=True)
        )
    )


@relaxed
@given(pairs=chats)
def test_what_is_learned_is_the_replies_and_the_rest_is_the_template(
    tokenizer: Any, pairs: list[tuple[str, str]]
) -> None:
    renderer = Renderer(tokenizer, frozenset({tokenizer.eos_token_id}), "assistant")
    document = chat(pairs)
    example = renderer.example(document)
    learned = [i for i, learns in zip(example.ids, example.is_learned, strict=True) if learns]
    assert tokenizer.decode(learned) == "".join(reply + "<|im_end|>" for _, reply in pairs)
    whole = tokenizer.apply_chat_template(list(document.messages), tokenize=False)
    assert tokenizer.decode(example.ids) == whole
    assert example.ends_turn


@relaxed
@given(pairs=chats)
def test_the_last_reply_is_read_after_the_text_that_the_server_would_send(
    tokenizer: Any, pairs: list[tuple[str, str]]
) -> None:
    renderer = Renderer(tokenizer, frozenset({tokenizer.eos_token_id}), "completion")
    document = chat(pairs)
    example = renderer.example(document)
    first = example.is_learned.index(True)
    assert all(example.is_learned[first:-1])
    prompt = renderer.prompt_ids(list(document.messages[:-1]))
    assert list(example.ids[:first]) == prompt


@relaxed
@given(pairs=st.lists(chats, min_size=1, max_size=4), is_packed=st.booleans())
def test_a_batch_learns_what_its_examples_learn(
    tokenizer: Any, pairs: list[list[tuple[str, str]]], is_packed: bool
) -> None:
    renderer = Renderer(tokenizer, frozenset({tokenizer.eos_token_id}), "assistant")
    examples = [renderer.example(chat(turns)) for turns in pairs]
    everyone = tuple(range(len(examples)))
    rows = [everyone] if is_packed else [(i,) for i in everyone]
    batch = collate(examples, rows, tokenizer.pad_token_id, is_packed=is_packed)
    assert batch.num_learned == sum(example.num_learned for example in examples)
    learned = batch.labels[batch.labels != IGNORED].tolist()
    assert learned == [
        token
        for example in examples
        for token, learns in zip(example.ids[1:], example.is_learned[1:], strict=True)
        if learns
    ]
    held = batch.ids.roll(-1, dims=1)[batch.labels != IGNORED].tolist()
    assert learned == held  # a label is the token that comes next
