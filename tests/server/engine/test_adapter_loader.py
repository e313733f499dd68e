"""What cannot be read fails its own requests, by name, and costs nobody else anything."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from server.engine import adapter_loader
from server.engine.adapter_loader import AdapterLoader
from server.engine.request import AdapterRef
from server.model.spec import FUSED, read_spec
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


def cut_a_row_off(file: Path, adapter: AdapterRef) -> AdapterRef:
    with safe_open(file, framework="pt") as stored:
        tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
        metadata = stored.metadata()
    name = next(name for name in tensors if name.endswith(".lora_b"))
    save_file({**tensors, name: tensors[name][1:].contiguous()}, file, metadata)
    return adapter


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
        (cut_a_row_off, "is damaged: layers.0"),
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


def test_a_rank_above_what_this_server_takes_is_said_and_fails_nobody_else(
    make_harness: MakeHarness, make_adapter: MakeAdapter
) -> None:
    """It was registered when higher ranks were served; the GPU's buffers have no place for it."""
    harness = make_harness(adapters={"max_rank": 8})
    said = r"has rank 9; this server takes 8 \(serve --max-rank\)"
    assert re.search(said, failure(harness, harness.push(make_adapter(r=9))))
    highest = harness.push(make_adapter(r=8, use_dora=True))  # and a row for its gain
    assert len(harness.generate(PROMPT, highest)) == 64


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


ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture
def spoilt_memory() -> Iterator[None]:
    """Memory that torch did not clear holds NaN."""
    torch.use_deterministic_algorithms(True)
    assert torch.empty(9).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("spoilt_memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "settings",
    [
        {"r": 8, "target_modules": ALL_LINEAR},  # fills its pages
        {"r": 5, "target_modules": ALL_LINEAR},
        {"r": 8, "target_modules": ["k_proj", "down_proj"]},
        {"r": 8, "target_modules": ALL_LINEAR, "rank_pattern": {"o_proj": 3, "up_proj": 1}},
        {"r": 8, "target_modules": ALL_LINEAR, "layers_to_transform": [1]},
    ],
)
def test_every_number_is_rounded_once_and_zero_where_the_adapter_has_none(
    harness: Harness,
    make_adapter: MakeAdapter,
    settings: dict[str, Any],
    stored: torch.dtype,
    dtype: torch.dtype,
) -> None:
    folder = make_adapter(dtype=stored, lora_alpha=11, **settings)
    adapter = harness.push(folder)
    spec = read_spec(harness.config.model.path)
    base: Any = SimpleNamespace(spec=spec, device=torch.device("cpu"), dtype=dtype)
    loader = AdapterLoader(harness.config.adapters.store / "objects", base, dtype, max_rank=8)
    packed = loader.read(adapter)
    assert packed.num_rows == settings["r"]
    tensors = load_file(folder / "adapter_model.safetensors")
    for group, names in FUSED.items():
        if group not in packed.lora_a:
            assert not any(name.split(".")[1] in settings["target_modules"] for name in names)
            continue
        width = sum(spec.out_splits(group))
        for layer in range(spec.num_layers):
            exact = torch.zeros(width, packed.num_rows, dtype=torch.float64)
            first = 0
            for index, (name, out) in enumerate(zip(names, spec.out_splits(group), strict=True)):
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                lora_a = tensors.get(f"{prefix}.lora_A.weight", torch.zeros(0, 1))
                lora_b = tensors.get(f"{prefix}.lora_B.weight", torch.zeros(1, 0))
                rank = len(lora_a)
                expected_a = torch.zeros(packed.num_rows, spec.in_features(group), dtype=dtype)
                if rank:
                    expected_a[:rank] = lora_a.to(dtype)
                    exact[first : first + out, :rank] = lora_b.double() * (11 / rank)
                assert torch.equal(packed.lora_a[group][layer, index], expected_a)
                first += out
            error = (packed.lora_b[group][layer].double() - exact).abs()
            half = 0.501 * torch.finfo(dtype).eps + 2**-24  # the scaling is a float itself
            assert (error <= half * exact.abs()).all()
