"""A whole run against a stub: every figure that the report holds."""

import asyncio
from collections.abc import Sequence

import pytest

from loadtest.record import Record
from loadtest.run import RunOptions, Unwatched, run
from loadtest.target import Target
from tests.loadtest.making import line, lines
from tests.loadtest.stub import Behaviour, Stub

OPTIONS = RunOptions(check_share=0.1, num_workers=1)


async def test_a_runs_report_says_what_the_stub_did(stub: Stub) -> None:
    stub.registry = {"a": ["da"], "b": ["db"], "liar": ["right"]}
    stub.models = {
        "a": Behaviour(digest="da", tier="gpu"),
        "b": Behaviour(digest="db", tier="disk", ttft_s=0.2),
        "liar": Behaviour(digest="wrong"),
        "busy": Behaviour(status=429, refuse_every=2),
        "cut": Behaviour(cut_after=1),
        "base": Behaviour(path="base", tier=None),
    }
    names = ["a", "b", "a", "liar", "busy", "busy", "cut", "base", "a", "b"]
    trace = [line(0.03 * i, name, seed=i, tenant=f"t{i % 2}") for i, name in enumerate(names)]
    report = await run(Target(url=stub.url), trace, OPTIONS, Unwatched())

    assert report.outcomes == {"ok": 7, "rejected": 1, "failed": 0, "cut": 1, "wrong": 1}
    assert report.reasons == {
        "wrong digest": 1, "rejected tenant_overloaded": 1, "cut connection_lost": 1,
    }  # fmt: skip
    assert report.has_wrong_replies
    assert (report.total.num_requests, report.total.num_tokens) == (7, 21)
    assert {name: part.num_requests for name, part in report.by_path.items()} == {
        "adapter": 6, "base": 1,
    }  # fmt: skip
    assert {name: part.num_requests for name, part in report.by_tier.items()} == {
        "disk": 2, "gpu": 4,
    }  # fmt: skip
    slow = report.by_tier["disk"].ttft.p50
    assert slow is not None
    assert slow >= 0.2
    assert report.models[0].model == "a"
    assert (report.identity.num_checked, report.identity.num_mismatched) == (6, 1)
    assert report.identity.source == "registry"
    assert report.trace.num_lines == len(report.points.outcome) == 10
    assert (report.trace.num_models, report.trace.num_tenants) == (6, 2)
    assert report.trace.loop == "open"
    assert report.environment.server == {"version": "stub"}
    assert report.environment.num_workers == 1
    assert report.target["url"] == stub.url
    assert 0 < report.goodput.share <= 0.7


async def test_replies_of_a_run_are_asked_again_alone(stub: Stub) -> None:
    report = await run(Target(url=stub.url), lines(30), OPTIONS, Unwatched())
    assert (report.recheck.num_asked, report.recheck.num_same) == (3, 3)
    assert len(stub.seen) == 33


async def test_a_run_that_is_stopped_reports_what_is_over(stub: Stub) -> None:
    stub.models["slow"] = Behaviour(ttft_s=600.0)
    trace = [line(0.0, "slow"), *(line(0.001 * i, seed=i) for i in range(1, 6))]

    class Watching(Unwatched):
        num_over = 0

        def records(self, records: Sequence[Record]) -> None:
            self.num_over += len(records)
            if self.num_over == 5:
                running.cancel()

    options = RunOptions(check_share=1.0, num_workers=1)
    running = asyncio.create_task(run(Target(url=stub.url), trace, options, Watching()))
    report = await running
    assert report.outcomes["ok"] == 5
    assert not report.is_whole
    assert report.checks.void[0].startswith("it was stopped: 5 of 6 requests are over")
    assert report.recheck.num_asked == 0


async def test_a_server_whose_answers_change_under_load_gives_wrong_replies(stub: Stub) -> None:
    stub.default = Behaviour(word="mine", loaded_word="yours", ttft_s=0.25)
    trace = lines(5, every_s=0.001)
    report = await run(
        Target(url=stub.url), trace, RunOptions(check_share=1.0, num_workers=1), Unwatched()
    )
    assert report.recheck.num_foreign >= 4
    assert report.outcomes["wrong"] == report.recheck.num_foreign
    assert report.reasons["wrong foreign"] == report.recheck.num_foreign


async def test_whoever_watches_sees_every_stage(stub: Stub) -> None:
    class Watching:
        def __init__(self) -> None:
            self.stages: list[tuple[str, int]] = []
            self.seen = self.steps = 0

        def stage(self, title: str, total: int) -> None:
            self.stages.append((title, total))

        def records(self, records: Sequence[Record]) -> None:
            self.seen += len(records)

        def step(self) -> None:
            self.steps += 1

    watcher = Watching()
    await run(Target(url=stub.url), lines(20), OPTIONS, watcher)
    assert watcher.stages == [("Replaying", 20), ("Asking again, alone", 2)]
    assert (watcher.seen, watcher.steps) == (20, 2)


async def test_a_run_against_nobody_is_void_and_says_so() -> None:
    report = await run(Target(url="http://127.0.0.1:9"), lines(3), OPTIONS, Unwatched())
    assert report.is_void
    assert "no reply is ok" in report.checks.void
    assert report.outcomes["failed"] == 3


def test_options_that_will_not_do_are_refused() -> None:
    with pytest.raises(ValueError, match=r"check_share is 1\.5"):
        RunOptions(check_share=1.5)
    with pytest.raises(ValueError, match="num_workers is -1"):
        RunOptions(num_workers=-1)
