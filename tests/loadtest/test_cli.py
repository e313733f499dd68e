"""The command line against a stub: files written, exit codes, what is refused."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from loadtest import demo
from loadtest.cli import DEFAULT_OUT
from loadtest.report import CompareReport, KneeReport, RunReport, read_report, write_report
from loadtest.trace import Line, read_trace, write_trace
from server import cli
from tests.loadtest.making import lines, record, run_report
from tests.loadtest.stub import Behaviour, Stub
from tests.loadtest.test_fleet import children, wait_until
from tests.server.processes import is_alive

Loadtest = Callable[..., str]


@pytest.fixture
def loadtest(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Loadtest:
    """Run `turnout loadtest …` in a folder of its own; return what it printed."""
    monkeypatch.chdir(tmp_path)

    def run(*args: object, code: int = 0) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            cli.main(["loadtest", *(str(arg) for arg in args)])
        printed = capsys.readouterr()
        assert (stopped.value.code or 0) == code, printed.err + printed.out
        return printed.out + printed.err

    return run


def report_in(folder: Path) -> RunReport:
    found = read_report(folder / "report.json")
    assert isinstance(found, RunReport)
    return found


def test_help_names_every_command_and_loads_no_torch() -> None:
    code = (
        "import sys\nfrom server.cli import main\n"
        "try:\n    main(['loadtest', '--help'])\nexcept SystemExit as stopped:\n"
        "    assert not stopped.code\n"
        "heavy = {'torch', 'transformers'} & set(sys.modules)\nassert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in ("trace", "run", "compare", "knee", "page", "demo"):
        assert f"  {command} " in done.stdout


def test_turnouts_own_help_names_it_and_loads_none_of_it() -> None:
    code = (
        "import sys\nfrom server.cli import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as stopped:\n"
        "    assert not stopped.code\n"
        "assert not [name for name in sys.modules if name.startswith('loadtest')]"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "loadtest" in done.stdout


def test_help_is_whole_at_80_columns(loadtest: Loadtest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    for command in ("run", "trace", "compare"):
        text = loadtest(command, "--help")
        assert max(len(line) for line in text.splitlines()) <= 80
        assert "…" not in text.replace("=…", "")


def test_a_trace_is_made_with_all_that_was_asked_for(loadtest: Loadtest, tmp_path: Path) -> None:
    models = [word for index in range(6) for word in ("--model", f"m{index}")]
    said = loadtest(
        "trace", "--out", "t.jsonl", *models, "--rate", 20, "--duration-s", 10, "--drift-s", 2,
        "--tenants", 2, "--storm-size", 2, "--storm-at-s", 4, "--burst-rate", 30, "--burst-at-s", 1,
        "--burst-s", 2, "--spread", 0.3, "--payloads", "p.jsonl", "--endpoint", "chat",
    )  # fmt: skip
    trace = read_trace(tmp_path / "t.jsonl")
    assert f"{len(trace)} requests for 6 models" in said
    stormy = [line for line in trace if line.model in ("m4", "m5")]
    assert len(stormy) == 2
    assert all(4 <= line.time_s <= 5 for line in stormy)
    assert {line.tenant for line in trace} == {"tenant-0", "tenant-1", "burst"}
    sent = [json.loads(text) for text in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert [each["payload"]["model"] for each in sent] == [line.model for line in trace]
    assert [each["timestamp"] for each in sent] == [round(line.time_s * 1000) for line in trace]
    assert all("messages" in each["payload"] for each in sent)


def test_a_closed_loop_trace_names_users(loadtest: Loadtest, tmp_path: Path) -> None:
    loadtest("trace", "--out", "t", "--model", "m", "--arrivals", "closed", "--users", 3,
             "--requests-per-user", 2)  # fmt: skip
    assert [line.user for line in read_trace(tmp_path / "t")] == [0, 1, 2, 0, 1, 2]


def test_a_run_asks_the_listed_adapters_and_leaves_report_page_and_trace(
    loadtest: Loadtest, tmp_path: Path, stub: Stub
) -> None:
    stub.listed = [{"id": "base"}, {"id": "a", "parent": "base"}, {"id": "b", "parent": "base"}]
    said = loadtest("run", "--url", stub.url, "--rate", 20, "--duration-s", 1, "--output-tokens", 2)
    out = tmp_path / DEFAULT_OUT
    report = report_in(out)
    assert report.outcomes["ok"] == report.trace.num_lines
    assert {row.model for row in report.models} <= {"a", "b"}
    assert (out / "report.html").read_text().startswith("<!doctype html>")
    assert len(read_trace(out / "trace.jsonl")) == report.trace.num_lines
    assert str(DEFAULT_OUT / "report.html") in said


def test_options_reach_the_requests(loadtest: Loadtest, tmp_path: Path, stub: Stub) -> None:
    write_trace(tmp_path / "t", lines(3, tenant="vip"))
    loadtest(
        "run", "--url", stub.url, "--trace", "t", "--out", "o", "--endpoint", "completions",
        "--prompt", "ids", "--token-ids", "5:9", "--temperature", 0.5, "--no-ignore-eos",
        "--header", "X-Extra: 1", "--api-key", "k", "--tenant-key", "vip=v", "--workers", 2,
        "--check-share", 0, "--slo-ttft-s", 30, "--slo-tpot-s", 0, "--slo-e2e-s", 40,
    )  # fmt: skip
    assert len(stub.seen) == 3
    for body, headers in zip(stub.seen, stub.headers, strict=True):
        assert set(body["prompt"]) <= set(range(5, 9))
        assert body["temperature"] == 0.5
        assert "ignore_eos" not in body
        assert (headers["x-extra"], headers["authorization"]) == ("1", "Bearer v")
    report = report_in(tmp_path / "o")
    slo = report.goodput.slo
    assert (slo.ttft_s, slo.tpot_s, slo.e2e_s) == (30.0, None, 40.0)
    assert report.environment.num_workers == 2
    assert not (tmp_path / "o" / "trace.jsonl").exists()  # it was given


def test_a_wrong_reply_is_exit_code_1(loadtest: Loadtest, tmp_path: Path, stub: Stub) -> None:
    stub.default = Behaviour(short_by=1)
    write_trace(tmp_path / "t", lines(3))
    assert "3 x wrong token_count" in loadtest("run", "--url", stub.url, "--trace", "t", code=1)


def test_a_run_without_one_whole_reply_is_exit_code_1(
    loadtest: Loadtest, tmp_path: Path, stub: Stub
) -> None:
    stub.default = Behaviour(status=500)
    write_trace(tmp_path / "t", lines(3))
    assert "no reply is ok" in loadtest("run", "--url", stub.url, "--trace", "t", code=1)


def test_the_gate_passes_an_equal_run_and_fails_a_worse_one(
    loadtest: Loadtest, tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtest.figures.MAX_LATE_S", 10.0)  # a busy machine is no matter here
    write_trace(tmp_path / "t", lines(5))
    run = ("run", "--url", stub.url, "--trace", "t")
    loadtest(*run, "--out", "stored")
    stored = ("--baseline", "stored/report.json", "--tolerance", 1000)
    assert "SLO tpot_s: 0.2 -> 0.3" in loadtest(*run, *stored, "--slo-tpot-s", 0.3)
    stub.default = Behaviour(status=429, refuse_every=3)
    assert "worse: rejected: 1, was 0" in loadtest(*run, *stored, code=1)


def test_a_baseline_that_would_say_nothing_or_be_lost_is_refused_before_the_load(
    loadtest: Loadtest, tmp_path: Path, stub: Stub
) -> None:
    write_trace(tmp_path / "t", lines(2))
    write_trace(tmp_path / "other", lines(3))
    loadtest("run", "--url", stub.url, "--trace", "t", "--out", "stored")
    stub.clear()
    run = ("run", "--url", stub.url, "--baseline", "stored/report.json")
    said = loadtest(*run, "--trace", "t", "--out", "stored", code=1)
    assert "stored/report.json, which this run would write: name another --out" in said
    said = loadtest(*run, "--trace", "other", code=1)
    assert "stored/report.json replayed another trace" in said
    assert not stub.seen


def test_a_baseline_of_another_kind_is_refused(loadtest: Loadtest, tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text("{}")
    write_trace(tmp_path / "t", lines(1))
    said = loadtest("run", "--trace", "t", "--baseline", "r.json", code=1)
    assert said.startswith("turnout: r.json is no load test report")


def test_a_comparison_by_adapter_forces_the_path_by_header_and_checks_it(
    loadtest: Loadtest, tmp_path: Path, stub: Stub
) -> None:
    said = loadtest("compare", "--adapter", "bot", "--url", stub.url, "--batch", 1, "--blocks", 2,
                    "--output-tokens", 3, code=1)  # fmt: skip
    assert "path adapter, not merged" in said  # the stub does not heed the header
    assert {body["model"] for body in stub.seen} == {"bot"}
    assert {headers["x-serving-path"] for headers in stub.headers} == {"adapter", "merged"}


def test_a_comparison_of_two_models_leaves_its_report(
    loadtest: Loadtest, tmp_path: Path, stub: Stub
) -> None:
    stub.models = {"x": Behaviour(gap_s=0.01), "y": Behaviour(gap_s=0.001)}
    loadtest(
        "compare", "--url", stub.url, "--a", "model=x,name=before", "--b", "model=y,name=after",
        "--batch", 2, "--batch", 1, "--batch", 2, "--blocks", 2, "--requests-per-user", 1,
        "--output-tokens", 3,
        "--merged-gib", 1, "--kv-gib", 4, "--out", "o",
    )  # fmt: skip
    report = read_report(tmp_path / "o" / "report.json")
    assert isinstance(report, CompareReport)
    assert report.names == ("before", "after")
    assert report.memory_share == 0.25
    assert [batch.batch for batch in report.batches] == [1, 2]


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ((), "name an --adapter, or both"),
        (("--a", "model=x"), "name an --adapter, or both"),
        (("--a", "name=x", "--b", "name=y"), "neither --a nor --b names a model"),
        (("--adapter", "x", "--merged-gib", 3), "give --kv-gib too"),
    ],
)
def test_a_comparison_of_nothing_is_refused(
    loadtest: Loadtest, options: tuple[object, ...], complaint: str
) -> None:
    assert complaint in loadtest("compare", *options, code=1)


def test_the_knee_is_looked_for_between_the_rates(
    loadtest: Loadtest, tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("loadtest.figures.MAX_LATE_S", 10.0)  # a busy machine is no matter here
    loadtest("knee", "--url", stub.url, "--model", "a", "--low", 4, "--high", 8,
             "--duration-s", 0.5, "--output-tokens", 2, "--precision", 10, "--slo-ttft-s", 20,
             "--out", "o")  # fmt: skip
    report = read_report(tmp_path / "o" / "report.json")
    assert isinstance(report, KneeReport)
    assert report.probes[0].rate == 4
    assert max(probe.rate for probe in report.probes) <= 8


def test_a_search_that_finds_no_knee_is_exit_code_1(loadtest: Loadtest, stub: Stub) -> None:
    stub.default = Behaviour(status=429)
    said = loadtest("knee", "--url", stub.url, "--model", "a", "--low", 4, "--high", 8,
                    "--duration-s", 0.5, code=1)  # fmt: skip
    assert "No knee" in said


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ("run --trace t --rate 5", "--rate is of a trace that is made"),
        ("run --trace t --model other", "--model is of a trace that is made"),
        ("run --token-ids 5:9", "--token-ids wants --prompt ids"),
        ("run --model a --tenant-key vip=k", "'vip', who is no tenant of the trace"),
        ("run --tolerance 0.5", "--tolerance wants a --baseline"),
        ("compare --adapter a --token-ids 5:9", "--token-ids wants --prompt ids"),
        ("trace --out t --arrivals closed --rate 5", "--rate belongs to an open loop"),
        ("trace --out t --users 5", "--users belongs to --arrivals closed"),
        ("trace --out t --storm-at-s 5", "--storm-at-s wants a --storm-size"),
        ("trace --out t --burst-s 5", "--burst-s wants a --burst-rate"),
        ("trace --out t --endpoint chat", "--endpoint wants --payloads"),
        ("trace --out t --model a --url http://u", "--url is asked for models"),
    ],
)
def test_an_option_that_would_do_nothing_is_refused(
    loadtest: Loadtest, words: str, complaint: str
) -> None:
    assert complaint in loadtest(*words.split(), code=1)


@pytest.mark.parametrize("command", ["run", "knee", "compare --b model=b --a"])
def test_a_folder_that_cannot_be_is_found_out_before_the_load(
    loadtest: Loadtest, tmp_path: Path, stub: Stub, command: str
) -> None:
    (tmp_path / "file").touch()
    model = ("model=a",) if command.startswith("compare") else ("--model", "a")
    loadtest(*command.split(), *model, "--url", stub.url, "--out", "file", code=1)
    assert stub.seen == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "SIGTERM"])
def test_a_run_that_is_ended_leaves_no_process(
    tmp_path: Path, stub: Stub, number: signal.Signals
) -> None:
    stub.default = Behaviour(ttft_s=60.0)
    write_trace(tmp_path / "t", lines(3))
    words = ("run", "--url", stub.url, "--trace", "t")
    code = f"from server.cli import main; main(['loadtest', *{words!r}])"
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(demo.EXAMPLES.parent.parent)},
    )  # fmt: skip
    wait_until(lambda: len(stub.seen) == 3)
    (worker,) = children(process.pid)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode not in (0, -signal.SIGTERM)
    assert "Traceback" not in said
    assert not is_alive(worker)


def test_a_run_that_was_stopped_leaves_its_report_and_the_exit_code_of_ctrl_c(
    loadtest: Loadtest, tmp_path: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def stopped(target: object, trace: list[Line], *_: object) -> RunReport:
        return run_report([record(each) for each in range(5)], trace)

    monkeypatch.setattr("loadtest.cli.run_trace", stopped)
    write_trace(tmp_path / "t", lines(6))
    said = loadtest("run", "--url", stub.url, "--trace", "t", "--out", "out", code=130)
    assert "5 of 6 requests are over" in said
    assert report_in(tmp_path / "out").is_void


def test_a_page_is_drawn_again_from_its_report(loadtest: Loadtest, tmp_path: Path) -> None:
    write_report(tmp_path / "r.json", run_report())
    assert "again.html written" in loadtest("page", "r.json", "--out", "again.html")
    assert "<figure id='ttft-cdf'>" in (tmp_path / "again.html").read_text()
    (tmp_path / "stored").mkdir()
    write_report(tmp_path / "stored" / "report.json", run_report())
    assert "stored/report.html written" in loadtest("page", "stored/report.json")


def test_a_server_that_is_not_there_is_said_in_one_line(loadtest: Loadtest) -> None:
    said = loadtest("run", "--url", "http://127.0.0.1:9", code=1)
    assert said.startswith("turnout: http://127.0.0.1:9/v1/models does not answer")
    assert "Traceback" not in said


def test_it_runs_as_a_module_of_its_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "loadtest", "page", str(tmp_path / "none.json")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=demo.EXAMPLES.parent.parent)
    assert done.returncode == 1
    assert done.stderr.startswith("loadtest: ")
    assert "Traceback" not in done.stderr
