"""Which adapter is merged: a folder or a name of the store, and what of either is refused."""

import contextlib
import json
from pathlib import Path

import pytest
import torch

from adapters.manifest import AdapterConflict, AdapterError, AdapterNotFound, BaseShape
from adapters.registry import Registry
from adapters.store import object_path
from tests.conftest import MakeAdapter
from training.merge_adapter import Lora, MergeAdapter, open_adapter

DIGEST = "d" * 64


@pytest.fixture
def base(tiny_base: Path) -> BaseShape:
    return BaseShape.from_config(tiny_base, "tiny", DIGEST)


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path / "store"


def read(
    source: str | Path, base: BaseShape, store: Path, *, allow_other_base: bool = False
) -> MergeAdapter:
    """Open and close: for what can be told without the tensors."""
    scratch = store.parent / "scratch"
    with open_adapter(
        str(source), base, store, scratch, allow_other_base=allow_other_base
    ) as adapter:
        return adapter


def test_a_folder_and_the_store_agree_about_an_adapter(
    base: BaseShape, store: Path, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter(use_dora=True, use_rslora=True)
    with contextlib.closing(Registry.open(store, base)) as registry:
        revision = registry.push("bot", folder)
    scratch = store.parent / "scratch"
    found = []
    for source in (str(folder), "bot"):
        with open_adapter(source, base, store, scratch, allow_other_base=False) as adapter:
            assert adapter.digest == revision.digest
            assert adapter.manifest.chat_template is None
            assert len(adapter.module_names) == 4
            lora = adapter.lora("model.layers.1.self_attn.v_proj", torch.device("cpu"))
            assert adapter.lora("model.layers.1.self_attn.k_proj", torch.device("cpu")) is None
            assert lora is not None
            found.append((adapter.revision, lora))
    (none, one), (name, other) = found
    assert (none, name) == (None, "bot@1")
    assert one.scaling == other.scaling == pytest.approx(16 / 8**0.5)
    assert one.lora_a.shape == (8, 64)
    assert one.lora_b.shape == (32, 8)
    assert one.magnitude is not None
    assert other.magnitude is not None
    for mine, theirs in zip(
        (one.lora_a, one.lora_b, one.magnitude),
        (other.lora_a, other.lora_b, other.magnitude),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


def test_a_name_is_what_is_published_and_a_number_names_any_revision(
    base: BaseShape, store: Path, make_adapter: MakeAdapter
) -> None:
    with contextlib.closing(Registry.open(store, base)) as registry:
        for seed in (1, 2, 3):
            registry.push("bot", make_adapter(seed=seed), publish=seed < 3)
        registry.push("hidden", make_adapter(seed=4), publish=False)
        assert read("bot", base, store).revision == "bot@2", "also while the store is held"
        registry.rollback("bot")
    assert read("bot", base, store).revision == "bot@1"
    assert read("bot@3", base, store).revision == "bot@3"
    for missing in ("bot@4", "hidden", "bots", "bot@", "@1"):
        with pytest.raises(AdapterNotFound, match="has no published adapter or revision"):
            read(missing, base, store)


def test_reading_makes_no_store(base: BaseShape, store: Path) -> None:
    with pytest.raises(AdapterNotFound, match="there is no store at"):
        read("bot", base, store)
    assert not store.exists()


def test_a_folder_without_a_config_is_not_taken_for_a_name(base: BaseShape, store: Path) -> None:
    store.mkdir()
    with pytest.raises(AdapterNotFound, match=r"holds no adapter_config\.json"):
        read(store, base, store)


def test_another_bases_adapter_is_refused_from_the_store(
    base: BaseShape, store: Path, make_adapter: MakeAdapter, tiny_base: Path
) -> None:
    with contextlib.closing(Registry.open(store, base)) as registry:
        registry.push("bot", make_adapter())
    other = BaseShape.from_config(tiny_base, "tiny", "e" * 64)
    with pytest.raises(AdapterConflict, match=r"registered for base dddddddddddd; .* eeeeeeeeeeee"):
        read("bot", other, store)
    assert read("bot", other, store, allow_other_base=True).revision == "bot@1"


def test_a_stored_adapter_of_another_shape_never_gets_through(
    base: BaseShape, store: Path, make_adapter: MakeAdapter, tiny_base: Path
) -> None:
    with contextlib.closing(Registry.open(store, base)) as registry:
        registry.push("bot", make_adapter())
    shapes = dict(base.linears) | {"self_attn.v_proj": (64, 64)}
    wide = BaseShape(name="x", digest="e" * 64, num_layers=2, linears=shapes)
    short = BaseShape(name="x", digest="e" * 64, num_layers=1, linears=base.linears)
    for other in (wide, short):
        with pytest.raises(AdapterError, match="does not fit this base"):
            read("bot", other, store, allow_other_base=True)


def test_another_bases_adapter_is_refused_from_a_folder(
    base: BaseShape, store: Path, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter()
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "someone/else"
    (folder / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(AdapterError, match="is not this server's base"):
        read(folder, base, store)
    assert read(folder, base, store, allow_other_base=True).revision is None


def test_a_folder_that_says_which_base_it_was_trained_on_is_held_to_it(
    base: BaseShape, store: Path, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter()
    for digest, is_refused in (("e" * 64, True), (DIGEST, False)):
        sidecar = {"format": 1, "training": {"base_digest": digest}}
        (folder / "turnout.json").write_text(json.dumps(sidecar))
        if is_refused:
            with pytest.raises(AdapterError, match="is what it was trained on"):
                read(folder, base, store)
        assert read(folder, base, store, allow_other_base=is_refused).revision is None


def test_a_damaged_or_lost_object_is_refused(
    base: BaseShape, store: Path, make_adapter: MakeAdapter
) -> None:
    with contextlib.closing(Registry.open(store, base)) as registry:
        revision = registry.push("bot", make_adapter())
    path = object_path(store, revision.digest)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="bot@1 is damaged"):
        read("bot", base, store)
    path.unlink()
    with pytest.raises(AdapterNotFound, match="has lost bot@1"):
        read("bot", base, store)


def test_ranks_over_the_servers_limits_can_still_be_merged(
    base: BaseShape, store: Path, make_adapter: MakeAdapter
) -> None:
    folder = make_adapter(r=300, target_modules=["down_proj"])
    assert read(folder, base, store).manifest.max_rank == 300


def test_the_delta_is_worked_out_in_fp32() -> None:
    lora_a, lora_b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [0.0]])
    weight = torch.tensor([[1.0, 1.0], [5.0, 7.0]])
    Lora(1, 0.5, lora_a, lora_b, None).add_to(weight)
    assert weight.tolist() == [[2.5, 4.0], [5.0, 7.0]]


def test_dora_gives_each_row_its_magnitude() -> None:
    lora_a, lora_b = torch.zeros(1, 2), torch.zeros(2, 1)
    weight = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    Lora(1, 1.0, lora_a, lora_b, torch.tensor([10.0, -1.0])).add_to(weight)
    assert weight.tolist() == [[6.0, 8.0], [0.0, -1.0]]
