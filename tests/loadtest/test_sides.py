"""How a comparison's two sides are put together from what is typed."""

from pathlib import Path

import pytest

from loadtest.cli import _sides, _slo, _stored_run
from loadtest.figures import Slo
from loadtest.report import write_report
from loadtest.target import Target
from tests.loadtest.test_page import a_knee

DEFAULT = Target(url="http://h:1", api_key="k", headers={"x-all": "1"})


def test_an_adapters_two_paths_are_one_model_name_and_a_header_each() -> None:
    names, (adapter, merged) = _sides(DEFAULT, "bot", "", "")
    assert names == ("adapter", "merged")
    assert adapter.model == merged.model == "bot"
    assert adapter.headers == {"x-all": "1", "x-serving-path": "adapter"}
    assert merged.headers == {"x-all": "1", "x-serving-path": "merged"}
    assert (adapter.expect_path, merged.expect_path) == ("adapter", "merged")
    assert adapter.api_key == merged.api_key == "k"


def test_what_is_typed_comes_on_top_of_the_adapters_sides() -> None:
    names, (adapter, merged) = _sides(
        DEFAULT, "bot", "model=bot@1", "url=http://other:2,name=elsewhere"
    )
    assert names == ("adapter", "elsewhere")
    assert (adapter.model, merged.model) == ("bot@1", "bot")
    assert (adapter.url, merged.url) == ("http://h:1", "http://other:2")
    assert merged.expect_path == "merged"


def test_two_servers_can_be_compared_without_an_adapter() -> None:
    names, (a, b) = _sides(DEFAULT, None, "model=m,key=one", "url=http://other:2,key=two")
    assert names == ("A", "B")
    assert (a.model, b.model) == ("m", None)
    assert (a.api_key, b.api_key) == ("one", "two")
    assert a.expect_path is b.expect_path is None


def test_a_path_that_is_expected_need_not_be_asked_for() -> None:
    _, (a, _) = _sides(DEFAULT, None, "model=m,path=merged", "model=m")
    assert a.expect_path == "merged"
    assert "x-serving-path" not in a.headers


def test_a_limit_of_zero_is_none() -> None:
    assert _slo(0, 0, 0) == Slo(ttft_s=None, tpot_s=None, e2e_s=None)
    assert _slo(1.0, 0.2, 3.0) == Slo(ttft_s=1.0, tpot_s=0.2, e2e_s=3.0)


def test_a_stored_report_of_another_kind_is_no_baseline(tmp_path: Path) -> None:
    write_report(tmp_path / "knee.json", a_knee())
    with pytest.raises(ValueError, match="a report of another kind"):
        _stored_run(tmp_path / "knee.json")
