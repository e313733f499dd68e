"""What cannot be read fails its own requests, by name, and costs nobody else anything."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from server.engine import adapter_loader
from server.engine.request import AdapterRef
from tests.conftest import MakeAdapter
from tests.server.engine.conftest import Harness, MakeHarness

PROMPT = [4, 5, 6]


@pytest.fixture
def harness(make_harness: MakeHarness) -> Harness:
    return make_harness()


def cut_short(file: Path, adapter: AdapterRef) -> AdapterRef:
    file.write_bytes(file.read_bytes()[:-1000])
    return adapter


def take_away(file: Path, adapter: AdapterRef) -> AdapterRef:
    file.unlink()
    return adapter


def count_wrongly(file: Path, adapter: AdapterRef) -> AdapterRef:
    assert file.exists()
    return msgspec.structs.replace(adapter, num_rank_rows=adapter.num_rank_rows + 1)


def failure(harness: Harness, adapter: AdapterRef) -> str:
    """The error that a request for the adapter gets, beside one for the base that gets none."""
    broken = harness.add(PROMPT, adapter)
    sound = harness.add(PROMPT)
    outputs = harness.run()
    (output,) = outputs[broken.request_id]
    assert output.error_code == "adapter_load_failed"
    assert len(sound.output_ids) == 64
    assert output.error is not None
    return output.error


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut_short, "is damaged"),
        (take_away, "is not in the store"),
        (count_wrongly, "needs 8 rows"),
    ],
)
def test_an_object_that_is_not_whole_is_said_by_its_digest(
    harness: Harness,
    make_adapter: MakeAdapter,
    spoil: Callable[[Path, AdapterRef], AdapterRef],
    said: str,
) -> None:
    adapter = harness.push(make_adapter(r=8))
    objects = harness.config.adapters.store / "objects"
    error = failure(harness, spoil(objects / f"{adapter.digest}.safetensors", adapter))
    assert f"adapter object {adapter.digest} {said}" in error


@pytest.mark.parametrize("lack", [MemoryError(), RuntimeError("can't allocate memory")])
def test_a_lack_of_host_memory_fails_one_load_and_the_next_may_have_it(
    harness: Harness,
    make_adapter: MakeAdapter,
    monkeypatch: pytest.MonkeyPatch,
    lack: Exception,
) -> None:
    """torch says it by RuntimeError, for ordinary and for pinned memory."""
    adapter = harness.push(make_adapter(r=8))
    without = harness.generate(PROMPT)

    def full(*_: Any, **__: Any) -> None:
        raise lack

    with monkeypatch.context() as patch:
        patch.setattr(adapter_loader, "_empty", full)
        assert f"no host memory for adapter object {adapter.digest}" in failure(harness, adapter)

    assert harness.generate(PROMPT, adapter) != without
