"""Lines, records and reports as tests want them."""

from typing import Any

from loadtest.environment import Environment
from loadtest.figures import Slo
from loadtest.identity import IdentityCheck
from loadtest.recheck import Recheck
from loadtest.record import Record
from loadtest.report import RunReport
from loadtest.run import make_report
from loadtest.target import Target
from loadtest.trace import Line


def line(time_s: float = 0.0, model: str = "a", **changed: Any) -> Line:
    fields = {"tenant": "t", "prompt_tokens": 4, "output_tokens": 3, **changed}
    return Line(time_s=time_s, model=model, **fields)


def lines(count: int, *, every_s: float = 0.02, **changed: Any) -> list[Line]:
    """So many lines, evenly, each with a seed of its own."""
    return [line(index * every_s, **{"seed": index, **changed}) for index in range(count)]


def record(index: int = 0, **changed: Any) -> Record:
    """A reply that is ok, and over with its last token: 3 of them from 0.1 s on, 0.05 s apart."""
    fields: dict[str, Any] = {
        "intended_s": 0.0,
        "late_s": 0.0,
        "outcome": "ok",
        "status": 200,
        "ttft_s": 0.1,
        "e2e_s": 0.2,
        "gaps_s": [0.05, 0.05],
        "num_prompt_tokens": 4,
        "num_tokens": 3,
        **changed,
    }
    end = fields["late_s"] if fields["e2e_s"] is None else fields["e2e_s"]
    return Record(index=index, **{"over_s": end, **fields})


def environment(**changed: Any) -> Environment:
    fields: dict[str, Any] = {
        "cpu": "a processor",
        "num_cores": 2,
        "kernel": "6.0",
        "python": "3.11",
        "packages": {"numpy": "2"},
        "load_average": (0.1, 0.2),
        "num_workers": 1,
        "server": {"version": "1"},
        **changed,
    }
    return Environment(**fields)


def run_report(
    records: list[Record] | None = None, trace: list[Line] | None = None, **changed: Any
) -> RunReport:
    """A report of 20 replies, or of those given."""
    trace = trace or lines(20)
    if records is None:
        records = [record(each, intended_s=one.time_s) for each, one in enumerate(trace)]
    target = Target()
    return make_report(
        target,
        trace,
        records,
        changed.get("slo", Slo()),
        changed.get("environment", environment()),
        IdentityCheck(target, {}),
        changed.get("rechecked", Recheck()),
    )
