"""Merge, quantize, gate: what is put in place, what never is, and that a kill costs one stage."""

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from adapters.manifest import AdapterError
from server.base_digest import base_digest
from tests.conftest import MakeAdapter
from tests.training import packing_by_hand
from training import artifact as artifact_module
from training import artifact_stages
from training import quantize as quantize_module
from training.artifact import ArtifactReport, GateFailed, Progress, make_artifact
from training.calibration import Calibration, CalibrationOptions
from training.gate import Figures, Thresholds, run_gate
from training.merge import merge
from training.quantize import claim
from training.quantize_run import Event, WorkerFailed
from training.render import Example

LAX = Thresholds(max_mean_kl=9.0, min_top1_agreement=0.0, max_loss_increase=9.0)
Make = Callable[..., ArtifactReport]


class Killed(BaseException):
    """A kill, as far as a test can tell it from one."""


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each stage was really done; the quantizer is the one by hand."""
    done: Counter[str] = Counter()

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            done[name] += 1
            return function(*args, **more)

        return call

    def calibrate(options: CalibrationOptions, base: Path, template: str | None) -> Calibration:
        rows = torch.randint(256, (6, 24), generator=torch.Generator().manual_seed(options.seed))
        held = [Example(tuple(row), (True,) * 24, ends_turn=True) for row in rows[:2].tolist()]
        return Calibration(
            samples=tuple(map(tuple, rows[2:].tolist())),
            held_out=tuple(held),
            num_row_tokens=96,
            num_text_tokens=0,
            held_out_by="calibration",
        )

    monkeypatch.setattr(artifact_module, "load_calibration", calibrate)
    monkeypatch.setattr(artifact_module, "find_python", lambda wanted, kind: Path("python"))
    monkeypatch.setattr(quantize_module, "find_python", lambda wanted, kind: Path("python"))
    monkeypatch.setattr(artifact_stages, "merge", counted("merge", merge))
    monkeypatch.setattr(artifact_stages, "run_gate", counted("run_gate", run_gate))
    worker = counted("run_worker", packing_by_hand.worker)
    monkeypatch.setattr(quantize_module, "run_worker", worker)
    return done


@pytest.fixture(scope="session")
def adapter(make_adapter: MakeAdapter, tiny_base: Path) -> Path:
    return make_adapter(base=tiny_base, target_modules="all-linear")


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """The folder that artifacts are made in, and nothing else is."""
    return tmp_path / "place"


@pytest.fixture
def make(
    counts: Counter[str], adapter: Path, tiny_base: Path, rows_file: Path, place: Path
) -> Make:
    """Make `place/artifact`; keywords are make_artifact's."""

    def make_it(**changes: Any) -> ArtifactReport:
        options: dict[str, Any] = {
            "adapter": str(adapter),
            "base": tiny_base,
            "out": place / "artifact",
            "base_name": "tiny-base",
            "base_digest": base_digest(tiny_base),
            "store": place.parent / "store",
            "work": place / "work",
            "merge_base": "dequantized",
            "rows": rows_file,
            "gate": LAX,
            "device": "cpu",
        }
        return make_artifact(**(options | changes))

    return make_it


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_an_artifact_says_all_of_where_it_comes_from(
    make: Make, tiny_base: Path, place: Path
) -> None:
    report = make()
    assert names(place) == {"artifact"}
    found = json.loads((place / "artifact" / "turnout.json").read_text())
    assert found == report.provenance
    assert found["base"] == {"name": "tiny-base", "digest": base_digest(tiny_base)}
    assert found["adapter"]["digest"] == report.adapter_digest
    assert found["gate"]["passed"] is True
    assert found["gate"] == found["candidates"]["dequantized"]
    assert found["quantized"]["calibration"]["held_out_by"] == "calibration"
    assert found["quantized"]["source"]["provenance"]["merge_base"] == "dequantized"
    assert found["quantized"]["source"]["provenance"]["adapter"] == found["adapter"]
    assert (report.merge_base, report.group_size) == ("dequantized", 64)
    assert report.digest == base_digest(place / "artifact")
    assert report.num_bytes == sum(path.stat().st_size for path in report.folder.iterdir())
    assert report.folder == place / "artifact"


def test_the_same_making_gives_the_same_bytes(make: Make, place: Path) -> None:
    first = make(out=place / "a")
    second = make(out=place / "b", work=place / "elsewhere")
    for path in first.folder.iterdir():
        assert path.read_bytes() == (second.folder / path.name).read_bytes(), path.name


def test_a_second_call_beside_the_first_is_refused_and_does_it_no_harm(
    make: Make, place: Path
) -> None:
    refused: list[str] = []

    def again(progress: Progress) -> None:
        if progress.stage == "merge":
            with pytest.raises(ValueError, match="another process is at work in") as found:
                make()
            refused.append(str(found.value))

    assert make(on_progress=again).folder.is_dir()
    assert len(refused) == 1
    assert names(place) == {"artifact"}


def test_progress_never_falls_and_names_every_stage(make: Make) -> None:
    told: list[Progress] = []
    make(merge_base="auto", on_progress=told.append)
    totals = [each.total for each in told]
    assert totals == sorted(totals)
    assert totals[0] == 0.0
    assert totals[-1] == pytest.approx(1.0)
    seen = list(dict.fromkeys((each.merge_base, each.stage) for each in told))
    assert seen == [
        (merge_base, stage)
        for merge_base in ("original", "dequantized")
        for stage in ("merge", "quantize", "gate")
    ]
    assert "quantized layer 1 of 2" in {each.note for each in told}


@pytest.mark.parametrize("better", ["original", "dequantized"])
def test_of_two_merge_bases_the_one_with_the_lower_loss_wins(
    better: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def figures(base: Path, adapter: Any, quantized: Path, *_: Any, **__: Any) -> Figures:
        loss = 1.0 if better in quantized.parts else 1.1
        return Figures(
            num_rows=1,
            num_tokens=1,
            mean_kl=0.2 if better in quantized.parts else 0.0,
            max_kl=0.2,
            top1_agreement=1.0,
            adapter_loss=1.0,
            artifact_loss=loss,
        )

    monkeypatch.setattr(artifact_stages, "run_gate", figures)
    report = make(merge_base="auto")
    assert report.merge_base == better
    assert set(report.provenance["candidates"]) == {"original", "dequantized"}
    assert report.provenance["quantized"]["source"]["provenance"]["merge_base"] == better


def test_one_that_fell_through_does_not_win_however_low_its_loss(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def figures(base: Path, adapter: Any, quantized: Path, *_: Any, **__: Any) -> Figures:
        is_original = "original" in quantized.parts
        return Figures(
            num_rows=1,
            num_tokens=1,
            mean_kl=0.5 if is_original else 0.01,
            max_kl=0.5,
            top1_agreement=1.0,
            adapter_loss=1.0,
            artifact_loss=0.5 if is_original else 1.0,
        )

    monkeypatch.setattr(artifact_stages, "run_gate", figures)
    assert make(merge_base="auto", gate={"max_mean_kl": 0.1}).merge_base == "dequantized"


def test_a_failed_gate_puts_nothing_in_place_and_says_by_how_much(
    make: Make, counts: Counter[str], place: Path
) -> None:
    with pytest.raises(GateFailed, match=r"dequantized base: mean KL is .* over 1e-06") as failed:
        make(gate={"max_mean_kl": 1e-6})
    assert names(place) == {"work"}
    report = json.loads(json.dumps(failed.value.report))
    assert report["message"] == str(failed.value)
    assert report["candidates"]["dequantized"]["passed"] is False

    make()  # with other thresholds: what was measured is not measured again
    assert counts == {"merge": 1, "run_worker": 1, "run_gate": 1}
    assert names(place) == {"artifact"}


@pytest.mark.parametrize(
    ("stage", "done_again"),
    [
        ("starting the quantizer", {"merge": 1, "run_worker": 1, "run_gate": 1}),
        ("quantized layer 1", {"merge": 1, "run_worker": 2, "run_gate": 1}),
        ("comparing", {"merge": 1, "run_worker": 1, "run_gate": 1}),
        ("compared layer 1", {"merge": 1, "run_worker": 1, "run_gate": 2}),
    ],
)
def test_a_kill_costs_no_more_than_the_stage_it_hit(
    stage: str, done_again: dict[str, int], make: Make, counts: Counter[str], place: Path
) -> None:
    def kill(progress: Progress) -> None:
        if progress.note.startswith(stage):
            raise Killed

    with pytest.raises(Killed):
        make(on_progress=kill)
    assert names(place) == {"work"}
    make()
    assert names(place) == {"artifact"}
    assert counts == done_again


@pytest.mark.parametrize("last", ["turnout.json is written", "out is there"])
def test_a_kill_while_it_is_put_in_place_is_made_good(
    last: str, make: Make, counts: Counter[str], place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill(*_: Any) -> None:
        raise Killed

    name = {"turnout.json is written": "sync_files", "out is there": "sync_folder"}[last]
    with monkeypatch.context() as patch:
        patch.setattr(artifact_module, name, kill)
        with pytest.raises(Killed):
            make()
    assert (place / "artifact").exists() == (last == "out is there")
    report = make()
    assert counts["run_worker"] == 1
    assert names(place) == {"artifact"}
    assert report.provenance["quantized"]["kind"] == "gptq"


def test_a_merge_that_was_killed_leaves_nothing_for_long(make: Make, place: Path) -> None:
    def kill(progress: Progress) -> None:
        raise Killed

    with pytest.raises(Killed):
        make(on_progress=kill)
    left = place / "work" / "dequantized" / ".merged-merging" / "checkpoint"
    left.mkdir(parents=True)

    def look(progress: Progress) -> None:
        assert progress.stage == "merge" or not left.exists()

    make(on_progress=look)


def test_another_adapter_starts_over(
    make: Make, counts: Counter[str], make_adapter: MakeAdapter, tiny_base: Path, place: Path
) -> None:
    with pytest.raises(GateFailed):
        make(gate={"max_mean_kl": 1e-6})
    other = make_adapter(base=tiny_base, target_modules="all-linear", seed=5)
    report = make(adapter=str(other))
    assert counts["merge"] == 2
    assert report.provenance["adapter"]["digest"] == report.adapter_digest


def test_what_is_there_is_returned_and_anything_else_is_refused(
    make: Make, counts: Counter[str], place: Path
) -> None:
    first = make()
    assert make() == first
    assert counts["run_worker"] == 1
    with pytest.raises(ValueError, match="which exists; name a new folder"):
        make(seed=1)
    with pytest.raises(ValueError, match="which exists; name a new folder"):
        make(backend="auto-round")
    (place / "other").mkdir()
    with pytest.raises(ValueError, match="which exists"):
        make(out=place / "other")
    assert names(place / "other") == set()


def test_a_base_with_buffers_of_old_is_quantized_and_gated(
    make: Make, tiny_base: Path, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    old = make(base=base, base_digest=base_digest(base), allow_other_base=True)
    new = make(out=tmp_path / "new", work=tmp_path / "work")
    assert old.provenance["gate"] == new.provenance["gate"]


def test_a_merge_of_an_adapter_that_was_changed_meanwhile_is_never_taken_for_its_own(
    make: Make,
    make_adapter: MakeAdapter,
    adapter: Path,
    tiny_base: Path,
    counts: Counter[str],
    tmp_path: Path,
) -> None:
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    other = make_adapter(base=tiny_base, target_modules="all-linear", seed=5)

    def change(progress: Progress) -> None:
        if progress.stage == "merge":
            shutil.copytree(other, folder, dirs_exist_ok=True)

    with pytest.raises(ValueError, match="was changed while it was being merged"):
        make(adapter=str(folder), on_progress=change)
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    report = make(adapter=str(folder))
    assert counts["merge"] == 2
    merged = report.provenance["quantized"]["source"]["provenance"]
    assert merged["adapter"]["digest"] == report.adapter_digest


def test_who_comes_next_finds_a_folder_that_nobody_removes_any_more(
    make: Make, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a finished call leaves is gone before another may begin in its place."""
    left: list[bool] = []

    @contextlib.contextmanager
    def watched(work: Path, key: str) -> Iterator[Path]:
        with claim(work, key) as folder:
            yield folder
            left.append(work.exists())

    monkeypatch.setattr(artifact_module, "claim", watched)
    make()
    assert left == [False]


def test_a_quantizer_that_gives_up_puts_nothing_in_place(
    make: Make, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def give_up(*_: Any) -> list[Event]:
        raise WorkerFailed("out of memory")

    monkeypatch.setattr(quantize_module, "run_worker", give_up)
    with pytest.raises(WorkerFailed, match="out of memory"):
        make()
    assert names(place) == {"work"}


def test_bad_input_is_refused_before_anything_is_made(make: Make, place: Path) -> None:
    for changes, complaint in (
        ({"merge_base": "nf4"}, "merge_base is 'nf4'"),
        ({"gate": {"kl": 1}}, "no threshold 'kl'"),
        ({"rows": None}, "nothing to calibrate on"),
        ({"group_size": 128}, "what fits is 64 or 32"),
    ):
        with pytest.raises(ValueError, match=complaint):
            make(**changes)
    with pytest.raises(AdapterError, match="there is no store"):
        make(adapter="nobody")
    assert not place.exists() or names(place) == set()
