"""The knee is found where it is, and not claimed where it was not seen."""

import pytest

from loadtest.figures import Slo
from loadtest.knee import KneeOptions, Verdict, bisect, find_knee
from loadtest.run import Unwatched
from loadtest.target import Target
from loadtest.workload import Workload
from tests.loadtest.stub import Behaviour, Stub


class Server:
    """Holds up to a rate; past another the sender gives out."""

    def __init__(self, knee: float, sender: float = float("inf")) -> None:
        self.tried: list[float] = []
        self._knee, self._sender = knee, sender

    async def holds(self, rate: float) -> Verdict:
        self.tried.append(rate)
        return None if rate > self._sender else rate <= self._knee


@pytest.mark.parametrize("knee", [0.7, 1.0, 3.1, 9.9, 40.0, 63.9])
async def test_the_knee_is_found_within_the_tolerance(knee: float) -> None:
    found, is_bounded = await bisect(Server(knee).holds, 0.5, 64.0, 0.05)
    assert is_bounded
    assert found is not None
    assert found <= knee <= found * 1.05


async def test_few_rates_are_tried() -> None:
    server = Server(9.9)
    await bisect(server.holds, 0.5, 64.0, 0.1)
    assert len(server.tried) <= 10
    assert len(set(server.tried)) == len(server.tried)


async def test_a_search_ends_where_no_number_is_left_to_try() -> None:
    server = Server(9.9)
    found, is_bounded = await bisect(server.holds, 0.5, 64.0, 1e-300)
    assert found == pytest.approx(9.9)
    assert is_bounded
    assert len(server.tried) < 80


async def test_a_server_that_misses_the_lowest_rate_has_no_knee() -> None:
    assert await bisect(Server(0.1).holds, 0.5, 64.0, 0.1) == (None, False)


async def test_a_server_that_holds_the_highest_rate_is_not_bounded() -> None:
    assert await bisect(Server(1000).holds, 0.5, 60.0, 0.1) == (60.0, False)


async def test_where_the_sender_gives_out_the_rate_is_a_lower_bound() -> None:
    assert await bisect(Server(1000, sender=10.0).holds, 0.5, 64.0, 0.1) == (8.0, False)
    found, is_bounded = await bisect(Server(9.0, sender=8.5).holds, 0.5, 10.0, 0.01)
    assert (found, is_bounded) == (8.0, False)


async def test_a_servers_knee_over_http(stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request at a time, 50 ms each: of 40 at 40 a second half wait over half a second."""
    monkeypatch.setattr("loadtest.figures.MAX_LATE_S", 10.0)  # a busy machine is no matter here
    stub.default = Behaviour(per_request_s=0.05)
    options = KneeOptions(
        slo=Slo(ttft_s=0.5, tpot_s=None),
        goal=0.8,
        low=10.0,
        high=40.0,
        tolerance=10.0,
        num_workers=1,
    )
    workload = Workload(
        models=("a",), arrivals="constant", duration_s=1.0, prompt_tokens=2, output_tokens=2
    )
    report = await find_knee(Target(url=stub.url), workload, options, Unwatched())
    by_rate = {probe.rate: probe for probe in report.probes}
    assert by_rate[10.0].good_share >= 0.8
    assert by_rate[40.0].good_share < 0.8
    assert report.knee_per_s is not None
    assert report.knee_per_s < 40.0
    assert report.is_bounded
    assert report.probes[0].rate == 10.0


async def test_every_model_is_asked_once_before_the_first_rate(stub: Stub) -> None:
    """So that no rate pays for bringing an adapter in."""
    workload = Workload(models=tuple("abcdefgh"), duration_s=0.5, output_tokens=2)
    options = KneeOptions(low=2.0, high=2.5, tolerance=10.0, num_workers=1)
    report = await find_knee(Target(url=stub.url), workload, options, Unwatched())
    assert {body["model"] for body in stub.seen[:8]} == set("abcdefgh")
    assert report.probes[0].rate == 2.0


async def test_a_server_that_refuses_everything_misses_and_is_not_the_senders_fault(
    stub: Stub,
) -> None:
    stub.default = Behaviour(status=503)
    options = KneeOptions(low=5.0, high=10.0, num_workers=1)
    workload = Workload(models=("a",), duration_s=0.5, output_tokens=2)
    report = await find_knee(Target(url=stub.url), workload, options, Unwatched())
    assert report.is_void
    assert report.probes[0].void == []
    assert report.probes[0].good_share == 0


@pytest.mark.parametrize(
    "options", [{"low": 0}, {"low": 5.0, "high": 5.0}, {"goal": 0}, {"goal": 1.1}, {"tolerance": 0}]
)
def test_options_that_will_not_do_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(reversed(options))):
        KneeOptions(**options)  # type: ignore[arg-type]
