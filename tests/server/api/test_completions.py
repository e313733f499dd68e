"""Completions through the official client."""

from collections.abc import Callable
from pathlib import Path

import openai
import pytest

from tests.server.api.harness import BASE, EOS, MAX_MODEL_LEN, Server


def test_a_prompt_is_continued(server: Server) -> None:
    server.say(" jumps over")
    reply = server.client().completions.create(model=BASE, prompt="the quick brown fox")
    choice = reply.choices[0]
    assert (choice.text, choice.finish_reason, choice.index) == (" jumps over", "stop", 0)
    assert (reply.object, reply.model) == ("text_completion", BASE)
    assert choice.logprobs is None
    assert server.engine.requests[0].prompt_ids == server.ids("the quick brown fox")


def test_sixteen_tokens_are_the_default_and_fewer_where_the_context_ends(server: Server) -> None:
    client = server.client()
    client.completions.create(model=BASE, prompt="fox")
    client.completions.create(model=BASE, prompt=[5] * (MAX_MODEL_LEN - 3))
    assert [r.sampling.max_tokens for r in server.engine.requests] == [16, 3]


@pytest.mark.parametrize(
    ("prompt", "num_prompts"),
    [("fox", 1), (["fox", "dog"], 2), ([5, 6], 1), ([[5, 6], [7]], 2)],
)
def test_every_form_of_prompt_is_taken(server: Server, prompt: object, num_prompts: int) -> None:
    reply = server.client().completions.create(model=BASE, prompt=prompt, max_tokens=1)
    assert [c.index for c in reply.choices] == list(range(num_prompts))


def test_choices_of_several_prompts_come_in_the_order_of_the_prompts(server: Server) -> None:
    for text in ("a", "b", "c", "d"):
        server.say(text)
    reply = server.client().completions.create(model=BASE, prompt=["fox", "dog"], n=2, seed=5)
    assert [c.text for c in reply.choices] == ["a", "b", "c", "d"]
    asked = [(r.prompt_ids, r.sampling.seed) for r in server.engine.requests]
    fox, dog = server.ids("fox"), server.ids("dog")
    assert asked == [(fox, 5), (fox, 6), (dog, 5), (dog, 6)]
    assert reply.usage.prompt_tokens == len(fox) + len(dog)


def test_what_one_choice_finds_of_another_is_not_told_as_cached(server: Server) -> None:
    server.engine.num_cached = [2, 1, 2, 0]
    usage = server.client().completions.create(model=BASE, prompt=["a fox", "a dog"], n=2).usage
    assert usage.prompt_tokens_details.cached_tokens == 1


@pytest.mark.parametrize("prompt", ["", [], [[]], [1, "a"], [1, -1], [1, 512], [True], {"a": 1}])
def test_a_prompt_that_is_none_is_refused_by_name(server: Server, prompt: object) -> None:
    reply = server.http().post("/v1/completions", json={"model": BASE, "prompt": prompt})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "prompt")
    assert server.engine.requests == []


def test_more_prompts_than_the_limit_are_refused(server: Server) -> None:
    reply = server.http().post("/v1/completions", json={"model": BASE, "prompt": ["a"] * 257})
    assert reply.status_code == 400
    assert "257" in reply.json()["error"]["message"]


def test_more_choices_than_could_ever_be_admitted_are_refused(server: Server) -> None:
    reply = server.http().post(
        "/v1/completions", json={"model": BASE, "prompt": ["a"] * 100, "n": 2}
    )
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "n")


@pytest.mark.parametrize("stream", [False, True])
def test_echo_puts_the_prompt_before_each_choice(server: Server, stream: bool) -> None:
    server.say(" jumps")
    server.say(" sleeps")
    given = {"model": BASE, "prompt": "the fox", "echo": True, "n": 2}
    if stream:
        texts = ["", ""]
        for chunk in server.client().completions.create(**given, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
    else:
        texts = [c.text for c in server.client().completions.create(**given).choices]
    assert texts == ["the fox jumps", "the fox sleeps"]


def test_logprobs_have_one_entry_for_each_token(server: Server) -> None:
    server.say(" jumps")
    reply = server.client().completions.create(model=BASE, prompt="the fox", logprobs=2)
    logprobs = reply.choices[0].logprobs
    ids = [*server.ids(" jumps"), EOS]
    assert logprobs.tokens == [server.codec.text_of(i) for i in ids]
    assert logprobs.token_logprobs == [-0.5] * len(ids)
    first = server.codec.text_of(ids[0])
    assert logprobs.top_logprobs[0] == {"<s>": -1.0, "</s>": -2.0, first: -0.5}
    assert logprobs.text_offset[0] == 0


def test_text_offsets_point_into_the_text(server: Server) -> None:
    server.say(" jumps 😀 over")
    reply = server.client().completions.create(
        model=BASE, prompt="the fox", logprobs=0, echo=True, max_tokens=50
    )
    choice = reply.choices[0]
    for token, offset in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
        if "\ufffd" not in token and token != "</s>":
            assert choice.text[offset : offset + len(token)] == token


def test_echoed_logprobs_begin_with_the_prompt_s(server: Server) -> None:
    server.say(" jumps")
    reply = server.client().completions.create(model=BASE, prompt="the fox", logprobs=1, echo=True)
    logprobs = reply.choices[0].logprobs
    num_prompt = len(server.ids("the fox"))
    assert logprobs.token_logprobs[0] is None
    assert logprobs.top_logprobs[0] is None
    assert len(logprobs.tokens) == num_prompt + len(server.ids(" jumps")) + 1
    assert server.engine.requests[0].sampling.prompt_logprobs == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("logprobs", [None, 1])
def test_no_tokens_and_echo_answer_with_the_prompt_alone(
    server: Server, make_adapter: Callable[..., Path], logprobs: int | None, stream: bool
) -> None:
    server.registry.push("bot", make_adapter())
    client, given = server.client(), {"model": "bot", "prompt": "the fox", "logprobs": logprobs}
    given |= {"max_tokens": 0, "echo": True}
    if stream:
        [chunk, last] = client.completions.create(
            **given, stream=True, stream_options={"include_usage": True}
        )
        choice, usage = chunk.choices[0], last.usage
    else:
        reply = client.completions.create(**given)
        choice, usage = reply.choices[0], reply.usage
    ids = server.ids("the fox")
    assert (choice.text, choice.finish_reason) == ("the fox", "length")
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), 0)
    assert server.engine.requests[0].adapter is not None
    if logprobs is None:
        assert choice.logprobs is None
    else:
        assert choice.logprobs.tokens == [server.codec.text_of(token_id) for token_id in ids]
        assert choice.logprobs.token_logprobs == [None, *[-0.5] * (len(ids) - 1)]


def test_a_prompt_may_fill_the_context_where_no_tokens_are_to_follow(server: Server) -> None:
    body = {"model": BASE, "prompt": [5] * MAX_MODEL_LEN, "max_tokens": 0, "echo": True}
    assert server.http().post("/v1/completions", json=body).status_code == 200
    reply = server.http().post("/v1/completions", json=body | {"prompt": [5] * (MAX_MODEL_LEN + 1)})
    assert reply.json()["error"]["code"] == "context_length_exceeded"


def test_no_tokens_without_echo_or_of_an_unknown_adapter_are_refused(server: Server) -> None:
    completions = server.client().completions
    with pytest.raises(openai.BadRequestError, match="nothing to answer without echo=true"):
        completions.create(model=BASE, prompt="fox", max_tokens=0)
    with pytest.raises(openai.NotFoundError, match="gone"):
        completions.create(model="gone", prompt="fox", max_tokens=0, echo=True)
    assert server.engine.requests == []


def test_prompt_logprobs_are_not_asked_for_without_echo(server: Server) -> None:
    server.client().completions.create(model=BASE, prompt="the fox", logprobs=1)
    assert server.engine.requests[0].sampling.prompt_logprobs is None


def test_a_stream_ends_with_the_reason_and_then_usage(server: Server) -> None:
    server.say(" jumps over")
    chunks = list(
        server.client().completions.create(
            model=BASE, prompt="fox", stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].text for c in chunks[:-1]) == " jumps over"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == len(server.ids(" jumps over")) + 1
    assert {c.object for c in chunks} == {"text_completion"}


def test_a_logprob_of_minus_infinity_is_a_number_in_json(server: Server) -> None:
    server.engine.logprob = float("-inf")
    reply = server.client().completions.create(model=BASE, prompt="fox", logprobs=1)
    assert reply.choices[0].logprobs.token_logprobs[0] == -9999.0


def test_a_token_id_past_the_vocabulary_is_refused_with_its_number(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="token id 512; the vocabulary ends at 511"):
        server.client().completions.create(model=BASE, prompt=[5, 512])
