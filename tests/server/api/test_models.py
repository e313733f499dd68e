"""Model cards, tokenize and detokenize."""

from pathlib import Path

import pytest

from tests.conftest import MakeAdapter
from tests.server.api.harness import BASE, MAX_MODEL_LEN, Server

HELLO = [{"role": "user", "content": "hello"}]


def test_the_base_s_card_has_every_field(server: Server) -> None:
    card = server.http().get("/v1/models").json()["data"][0]
    assert set(card) == {
        "id", "object", "created", "owned_by", "root", "parent", "max_model_len", "permission"
    }  # fmt: skip
    assert (card["id"], card["object"], card["parent"]) == (BASE, "model", None)
    assert card["max_model_len"] == MAX_MODEL_LEN
    assert card["permission"][0]["object"] == "model_permission"


def test_an_adapter_s_card_names_its_parent_and_no_path(
    server: Server, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    server.registry.push("support-bot", make_adapter())
    cards = {card.id: card for card in server.client().models.list()}
    card = cards["support-bot"].model_dump()
    assert (card["parent"], card["root"]) == (BASE, "adapter://support-bot@1")
    assert str(tmp_path) not in str(card)
    assert server.client().models.retrieve("support-bot").id == "support-bot"
    assert server.client().models.retrieve("support-bot@1").id == "support-bot@1"
    digest = server.registry.get("support-bot").current.digest  # type: ignore[union-attr]
    assert server.registry.num_leases(digest) == 0


def test_an_adapter_that_is_not_published_is_not_listed(
    server: Server, make_adapter: MakeAdapter
) -> None:
    server.registry.push("draft", make_adapter(), publish=False)
    assert [card.id for card in server.client().models.list()] == [BASE]


def test_a_base_with_a_slash_in_its_name_can_be_asked_for(server: Server) -> None:
    assert server.http().get("/v1/models/some/model").status_code == 404  # ours, with a body
    assert server.http().get("/v1/models/some/model").json()["error"]["code"] == "model_not_found"


def test_a_prompt_is_tokenized_and_the_tokens_give_it_back(server: Server) -> None:
    http = server.http()
    reply = http.post("/tokenize", json={"model": BASE, "prompt": "the fox"}).json()
    assert reply["tokens"] == server.ids("the fox")
    assert (reply["count"], reply["max_model_len"]) == (len(reply["tokens"]), MAX_MODEL_LEN)
    assert reply["token_strs"] is None
    text = http.post("/detokenize", json={"model": BASE, "tokens": reply["tokens"]}).json()
    assert text == {"prompt": "the fox"}


def test_a_chat_is_tokenized_as_it_would_be_served(server: Server) -> None:
    http = server.http()
    http.post("/v1/chat/completions", json={"model": BASE, "messages": HELLO})
    reply = http.post("/tokenize", json={"messages": HELLO, "return_token_strs": True}).json()
    assert reply["tokens"] == server.engine.requests[0].prompt_ids
    assert reply["token_strs"][0] == "<s>"
    less = http.post("/tokenize", json={"messages": HELLO, "add_generation_prompt": False}).json()
    assert less["count"] < reply["count"]


def test_detokenizing_shows_special_tokens(server: Server) -> None:
    reply = server.http().post("/detokenize", json={"tokens": [0, 1]}).json()
    assert reply == {"prompt": "<s></s>"}


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/tokenize", {"model": BASE}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": HELLO}, 400, "prompt"),
        ("/tokenize", {"prompt": "a", "model": "x"}, 404, "model"),
        ("/tokenize", {"prompt": 5}, 400, "prompt"),
        ("/detokenize", {"tokens": "a"}, 400, "tokens"),
        ("/detokenize", {"tokens": [-1]}, 400, "tokens"),
        ("/detokenize", {"tokens": [2**40]}, 400, "tokens"),
        ("/detokenize", {}, 400, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "x"}, 404, "model"),
    ],
)
def test_a_wrong_body_is_refused_by_name(
    server: Server, path: str, body: object, status: int, param: str
) -> None:
    reply = server.http().post(path, json=body)
    assert (reply.status_code, reply.json()["error"]["param"]) == (status, param)
