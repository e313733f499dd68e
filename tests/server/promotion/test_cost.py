"""The cost model: exact for what it assumes, and able to say that a merge loses."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.promotion.candidates import Served, candidates
from server.promotion.cost import BASE, StepPoint, StepTimes, estimate
from server.promotion.memory import weight_set_bytes
from server.promotion.step_times import H100, read_step_times


def point(batch: int, plain: float, one: float, many: float, merged: float) -> StepPoint:
    return StepPoint(
        batch=batch, plain_s=plain, one_s=one, many_s=many, num_adapters=batch, merged_s=merged
    )


TIMES = StepTimes(
    source="made up",
    points=(point(1, 1.0, 1.5, 1.5, 0.9), point(2, 1.1, 1.6, 1.9, 1.0), point(4, 1.4, 2, 3.5, 1.2)),
    second_pass_s=0.25,
)
SHARES = st.dictionaries(
    st.sampled_from([BASE, "a", "b", "c", "d"]), st.floats(0.01, 1), min_size=1, max_size=5
)


def by_hand(shares: dict[str, float], batch: int, promoted: set[str]) -> float:
    """Every assignment of the rows to adapters, one after the other."""
    total, seconds = sum(shares.values()), 0.0
    for rows in itertools.product(shares, repeat=batch):
        chance = 1.0
        for row in rows:
            chance *= shares[row] / total
        passes = [TIMES.merged(rows.count(name)) for name in promoted & set(rows)]
        rest = [row for row in rows if row not in promoted]
        if rest:
            passes.append(TIMES.over_base(len(rest), len(set(rest) - {BASE})))
        seconds += chance * (sum(passes) - (len(passes) - 1) * TIMES.second_pass_s)
    return seconds / batch


def test_a_step_of_one_kind_of_rows_is_what_was_measured() -> None:
    for at in TIMES.points:
        assert estimate({BASE: 1}, at.batch, TIMES, ()).without_s == at.plain_s / at.batch
        alone = estimate({"a": 1}, at.batch, TIMES)
        assert alone.without_s == pytest.approx(at.one_s / at.batch)
        assert alone.with_s == pytest.approx(at.merged_s / at.batch)
        assert alone.saved_s == pytest.approx((at.one_s - at.merged_s) / at.batch)


def test_between_batch_sizes_a_pass_lies_on_the_line_and_beyond_them_goes_on() -> None:
    assert TIMES.merged(3) == pytest.approx(1.1)
    assert TIMES.merged(6) == pytest.approx(1.4)
    assert TIMES.merged(0.5) == 0.9
    assert TIMES.over_base(4, 0) == 1.4
    assert TIMES.over_base(4, 1) == 2
    assert TIMES.over_base(4, 4) == pytest.approx(3.5)
    assert TIMES.over_base(4, 2) == pytest.approx(2.5)
    alone = StepTimes(source="", points=TIMES.points[:1])
    assert alone.merged(64) == 0.9


@given(SHARES, st.integers(1, 4), st.sets(st.sampled_from("abcd")))
def test_the_estimate_with_promotion_is_the_sum_over_all_steps(
    shares: dict[str, float], batch: int, promoted: set[str]
) -> None:
    """With one adapter left on the base: of several, the mean number stands for its spread."""
    promoted = (promoted | {"b", "c", "d"}) & shares.keys()
    found = estimate(shares, batch, TIMES, promoted).with_s
    assert found == pytest.approx(by_hand(shares, batch, promoted), rel=1e-9)


@given(SHARES, st.integers(1, 64), st.sets(st.sampled_from("abcd")))
def test_estimates_are_positive_and_scale_with_nothing_but_proportions(
    shares: dict[str, float], batch: int, promoted: set[str]
) -> None:
    found = estimate(shares, batch, TIMES, promoted)
    assert 0 < found.with_s < 1e3
    assert 0 < found.without_s < 1e3
    scaled = estimate({name: 1e6 * share for name, share in shares.items()}, batch, TIMES, promoted)
    assert scaled.with_s == pytest.approx(found.with_s)
    if not promoted & shares.keys():
        assert found.saved_s == pytest.approx(0.0, abs=1e-12)


def test_a_merge_wins_alone_and_loses_beside_others() -> None:
    """Two weight sets in one step are read twice."""
    assert estimate({"a": 1.0}, 32, H100).saved_s > 0
    zipf = {str(rank): 1 / rank for rank in range(1, 33)}
    assert estimate(zipf, 32, H100).saved_s < 0
    assert estimate(zipf, 1, H100, set(zipf)).saved_s > 0  # a step of one row has one pass


def test_the_one_promoted_by_default_is_the_most_popular_and_never_the_base() -> None:
    shares = {BASE: 0.5, "a": 0.2, "b": 0.3}
    assert estimate(shares, 4, TIMES) == estimate(shares, 4, TIMES, {"b"})
    assert estimate({BASE: 1.0}, 4, TIMES).saved_s == 0


def test_rare_and_certain_rows_lose_no_precision() -> None:
    rare = estimate({"a": 1e-9, BASE: 1.0}, 512, TIMES)
    assert rare.with_s == pytest.approx(rare.without_s, rel=1e-5)
    sure = estimate({"a": 1.0, BASE: 1e-12}, 512, TIMES)
    assert sure.with_s == pytest.approx(TIMES.merged(512) / 512, rel=1e-6)


@pytest.mark.parametrize(
    ("shares", "batch", "said"),
    [({}, 1, "not all 0"), ({"a": 0.0}, 1, "not all 0"), ({"a": 1.0}, 0, "batch_size is 0")],
)
def test_what_cannot_be_estimated_is_refused(
    shares: dict[str, float], batch: int, said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        estimate(shares, batch, TIMES)


def test_candidates_are_ordered_by_what_they_save_beside_what_is_promoted() -> None:
    def served(digest: str, tokens: float) -> Served:
        return Served(
            digest=digest, revision=f"{digest}@1", tokens=int(tokens), recent_tokens=tokens
        )

    everyone = [served("a", 100.0), served("b", 900.0), served("c", 0.0)]
    found = candidates(everyone, 0.0, {"b"}, 1, TIMES, 7)
    assert [each.served.digest for each in found] == ["b", "a", "c"]
    assert [each.is_promoted for each in found] == [True, False, False]
    assert [round(each.share, 2) for each in found] == [0.9, 0.1, 0.0]
    shares = {"a": 100.0, "b": 900.0, "c": 0.0}
    both = estimate(shares, 1, TIMES, {"a", "b"}).with_s
    alone = estimate(shares, 1, TIMES, {"b"}).with_s
    assert found[1].saved_s == pytest.approx(alone - both)
    assert found[0].pays
    assert not found[2].pays
    card = found[0].card(1000.0)
    assert card["saved_gpu_seconds"] == pytest.approx(found[0].saved_s * 1000, abs=0.01)
    assert card["num_bytes"] == 7


def test_the_bases_tokens_are_rows_too() -> None:
    served = Served(digest="a", revision="a@1", tokens=1, recent_tokens=1.0)
    (alone,) = candidates([served], 0.0, (), 4, TIMES, 1)
    (beside,) = candidates([served], 9.0, (), 4, TIMES, 1)
    assert (alone.share, beside.share) == (1.0, 0.1)
    assert beside.saved_s < alone.saved_s


def test_who_served_nothing_saves_exactly_nothing_among_any_number_of_others() -> None:
    """A gain of the last bit would be a reason to promote it."""
    for num in range(1, 40):
        everyone = [
            Served(digest=str(n), revision=str(n), tokens=n, recent_tokens=1 / (n + 1))
            for n in range(num)
        ]
        idle = Served(digest="idle", revision="idle", tokens=0, recent_tokens=0.0)
        for promoted in ({"0"}, {"0", "idle"}):
            found = candidates([idle, *everyone], 0.3, promoted, 8, TIMES, 1)
            assert {each.saved_s for each in found if each.served is idle} == {0.0}


def test_each_candidate_costs_one_estimate_and_what_is_promoted_one_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a thousand adapters each one is the time of a thousand powers for each row."""
    asked: list[set[str]] = []

    def count(*args: Any) -> float:
        asked.append(set(args[3]))
        return 1.0

    monkeypatch.setattr("server.promotion.candidates.seconds_per_token", count)
    served = [Served(digest=d, revision=d, tokens=1, recent_tokens=1.0) for d in "abc"]
    candidates(served, 0.0, {"b"}, 4, TIMES, 1)
    assert sorted(map(sorted, asked)) == [[], ["a", "b"], ["b"], ["b", "c"]]


def test_nobody_served_is_nobodys_gain() -> None:
    served = Served(digest="a", revision="a@1", tokens=0, recent_tokens=0.0)
    (found,) = candidates([served], 0.0, (), 4, TIMES, 1)
    assert (found.share, found.saved_s, found.pays) == (0.0, 0.0, False)


def test_a_merged_7b_takes_its_linears_in_four_bits(tmp_path: Path) -> None:
    config = {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
        "vocab_size": 32000,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    linears = 32 * (4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336)
    codes, grids = linears // 2, linears // 128 * 2.5
    assert weight_set_bytes(tmp_path) == int(codes + grids)
    wider = {**config, "head_dim": 128, "num_key_value_heads": None}
    (tmp_path / "config.json").write_text(json.dumps(wider))
    more = 32 * 4096 * 2 * 3072 * (0.5 + 2.5 / 128)  # k and v
    assert weight_set_bytes(tmp_path) == int(codes + grids + more)


def write(path: Path, content: Any) -> Path:
    file = path / "times.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


PLAIN = {
    "batch": 8,
    "plain_ms": 2.6,
    "one_ms": 2.9,
    "many_ms": 3.3,
    "num_adapters": 8,
    "merged_ms": 2.5,
}


def test_step_times_are_read_from_the_plain_form(tmp_path: Path) -> None:
    points = [{**PLAIN, "batch": 32}, PLAIN]
    times = read_step_times(
        write(tmp_path, {"source": "mine", "second_pass_ms": 0.1, "points": points})
    )
    assert times.source == "mine"
    assert times.second_pass_s == pytest.approx(1e-4)
    assert [each.batch for each in times.points] == [8, 32]
    assert times.points[0].many_s == pytest.approx(3.3e-3)
    assert read_step_times(None) is H100


def figures(*rows: tuple[str, float]) -> dict[str, Any]:
    listed = [{"name": name, "value": value, "unit": "ms"} for name, value in rows]
    return {"gpu": "a card", "date": "2026-11-22", "figures": listed}


def test_step_times_are_read_from_a_gpus_table(tmp_path: Path) -> None:
    table = figures(
        ("decode step, batch 8, no adapter", 2.6),
        ("decode step, batch 8, 1 adapter", 2.9),
        ("decode step, batch 8, 8 adapters", 3.3),
        ("decode step, batch 8, merged", 2.5),
        ("prefill of 8 x 2,048 tokens, 8 adapters", 440.0),
    )
    times = read_step_times(write(tmp_path, table))
    assert times.source == "a card, 2026-11-22"
    (found,) = times.points
    assert (found.batch, found.num_adapters) == (8, 8)
    assert [found.plain_s, found.one_s] == pytest.approx([2.6e-3, 2.9e-3])
    assert [found.many_s, found.merged_s] == pytest.approx([3.3e-3, 2.5e-3])


def test_the_tables_of_a_folder_are_read_together(tmp_path: Path) -> None:
    merged = figures(
        ("decode step, batch 8, no adapter", 2.6),
        ("decode step, batch 8, 1 adapter", 2.9),
        ("decode step, batch 8, merged", 2.5),
    )
    (tmp_path / "merged.json").write_text(json.dumps(merged))
    (found,) = read_step_times(tmp_path).points
    assert (found.num_adapters, found.many_s) == (1, found.one_s)  # nothing is known of more
    table = figures(("decode step, batch 8, 8 adapters", 3.3))
    (tmp_path / "table.json").write_text(json.dumps(table))
    (found,) = read_step_times(tmp_path).points
    assert found.num_adapters == 8
    assert found.many_s == pytest.approx(3.3e-3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no JSON object"):
        read_step_times(tmp_path / "empty")


def test_the_measured_trace_is_what_the_model_says() -> None:
    """docs/performance.md: 5,714 tok/s without, 3,946 with the top one of 32 merged."""
    zipf = {str(rank): 1 / rank for rank in range(1, 33)}
    found = estimate(zipf, 32, H100)
    assert found.without_s / found.with_s == pytest.approx(3946 / 5714, abs=0.02)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "cannot be used"),
        ("[]", "no JSON object"),
        ({}, "lack 'points'"),
        ({"points": [{}]}, "lack 'batch'"),
        ({"points": []}, "need batch sizes that rise"),
        ({"points": [PLAIN, PLAIN]}, "need batch sizes that rise"),
        ({"points": [{**PLAIN, "merged_ms": 0}]}, "not all positive"),
        ({"points": [{**PLAIN, "merged_ms": "x"}]}, "cannot be used"),
        (
            figures(("decode step, batch 8, no adapter", 2.6)),
            'no figure "decode step, batch 8, 1 adapter"',
        ),
        (figures(("prefill", 1.0)), "need batch sizes that rise"),
    ],
)
def test_step_times_that_cannot_be_used_are_refused_with_the_file(
    tmp_path: Path, content: Any, said: str
) -> None:
    file = write(tmp_path, content)
    with pytest.raises(ValueError, match=said) as refused:
        read_step_times(file)
    assert str(file) in str(refused.value)
    with pytest.raises(ValueError, match="cannot be used"):
        read_step_times(tmp_path / "nowhere")
