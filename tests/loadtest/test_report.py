"""Reports survive the file, and the environment is what it was."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from loadtest.environment import cpu_model, differences, fingerprint, load_now
from loadtest.report import Report, read_report, write_report
from tests.loadtest.making import environment
from tests.loadtest.test_page import a_comparison, a_knee, a_run


@pytest.mark.parametrize("make", [a_run, a_comparison, a_knee])
def test_a_report_is_read_as_it_was_written(make: Callable[[], Report], tmp_path: Path) -> None:
    report = make()
    write_report(tmp_path / "deep" / "report.json", report)
    assert read_report(tmp_path / "deep" / "report.json") == report


@pytest.mark.parametrize("text", ["", "{}", '{"kind": "other"}', '{"kind": "run"}'])
def test_a_file_that_holds_no_report_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "r").write_text(text)
    with pytest.raises(ValueError, match="no load test report"):
        read_report(tmp_path / "r")


def test_the_fingerprint_names_the_machine_the_packages_and_the_server() -> None:
    found = fingerprint(load_before=1.5, num_workers=3, server={"version": "9"})
    assert found.num_cores == os.cpu_count()
    assert found.packages["uvloop"]
    assert found.load_average[0] == 1.5
    assert (found.num_workers, found.server) == (3, {"version": "9"})
    assert found.cpu
    assert load_now() >= 0


def test_the_processors_name_is_read_where_linux_has_it(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: A CPU: fast\n")
    assert cpu_model(tmp_path / "cpuinfo") == "A CPU: fast"
    assert cpu_model(tmp_path / "nowhere")


def test_differences_are_named_and_load_averages_are_none() -> None:
    a = environment()
    assert differences(a, environment(load_average=(5.0, 5.0))) == []
    changed = environment(python="3.12", server={"version": "1", "gpu": "x"})
    assert differences(a, changed) == ["python: 3.11 -> 3.12", "server gpu: None -> x"]
