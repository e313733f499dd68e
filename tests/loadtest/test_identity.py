"""A reply by another adapter than the one asked for is caught, whatever it says."""

from typing import Any

import httpx
import pytest

from loadtest.identity import IdentityCheck, expected_digests, listed_models, server_facts
from loadtest.record import Record
from loadtest.target import Target
from tests.loadtest.making import record
from tests.loadtest.stub import Stub


def checked(check: IdentityCheck, model: str = "a", **fields: Any) -> Record:
    found = record(**fields)
    check.check(found, model)
    return found


def test_the_right_digest_passes_and_another_is_wrong() -> None:
    check = IdentityCheck(Target(), {"a": "d1"})
    assert checked(check, digest="d1", adapter_id="a@1").is_ok
    other = checked(check, digest="d2", adapter_id="a@2")
    assert (other.outcome, other.reason) == ("wrong", "digest")
    counts = check.counts
    assert (counts.num_checked, counts.num_mismatched, counts.num_unknown) == (2, 1, 0)
    assert counts.source == "registry"


def test_a_reply_that_names_no_digest_where_one_is_known_is_wrong() -> None:
    check = IdentityCheck(Target(), {"a": "d1"})
    found = checked(check)
    assert (found.outcome, found.reason) == ("wrong", "no_digest")


def test_without_a_registry_a_models_first_digest_must_stay() -> None:
    check = IdentityCheck(Target(), {})
    assert checked(check, digest="d1", adapter_id="a@1").is_ok
    assert checked(check, "b", digest="d2", adapter_id="b@1").is_ok
    assert checked(check, digest="d2", adapter_id="a@1").outcome == "wrong"
    assert check.counts.source == "first reply"


def test_an_adapter_id_of_another_name_is_wrong_though_the_digest_is_right() -> None:
    check = IdentityCheck(Target(), {"a": "d1"})
    assert checked(check, digest="d1", adapter_id="b@1").outcome == "wrong"


def test_a_revision_belongs_to_its_name() -> None:
    check = IdentityCheck(Target(), {"a@3": "d3"})
    assert checked(check, "a@3", digest="d3", adapter_id="a@3").is_ok


def test_a_server_that_names_no_digests_is_not_blamed() -> None:
    check = IdentityCheck(Target(), {})
    assert checked(check).is_ok
    assert check.counts.num_unknown == 1


def test_a_reply_by_another_path_than_was_asked_for_is_wrong() -> None:
    check = IdentityCheck(Target(expect_path="merged"), {})
    assert checked(check, path="merged").is_ok
    found = checked(check, path="adapter")
    assert (found.outcome, found.reason) == ("wrong", "path adapter, not merged")


def test_what_is_not_ok_keeps_its_own_reason() -> None:
    check = IdentityCheck(Target(), {"a": "d1"})
    assert checked(check, outcome="cut", reason="timeout").reason == "timeout"
    assert check.counts.num_checked == 0


def test_digests_come_from_the_servers_registry(stub: Stub) -> None:
    stub.registry = {"a": ["d1", "d2"], "b": ["d3"], "unpublished": []}
    found = expected_digests(Target(url=stub.url), ["a", "a@1", "b", "base", "unpublished"])
    assert found == {"a": "d2", "a@1": "d1", "b": "d3"}


@pytest.mark.parametrize("model", ["a@9", "a@latest"])
def test_a_revision_that_is_not_there_leaves_the_others_expected(stub: Stub, model: str) -> None:
    """The server itself will refuse it; that is no reason to stop checking."""
    stub.registry = {"a": ["d1"], "b": ["d3"]}
    assert expected_digests(Target(url=stub.url), [model, "b"]) == {"b": "d3"}


def test_models_that_are_no_objects_are_no_answer(stub: Stub) -> None:
    for listed in (["a", "b"], [{"name": "a"}]):
        stub.listed = listed  # type: ignore[assignment]
        with pytest.raises(ValueError, match="/v1/models does not answer: "):
            listed_models(Target(url=stub.url))


def test_a_server_without_a_registry_has_no_digests_to_give(stub: Stub) -> None:
    assert expected_digests(Target(url=stub.url), ["a"]) == {}
    assert expected_digests(Target(url="http://127.0.0.1:9"), ["a"]) == {}


def test_the_adapters_are_those_of_the_models_that_have_a_parent(stub: Stub) -> None:
    stub.listed = [{"id": "base"}, {"id": "a", "parent": "base"}, {"id": "b", "parent": "base"}]
    assert listed_models(Target(url=stub.url + "/v1")) == ["a", "b"]
    stub.listed = [{"id": "only", "parent": None}]
    assert listed_models(Target(url=stub.url)) == ["only"]


def test_a_server_without_models_is_said_to_have_none(stub: Stub) -> None:
    with pytest.raises(ValueError, match="lists no model"):
        listed_models(Target(url=stub.url))
    with pytest.raises(ValueError, match="does not answer"):
        listed_models(Target(url="http://127.0.0.1:9"))


def test_what_the_server_says_of_itself_is_kept(stub: Stub) -> None:
    assert server_facts(Target(url=stub.url)) == {"version": "stub"}
    assert server_facts(Target(url="http://127.0.0.1:9")) == {}
    assert httpx.get(f"{stub.url}/version").status_code == 200
