"""Admission: bounded in all and for each tenant, told before the first byte."""

import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.api.admission import Admission
from server.errors import ServeError
from tests.server.api.harness import BASE, Script, serving, wait_until

CHAT: dict[str, Any] = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}


def test_one_tenant_s_share_is_429_and_the_server_s_is_503() -> None:
    admission = Admission(max_total=3, max_per_tenant=2)
    admission.take("a", 2)
    with pytest.raises(ServeError) as tenant:
        admission.take("a", 1)
    admission.take("b", 1)
    with pytest.raises(ServeError) as total:
        admission.take("b", 1)
    assert (tenant.value.status, total.value.status) == (429, 503)
    assert tenant.value.retry_after_s
    assert total.value.retry_after_s


def test_what_is_given_back_may_be_taken_again() -> None:
    admission = Admission(max_total=2, max_per_tenant=2)
    admission.take("a", 2)
    admission.give_back("a", 2)
    admission.take("b", 2)
    assert admission.num_admitted == 2


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 4), st.booleans()), max_size=60))
def test_no_order_of_requests_passes_a_bound(moves: list[tuple[str, int, bool]]) -> None:
    admission = Admission(max_total=8, max_per_tenant=5)
    held: list[tuple[str, int]] = []
    for tenant, count, gives_back in moves:
        if gives_back and held:
            admission.give_back(*held.pop())
        else:
            try:
                admission.take(tenant, count)
                held.append((tenant, count))
            except ServeError:
                pass
        assert admission.num_admitted == sum(number for _, number in held) <= 8
        for name in "abc":
            assert sum(number for owner, number in held if owner == name) <= 5


@pytest.mark.parametrize(("per_tenant", "status"), [(2, 429), (5, 503)])
def test_a_request_too_many_is_refused_until_another_ends(
    tiny_base: Path, tmp_path: Path, per_tenant: int, status: int
) -> None:
    limits: dict[str, Any] = {"max_waiting": 2, "max_waiting_per_tenant": per_tenant}
    with serving(tiny_base, tmp_path / "store", **limits) as server:
        server.loop.call_soon_threadsafe(server.engine.gate.clear)
        server.engine.scripts += [Script([5]), Script([5])]
        http = server.http()
        thread = threading.Thread(
            target=http.post, args=("/v1/chat/completions",), kwargs={"json": CHAT | {"n": 2}}
        )
        thread.start()
        wait_until(lambda: len(server.engine.requests) == 2)
        refused = server.http().post("/v1/chat/completions", json=CHAT | {"stream": True})
        assert refused.status_code == status
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["content-type"] == "application/json"
        server.loop.call_soon_threadsafe(server.engine.gate.set)
        thread.join(10)
        assert server.http().post("/v1/chat/completions", json=CHAT).status_code == 200


def test_a_refused_request_holds_nothing(tiny_base: Path, tmp_path: Path) -> None:
    with serving(tiny_base, tmp_path / "store", max_waiting=1) as server:
        for body in (CHAT | {"model": "no-such"}, CHAT | {"max_tokens": 10**6}, CHAT):
            server.http().post("/v1/chat/completions", json=body)
            assert server.services.admission.num_admitted == 0
