"""What is put to a server, and what of it a report may show."""

import json
from typing import Any

import pytest

from loadtest.spec import parse_headers, parse_pairs, parse_range, parse_target
from loadtest.target import Target, body_of, ids, request_bytes, words
from tests.loadtest.making import line


def body(target: Target, **options: Any) -> dict[str, Any]:
    decoded = json.loads(body_of(target, line(seed=5, prompt_tokens=9, output_tokens=7), **options))
    assert isinstance(decoded, dict)
    return decoded


def test_a_completion_asks_for_so_many_tokens_as_a_stream_with_usage() -> None:
    found = body(Target())
    assert found == {
        "model": "a", "prompt": words(line(seed=5, prompt_tokens=9)), "max_tokens": 7,
        "temperature": 0.0, "seed": 5, "stream": True, "stream_options": {"include_usage": True},
        "user": "t", "ignore_eos": True,
    }  # fmt: skip


def test_a_chat_asks_the_same_as_a_message() -> None:
    found = body(Target(endpoint="chat"))
    assert found["messages"] == [{"role": "user", "content": body(Target())["prompt"]}]
    assert "prompt" not in found


def test_a_prompt_of_ids_has_exactly_so_many_in_the_range() -> None:
    found = ids(line(prompt_tokens=500, seed=1), (300, 310))
    assert len(found) == 500
    assert set(found) == set(range(300, 310))
    assert body(Target(prompt="ids"))["prompt"] == ids(line(prompt_tokens=9, seed=5), (300, 4000))


def test_a_prompt_depends_on_its_seed_alone() -> None:
    assert words(line(seed=1)) == words(line(seed=1, model="b"))
    assert words(line(seed=1)) != words(line(seed=2))
    assert len(words(line(prompt_tokens=77)).split()) == 77


def test_what_is_asked_again_is_greedy_and_the_rest_as_hot_as_wanted() -> None:
    assert body(Target(temperature=0.7))["temperature"] == 0.7
    assert body(Target(temperature=0.7), greedy=True)["temperature"] == 0.0


def test_ignore_eos_is_not_sent_to_servers_that_know_it_not() -> None:
    assert "ignore_eos" not in body(Target(ignore_eos=False))


def test_a_target_may_name_another_model_than_the_trace() -> None:
    assert body(Target(model="b"))["model"] == "b"


def test_a_request_is_http_with_the_tenants_own_key() -> None:
    target = Target(
        url="http://host:81/v1",
        api_key="general",
        tenant_keys={"t": "own"},
        headers={"x-serving-path": "merged"},
    )
    head, _, content = request_bytes(target, line()).partition(b"\r\n\r\n")
    first, *headers = head.decode().split("\r\n")
    assert first == "POST /v1/completions HTTP/1.1"
    assert "host: host:81" in headers
    assert "authorization: Bearer own" in headers
    assert "x-serving-path: merged" in headers
    assert f"content-length: {len(content)}" in headers
    assert target.headers_of("another")["authorization"] == "Bearer general"


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("http://h:1", "/v1/completions"),
        ("http://h:1/", "/v1/completions"),
        ("http://h:1/v1/", "/v1/completions"),
        ("http://h/prefix/v1", "/prefix/v1/completions"),
    ],
)
def test_the_route_is_below_v1_once(url: str, path: str) -> None:
    assert Target(url=url).path == path


def test_a_url_that_is_none_is_refused() -> None:
    for url in (
        "localhost:8000", "ftp://h", "", "http://", "http://h:99999", "http://h:x", "http://h:0",
        "http://[::1", "http://h/a b", "http://bücher", "http://h/v1?key=1", f"http://{'h' * 64}",
        "http://a..b",
    ):  # fmt: skip
        with pytest.raises(ValueError, match="url is"):
            Target(url=url)
    with pytest.raises(ValueError, match="token_ids"):
        Target(token_ids=(5, 5))


def test_a_password_in_the_url_is_refused_as_no_request_would_carry_it() -> None:
    with pytest.raises(ValueError, match="url is 'http://h:1'") as refused:
        Target(url="http://user:secret@h:1")
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"headers": {"x-a": "☃"}}, "header 'x-a' has a character"),
        ({"api_key": "secret\n"}, "the API key has a character"),
        ({"tenant_keys": {"vip": "schlüsselβ"}}, "the API key vip has a character"),
        ({"endpoint": "chat", "prompt": "ids"}, "prompt is 'ids'"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0"),
        ({"timeout_s": float("inf")}, "timeout_s is inf"),
        ({"temperature": float("inf")}, "temperature is inf"),
    ],
)
def test_what_could_not_be_sent_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint) as refused:
        Target(**options)
    assert "secret" not in str(refused.value)


def test_a_header_may_hold_what_latin_1_holds() -> None:
    target = Target(headers={"x-a": "ü\t~"})
    assert "x-a: ü\t~".encode("latin-1") in request_bytes(target, line())


def test_no_secret_is_described() -> None:
    target = Target(
        url="http://h:1",
        api_key="secret",
        tenant_keys={"t": "secret"},
        headers={"Authorization": "secret", "x-api-key": "secret", "x-other": "shown"},
    )
    said = json.dumps(target.described())
    assert "secret" not in said
    assert "shown" in said
    assert target.described()["url"] == "http://h:1"


def test_a_side_changes_only_what_it_says() -> None:
    default = Target(url="http://h:1", api_key="k", headers={"x-a": "1"})
    spec = "model=m,header=X-B:2,path=merged,name=ours,key=other"
    name, target = parse_target(spec, default, "B")
    assert name == "ours"
    assert target.model == "m"
    assert target.headers == {"x-a": "1", "x-b": "2"}
    assert (target.expect_path, target.api_key, target.url) == ("merged", "other", "http://h:1")
    assert parse_target("", default, "B") == ("B", default)
    assert parse_target("url=http://other", default, "B")[1].url == "http://other"


@pytest.mark.parametrize("spec", ["nonsense", "colour=red", "url=nowhere"])
def test_a_side_that_will_not_do_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match=r"no part of a target|url is"):
        parse_target(spec, Target(), "A")


def test_typed_headers_pairs_and_ranges() -> None:
    assert parse_headers(["X-Y: z:1"]) == {"x-y": "z:1"}
    assert parse_pairs(["a=b=c"], "--tenant-key") == {"a": "b=c"}
    assert parse_range("3:9") == (3, 9)


@pytest.mark.parametrize("typed", ["no colon", ":value", "a:b\r\nc:d"])
def test_a_header_that_is_none_is_refused(typed: str) -> None:
    with pytest.raises(ValueError, match="--header is"):
        parse_headers([typed])


def test_a_pair_or_range_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="--tenant-key is 'a'"):
        parse_pairs(["a"], "--tenant-key")
    for typed in ("3", "3-9", "a:b", ":9"):
        with pytest.raises(ValueError, match="--token-ids is"):
            parse_range(typed)
