"""Chat completions through the official client."""

import json
import math

import openai
import pytest

from tests.server.api.harness import BASE, EOS, MAX_MODEL_LEN, Script, Server, wait_until

HELLO = [{"role": "user", "content": "hello there"}]
PROMPT = "<s>[user]hello there[assistant]"


def test_a_chat_is_answered_with_one_message(server: Server) -> None:
    server.say("the quick brown fox")
    reply = server.client().chat.completions.create(model=BASE, messages=HELLO)
    choice = reply.choices[0]
    assert choice.message.content == "the quick brown fox"
    assert (choice.message.role, choice.finish_reason, choice.index) == ("assistant", "stop", 0)
    assert (reply.object, reply.model) == ("chat.completion", BASE)
    assert reply.id.startswith("chatcmpl-")
    assert reply.system_fingerprint.startswith("fp_")


def test_the_message_has_the_fields_that_clients_need(server: Server) -> None:
    reply = server.http().post(
        "/v1/chat/completions", json={"model": BASE, "messages": HELLO, "max_tokens": 2}
    )
    choice = reply.json()["choices"][0]
    assert choice["message"]["refusal"] is None
    assert choice["message"]["annotations"] == []
    assert choice["logprobs"] is None


def test_the_rendered_template_is_encoded_without_a_second_beginning_of_text(
    server: Server,
) -> None:
    server.client().chat.completions.create(model=BASE, messages=HELLO)
    asked = server.engine.requests[0].prompt_ids
    assert asked == server.ids(PROMPT)
    assert asked.count(server.ids("<s>")[0]) == 1


def test_usage_counts_prompt_completion_and_cached_tokens(server: Server) -> None:
    server.say("the quick brown fox")
    usage = server.client().chat.completions.create(model=BASE, messages=HELLO).usage
    num_prompt = len(server.ids(PROMPT))
    num_completion = len(server.ids("the quick brown fox")) + 1  # the end of sequence counts
    assert (usage.prompt_tokens, usage.completion_tokens) == (num_prompt, num_completion)
    assert usage.total_tokens == num_prompt + num_completion
    assert usage.prompt_tokens_details.cached_tokens == 3


def test_text_parts_are_joined_and_a_developer_is_the_template_s_system(server: Server) -> None:
    parts = [{"type": "text", "text": "hello"}, {"type": "text", "text": "there"}]
    server.client().chat.completions.create(
        model=BASE,
        messages=[{"role": "developer", "content": "be kind"}, {"role": "user", "content": parts}],
    )
    asked = server.codec.decode(server.engine.requests[0].prompt_ids, skip_special_tokens=False)
    assert asked == "<s>[system]be kind[user]hello\nthere[assistant]"


def test_our_own_message_may_be_sent_back_as_it_came(server: Server) -> None:
    http = server.http()
    first = http.post("/v1/chat/completions", json={"model": BASE, "messages": HELLO}).json()
    message = first["choices"][0]["message"]
    follow_up = [*HELLO, message, {"role": "user", "content": "and now?"}]
    reply = http.post("/v1/chat/completions", json={"model": BASE, "messages": follow_up})
    assert reply.status_code == 200


def test_a_message_that_the_template_refuses_is_the_client_s_mistake(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match=r"Roles must alternate\.") as caught:
        server.client().chat.completions.create(model=BASE, messages=[*HELLO, *HELLO])
    assert caught.value.param == "messages"


def test_a_stream_says_the_role_first_and_the_reason_last(server: Server) -> None:
    server.say("the quick brown fox")
    stream = server.client().chat.completions.create(model=BASE, messages=HELLO, stream=True)
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "the quick brown fox"
    assert [c.choices[0].finish_reason for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    assert len({(c.id, c.created, c.system_fingerprint) for c in chunks}) == 1
    assert all(c.usage is None for c in chunks)


def test_a_stream_s_bytes_are_data_events_that_end_with_done(server: Server) -> None:
    reply = server.http().post(
        "/v1/chat/completions", json={"model": BASE, "messages": HELLO, "stream": True}
    )
    events = reply.text.split("\n\n")
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert events[-2:] == ["data: [DONE]", ""]
    for event in events[:-2]:
        assert json.loads(event.removeprefix("data: "))["choices"][0]["index"] == 0


def test_a_stream_tells_its_usage_only_when_asked(server: Server) -> None:
    server.say("the quick brown fox")
    chunks = list(
        server.client().chat.completions.create(
            model=BASE, messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].choices == []
    assert chunks[-1].usage.prompt_tokens == len(server.ids(PROMPT))
    assert chunks[-1].usage.completion_tokens == len(server.ids("the quick brown fox")) + 1
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_client_s_stream_helper_puts_the_message_together(server: Server) -> None:
    server.say("once upon a time")
    with server.client().chat.completions.stream(model=BASE, messages=HELLO) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.content == "once upon a time"


def test_tokens_that_come_at_once_make_one_event(server: Server) -> None:
    server.say("the quick brown fox", tokens_at_once=100)
    chunks = list(server.client().chat.completions.create(model=BASE, messages=HELLO, stream=True))
    texts = [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]
    assert texts == ["the quick brown fox"]


def test_a_character_of_several_tokens_comes_when_it_is_whole(server: Server) -> None:
    text = "naïve 😀 end"
    server.say(text)
    chunks = list(server.client().chat.completions.create(model=BASE, messages=HELLO, stream=True))
    texts = [c.choices[0].delta.content or "" for c in chunks]
    assert "".join(texts) == text
    assert not any("\ufffd" in part for part in texts)


def test_a_character_that_never_gets_whole_is_shown_at_the_end(server: Server) -> None:
    half = server.ids("😀")[:2]
    server.engine.scripts.append(Script([*server.ids("end"), *half], "length"))
    reply = server.client().chat.completions.create(model=BASE, messages=HELLO)
    assert reply.choices[0].message.content == "end\ufffd"


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it_and_aborts_the_rest(
    server: Server, stream: bool
) -> None:
    server.say("the quick brown fox jumps over", tokens_at_once=3)
    client = server.client()
    given = {"model": BASE, "messages": HELLO, "stop": ["zebra", "wn fo"]}
    if stream:
        options = {"include_usage": True}
        chunks = list(client.chat.completions.create(**given, stream=True, stream_options=options))
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
        reason, usage = chunks[-2].choices[0].finish_reason, chunks[-1].usage
    else:
        reply = client.chat.completions.create(**given)
        choice, usage = reply.choices[0], reply.usage
        text, reason = choice.message.content, choice.finish_reason
    assert (text, reason) == ("the quick bro", "stop")
    ids = server.ids("the quick brown fox jumps over")
    ends = [server.codec.decode(ids[:n]) for n in range(len(ids) + 1)]
    used = next(n for n, end in enumerate(ends) if "wn fo" in end)
    assert usage.completion_tokens == used
    assert server.engine.aborted == [server.engine.requests[0].request_id]


def test_a_choice_that_stops_is_aborted_while_another_goes_on(server: Server) -> None:
    server.say("the quick brown fox jumps")
    server.say("once upon a time there was", finish=None)
    stream = server.client().chat.completions.create(
        model=BASE, messages=HELLO, n=2, stop=["fox"], stream=True
    )
    wait_until(lambda: server.engine.aborted == [server.engine.requests[0].request_id])
    assert server.services.admission.num_admitted == 2
    stream.close()


def test_logprobs_end_with_the_token_that_completed_the_stop_string(server: Server) -> None:
    server.say("the quick brown fox jumps", tokens_at_once=100)
    reply = server.client().chat.completions.create(
        model=BASE, messages=HELLO, stop=["fox"], logprobs=True
    )
    assert len(reply.choices[0].logprobs.content) == reply.usage.completion_tokens
    assert "jump" not in "".join(entry.token for entry in reply.choices[0].logprobs.content)


def test_a_stop_string_within_min_tokens_is_text_like_any_other(server: Server) -> None:
    text = "fox fox fox"
    num_first = len(server.ids("fox"))
    server.say(text)
    reply = server.client().chat.completions.create(
        model=BASE, messages=HELLO, stop="fox", extra_body={"min_tokens": num_first}
    )
    assert reply.choices[0].message.content == "fox "


def test_the_end_of_sequence_is_no_text_but_a_stop_id_s_neighbour_is(server: Server) -> None:
    comma = server.ids(",")[0]
    server.engine.scripts.append(Script([*server.ids("fox"), comma], "stop"))
    reply = server.client().chat.completions.create(
        model=BASE, messages=HELLO, extra_body={"stop_token_ids": [comma]}
    )
    assert reply.choices[0].message.content == "fox"
    assert reply.usage.completion_tokens == len(server.ids("fox")) + 1
    assert server.engine.requests[0].sampling.stop_token_ids == (comma,)


def test_every_sampling_field_reaches_the_engine(server: Server) -> None:
    server.client().chat.completions.create(
        model=BASE,
        messages=HELLO,
        max_completion_tokens=7,
        temperature=0.5,
        top_p=0.9,
        presence_penalty=1.5,
        frequency_penalty=-0.5,
        logit_bias={"5": -100, "6": 2.5},
        seed=-(2**63),
        user="someone",
        extra_body={
            "top_k": 40,
            "min_p": 0.05,
            "repetition_penalty": 1.1,
            "min_tokens": 2,
            "ignore_eos": True,
            "stop_token_ids": [9],
        },
    )
    asked = server.engine.requests[0].sampling
    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.top_k) == (7, 0.5, 0.9, 40)
    assert (asked.min_p, asked.repetition_penalty, asked.min_tokens) == (0.05, 1.1, 2)
    assert (asked.presence_penalty, asked.frequency_penalty) == (1.5, -0.5)
    assert asked.logit_bias == {5: -100.0, 6: 2.5}
    assert (asked.seed, asked.ignore_eos, asked.stop_token_ids) == (-(2**63), True, (9,))


def test_the_defaults_are_openai_s(server: Server) -> None:
    server.client().chat.completions.create(model=BASE, messages=HELLO)
    asked = server.engine.requests[0]
    assert asked.sampling.temperature == 1.0
    assert asked.sampling.max_tokens == MAX_MODEL_LEN - len(asked.prompt_ids)
    assert (asked.sampling.seed, asked.sampling.logprobs) == (None, None)
    assert (asked.adapter, asked.tenant) == (None, "")


def test_n_choices_are_n_requests_with_seeds_of_their_own(server: Server) -> None:
    for text in ("fox", "dog", "train"):
        server.say(text)
    reply = server.client().chat.completions.create(model=BASE, messages=HELLO, n=3, seed=2**63 - 1)
    assert [c.message.content for c in reply.choices] == ["fox", "dog", "train"]
    assert [c.index for c in reply.choices] == [0, 1, 2]
    seeds = [request.sampling.seed for request in server.engine.requests]
    assert seeds == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert len({request.request_id for request in server.engine.requests}) == 3
    assert reply.usage.prompt_tokens == len(server.ids(PROMPT))


def test_n_streamed_choices_each_have_role_text_and_reason(server: Server) -> None:
    server.say("the quick brown fox", delay_s=0.001)
    server.say("dog")
    chunks = list(
        server.client().chat.completions.create(model=BASE, messages=HELLO, n=2, stream=True)
    )
    for index, text in enumerate(("the quick brown fox", "dog")):
        own = [c.choices[0] for c in chunks if c.choices[0].index == index]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == text
        assert own[-1].finish_reason == "stop"


def test_logprobs_show_each_token_with_its_bytes_and_alternatives(server: Server) -> None:
    server.say("fox")
    reply = server.client().chat.completions.create(
        model=BASE, messages=HELLO, logprobs=True, top_logprobs=2
    )
    entries = reply.choices[0].logprobs.content
    ids = [*server.ids("fox"), EOS]
    assert [e.token for e in entries] == [server.codec.text_of(i) for i in ids]
    assert bytes(entries[0].bytes) == server.codec.piece(ids[0])
    assert [t.logprob for t in entries[0].top_logprobs] == [-1.0, -2.0]
    assert all(math.isclose(e.logprob, -0.5) for e in entries)
    assert server.engine.requests[0].sampling.logprobs == 2


def test_streamed_logprobs_come_with_their_text(server: Server) -> None:
    server.say("fox")
    chunks = list(
        server.client().chat.completions.create(
            model=BASE, messages=HELLO, logprobs=True, stream=True
        )
    )
    given = [c.choices[0].logprobs for c in chunks]
    tokens = [e.token for logprobs in given if logprobs for e in logprobs.content]
    assert tokens == [server.codec.text_of(i) for i in [*server.ids("fox"), EOS]]
    assert all(e.top_logprobs == [] for g in given if g for e in g.content)


def test_a_prompt_and_limit_past_the_context_are_refused_with_the_numbers(server: Server) -> None:
    num_prompt = len(server.ids(PROMPT))
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(
            model=BASE, messages=HELLO, max_tokens=MAX_MODEL_LEN - num_prompt + 1
        )
    assert caught.value.code == "context_length_exceeded"
    assert f"need {MAX_MODEL_LEN + 1} tokens" in caught.value.message
    assert f"the limit is {MAX_MODEL_LEN}" in caught.value.message
    assert server.engine.requests == []


def test_a_prompt_that_leaves_no_room_is_refused(server: Server) -> None:
    long = [{"role": "user", "content": "~" * MAX_MODEL_LEN}]
    with pytest.raises(openai.BadRequestError) as caught:
        server.client().chat.completions.create(model=BASE, messages=long)
    assert caught.value.code == "context_length_exceeded"
