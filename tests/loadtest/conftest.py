"""A stub server for each test."""

from collections.abc import Iterator

import pytest

from tests.loadtest.stub import Host, Stub, serving


@pytest.fixture(scope="session")
def host() -> Iterator[Host]:
    with serving() as served:
        yield served


@pytest.fixture(autouse=True)
def no_lead(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here no request has to be sent in time: processes begin almost at once."""
    monkeypatch.setattr("loadtest.fleet._LEAD_S", 0.01)


@pytest.fixture
def stub(host: Host) -> Stub:
    return host.fresh()
