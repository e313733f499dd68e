"""Merged models beside the base: each row runs through its own weights, and they come and go."""

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.engine import weight_sets as module
from server.engine.messages import WeightSetEvent
from server.engine.model_runner import ModelRunner
from server.engine.request import BASE, Request
from server.engine.weight_sets import WeightSets
from tests.server.engine import gpu_reference
from tests.server.engine.conftest import Harness, MakeHarness
from tests.server.engine.test_oracle import KINDS, Oracle, disagreements
from tests.server.gptq_folder import quantize_folder

PROMPT = [7, 8, 9, 10, 11, 12]


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A merged model, far from the base: in GPTQ's layout, and unquantized with those values."""
    root = tmp_path_factory.mktemp("merged")
    tensors = load_file(tiny_base / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name, tensor in tensors.items():
        if name.endswith("proj.weight"):
            noise = torch.randn(tensor.shape, generator=generator) * tensor.float().std()
            tensors[name] = (tensor.float() + noise).to(tensor.dtype)
    (root / "dense").mkdir()
    (root / "dense" / "config.json").write_bytes((tiny_base / "config.json").read_bytes())
    save_file(tensors, root / "dense" / "model.safetensors", {"format": "pt"})
    return quantize_folder(root / "dense", root, group_size=32)


@pytest.fixture(params=["CPU", "GPU's plumbing"])
def harness(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, make_harness: MakeHarness
) -> Harness:
    if request.param != "CPU":
        gpu_reference.install(monkeypatch)
        return make_harness(quantization="nf4")
    return make_harness()


def wait_for_event(harness: Harness) -> WeightSetEvent:
    """Poll as an idle engine does."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        harness.engine.poll()
        events = harness.engine.weight_sets.take_events()
        if events:
            assert len(events) == 1
            return events[0]
        time.sleep(0.005)
    raise AssertionError("no event came")


def load(harness: Harness, digest: str, folder: Path) -> WeightSetEvent:
    harness.engine.weight_sets.add(digest, folder)
    return wait_for_event(harness)


def test_rows_of_a_merged_model_of_adapters_and_of_the_base_share_a_batch(
    harness: Harness, folders: tuple[Path, Path], make_adapter: Callable[..., Path]
) -> None:
    adapter = harness.push(make_adapter(seed=3, **KINDS["all-linear"]))
    alone = harness.generate(PROMPT), harness.generate(PROMPT, adapter)
    event = load(harness, "merged", folders[0])
    assert (event.digest, event.event) == ("merged", "loaded")
    assert event.num_bytes == (folders[0] / "model.safetensors").stat().st_size
    requests = [
        harness.add(PROMPT),
        harness.add(PROMPT, weight_set="merged"),
        harness.add(PROMPT, adapter),
        harness.add(PROMPT[::-1] * 9, weight_set="merged"),
    ]
    harness.run()
    oracle = Oracle(folders[1], {})
    assert [disagreements(oracle, requests[place], None) for place in (1, 3)] == [[], []]
    assert [requests[0].output_ids, requests[2].output_ids] == list(alone)
    assert requests[1].output_ids != requests[0].output_ids, "the same model twice"


def test_a_merged_model_has_a_prefix_cache_of_its_own(
    make_harness: MakeHarness, folders: tuple[Path, Path]
) -> None:
    harness = make_harness()
    load(harness, "merged", folders[0])
    prompt = list(range(5, 60))
    first = harness.add(prompt)
    harness.run()
    merged, again = harness.add(prompt, weight_set="merged"), harness.add(prompt)
    harness.run()
    assert [first.num_cached_tokens, merged.num_cached_tokens] == [0, 0]
    assert again.num_cached_tokens > 0
    later = harness.add(prompt, weight_set="merged")
    harness.run()
    assert later.num_cached_tokens == again.num_cached_tokens
    assert later.output_ids == merged.output_ids


def test_what_is_dropped_stays_for_its_requests_and_its_cached_kv_goes(
    make_harness: MakeHarness, folders: tuple[Path, Path]
) -> None:
    harness = make_harness()
    load(harness, "merged", folders[0])
    prompt = list(range(5, 60))
    request = harness.add(prompt, weight_set="merged")
    harness.engine.step()
    harness.engine.drop_weight_set("merged")
    harness.engine.step()
    assert "merged" in harness.engine.weight_sets
    harness.run()
    assert len(request.output_ids) == request.sampling.max_tokens
    event = wait_for_event(harness)
    assert (event.digest, event.event) == ("merged", "dropped")
    assert "merged" not in harness.engine.weight_sets
    load(harness, "merged", folders[0])
    later = harness.add(prompt, weight_set="merged")
    harness.run()
    assert later.output_ids == request.output_ids


def test_one_asked_for_again_before_it_left_stays(
    make_harness: MakeHarness, folders: tuple[Path, Path]
) -> None:
    harness = make_harness()
    load(harness, "merged", folders[0])
    harness.add(PROMPT, weight_set="merged")
    harness.engine.drop_weight_set("merged")
    harness.engine.weight_sets.add("merged", folders[0])
    told = harness.engine.weight_sets.take_events()
    assert [event.event for event in told] == ["dropped", "loaded"]  # both askers have an answer
    harness.run()
    harness.engine.poll()
    assert "merged" in harness.engine.weight_sets
    assert not harness.engine.is_loading


def test_a_checkpoint_that_cannot_be_read_fails_by_reason_and_the_base_goes_on(
    harness: Harness, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    event = load(harness, "merged", folders[1])
    assert (event.event, "a weight set is a GPTQ checkpoint" in event.message) == ("failed", True)
    event = load(harness, "merged", tmp_path)
    assert "holds no safetensors" in event.message
    assert "merged" not in harness.engine.weight_sets
    assert harness.generate(PROMPT)
    assert load(harness, "merged", folders[0]).event == "loaded"


def test_dropping_what_is_not_there_is_answered(make_harness: MakeHarness) -> None:
    harness = make_harness()
    harness.engine.drop_weight_set("nothing")
    assert wait_for_event(harness).event == "dropped"


class FakeRunner:
    """Two graphs to capture."""

    def __init__(self) -> None:
        self.num_captured = 0

    def captures(self) -> Iterator[float]:
        for fraction in (0.5, 1.0):
            self.num_captured += 1
            yield fraction


def fake_sets(**given: Any) -> tuple[WeightSets, FakeRunner]:
    runner: Any = FakeRunner()
    return WeightSets(runner, lambda folder: runner, **given), runner


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A thousand bytes."""
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    return tmp_path


def poll_until(sets: WeightSets, condition: Callable[[], bool], in_use: set[str]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        sets.poll(in_use)
        time.sleep(0.001)


def test_more_than_is_set_aside_is_refused_and_room_is_counted(folder: Path) -> None:
    sets, _ = fake_sets(max_bytes=2500)
    for digest in ("a", "b", "c"):
        sets.add(digest, folder)
    (refused,) = sets.take_events()
    assert (refused.digest, refused.event) == ("c", "failed")
    assert "0.00 GB set aside" in refused.message
    assert "--merged-gib" in refused.message
    poll_until(sets, lambda: "b" in sets, set())
    assert sets.num_bytes == 2000
    sets.drop("a")
    poll_until(sets, lambda: "a" not in sets, set())
    assert sets.num_bytes == 1000
    sets.add("c", folder)
    poll_until(sets, lambda: "c" in sets, set())


def test_between_two_graphs_streams_get_steps_and_an_idle_engine_goes_right_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 50.0
    monkeypatch.setattr(module, "time", type("Clock", (), {"monotonic": lambda: now}))
    sets, runner = fake_sets()
    sets.add("a", folder)
    sets._reader.shutdown(wait=True)  # it has been read
    sets.poll({BASE})
    sets.poll({BASE})
    assert runner.num_captured == 1
    now += 1.5
    sets.poll({BASE})
    assert runner.num_captured == 2
    assert "a" not in sets
    sets.poll(set())
    assert "a" in sets


def test_a_load_asked_for_twice_is_made_and_told_once(folder: Path) -> None:
    sets, _ = fake_sets()
    go_on = threading.Event()
    runner: Any = FakeRunner()
    reads: list[Path] = []

    def read(path: Path) -> ModelRunner:
        go_on.wait(30)
        reads.append(path)
        found: ModelRunner = runner
        return found

    sets.load = read
    sets.add("a", folder)
    sets.add("a", folder)
    assert sets.is_loading
    go_on.set()
    poll_until(sets, lambda: "a" in sets, set())
    assert reads == [folder]
    assert [event.event for event in sets.take_events()] == ["loaded"]


@pytest.mark.parametrize("ends_well", [True, False])
def test_one_dropped_while_it_is_read_leaves_nothing_and_both_askers_are_told(
    folder: Path, ends_well: bool
) -> None:
    sets, _ = fake_sets()
    if not ends_well:

        def read(path: Path) -> ModelRunner:
            raise ValueError("torn")

        sets.load = read
    sets.add("a", folder)
    sets.drop("a")
    assert sets.take_events() == []
    poll_until(sets, lambda: not sets.is_loading, set())
    assert [event.event for event in sets.take_events()] == ["failed", "dropped"]
    assert "a" not in sets
    assert sets.num_bytes == 0


def test_one_dropped_while_it_is_read_and_asked_for_again_comes(folder: Path) -> None:
    sets, _ = fake_sets()
    for act in (sets.add, lambda digest, _: sets.drop(digest), sets.add):
        act("a", folder)
    poll_until(sets, lambda: "a" in sets, set())
    assert [event.event for event in sets.take_events()] == ["dropped", "loaded"]
    assert not sets.is_loading


def test_a_checkpoint_that_goes_while_it_is_looked_at_fails_its_load_only(
    tmp_path: Path,
) -> None:
    sets, _ = fake_sets()
    (tmp_path / "model.safetensors").symlink_to(tmp_path / "gone")
    sets.add("a", tmp_path)
    (event,) = sets.take_events()
    assert (event.event, "holds no safetensors" in event.message) == ("failed", True)


def test_memory_that_runs_out_while_capturing_fails_the_load_only(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sets, _ = fake_sets()

    def captures(self: FakeRunner) -> Iterator[float]:
        raise torch.OutOfMemoryError("out of memory")
        yield 1.0

    monkeypatch.setattr(FakeRunner, "captures", captures)
    sets.add("a", folder)
    poll_until(sets, lambda: not sets.is_loading, set())
    (event,) = sets.take_events()
    assert (event.event, event.message) == ("failed", "out of memory")
    assert "a" not in sets
    assert sets.num_bytes == 0


def test_requests_of_a_merged_model_have_an_account_of_their_own(
    make_harness: MakeHarness, folders: tuple[Path, Path]
) -> None:
    harness = make_harness()
    load(harness, "merged", folders[0])
    request: Request = harness.add(PROMPT, weight_set="merged")
    assert request.fairness_key == "merged"
    harness.run()
