"""Tensors: every one matched, shaped, finite; the object holds them bit for bit; the digest."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import load_file
from safetensors.torch import load_file as load_torch
from safetensors.torch import save_file as save_torch

from adapters.manifest import AdapterRefused, BaseShape, Limits
from adapters.store import StagedObject, Store, object_path
from adapters.weights import CHUNK_BYTES, object_digest, read_object

WriteFolder = Callable[..., Path]
Q0 = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(tmp_path / "store")
    yield store
    store.close()


@pytest.fixture
def stage(store: Store, one_linear: BaseShape) -> Callable[..., StagedObject]:
    def stage(folder: Path, limits: Limits | None = None) -> StagedObject:
        return store.stage(folder, one_linear, limits or Limits())

    return stage


def refusal(stage: Callable[..., StagedObject], folder: Path) -> str:
    with pytest.raises(AdapterRefused) as caught:
        stage(folder)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_object_holds_pefts_tensors_bit_for_bit(
    store: Store, make_adapter: Any, base_shape: BaseShape, dtype: torch.dtype
) -> None:
    folder = make_adapter(dtype=dtype, use_dora=True, target_modules="all-linear", r=3)
    original = load_torch(folder / "adapter_model.safetensors")

    staged = store.stage(folder, base_shape, Limits())

    stored = load_torch(staged.path)
    assert len(stored) == len(original) == 2 * 7 * 3
    for name, tensor in original.items():
        short = name.removeprefix("base_model.model.model.").replace("lora_A.weight", "lora_a")
        short = short.replace("lora_B.weight", "lora_b").replace(
            "lora_magnitude_vector", "magnitude"
        )
        assert stored[short].dtype == dtype
        assert torch.equal(stored[short].view(torch.uint8), tensor.view(torch.uint8))


def test_an_object_carries_its_manifest_and_aligned_tensors(
    write_folder: WriteFolder, store: Store
) -> None:
    base = BaseShape(name="b", digest="d", num_layers=2, linears={"self_attn.q_proj": (3, 3)})
    tensors: dict[str, Any] = {}
    for q in (Q0, Q0.replace(".0.", ".1.")):
        tensors[f"{q}.lora_A.weight"] = np.ones((1, 3), np.float16)  # 6 bytes
        tensors[f"{q}.lora_B.weight"] = np.ones((3, 1), np.float32)
    staged = store.stage(write_folder(tensors=tensors, r=1), base, Limits())

    manifest, tensors = read_object(staged.path)

    assert manifest == staged.manifest
    assert manifest.num_bytes == sum(tensor.num_bytes for tensor in tensors.values())
    assert tensors["layers.0.self_attn.q_proj.lora_a"].dtype == "F16"
    for tensor in tensors.values():
        assert tensor.start % (2 if tensor.dtype == "F16" else 4) == 0
    with safe_open(staged.path, "np") as file:
        assert json.loads(file.metadata()["manifest"])["modules"][0]["scaling"] == 4.0


@pytest.mark.parametrize("suffix", ["lora_magnitude_vector", "lora_magnitude_vector.weight"])
def test_a_magnitude_goes_by_both_names_that_peft_has_used(
    write_folder: WriteFolder, stage: Callable[..., StagedObject], suffix: str
) -> None:
    names = [f"base_model.model.model.layers.{layer}.self_attn.q_proj" for layer in range(2)]
    tensors = {f"{name}.{suffix}": np.ones(8, np.float32) for name in names}

    staged = stage(write_folder(use_dora=True, tensors=tensors))

    assert load_file(staged.path)["layers.1.self_attn.q_proj.magnitude"].shape == (8,)
    assert staged.manifest.num_rank_rows == 3


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "missing A": ({f"{Q0}.lora_A.weight": None}, "layers.0.self_attn.q_proj.lora_a: is missing"),
    "missing B": ({f"{Q0}.lora_B.weight": None}, "layers.0.self_attn.q_proj.lora_b: is missing"),
    "A of another rank": (
        {f"{Q0}.lora_A.weight": (3, 8)},
        "has shape [3, 8]; this base needs [2, 8]",
    ),
    "A of another base": ({f"{Q0}.lora_A.weight": (2, 9)}, "needs [2, 8]"),
    "B of another base": ({f"{Q0}.lora_B.weight": (9, 2)}, "needs [8, 2]"),
    "B transposed": ({f"{Q0}.lora_B.weight": (2, 8)}, "needs [8, 2]"),
    "flat A": ({f"{Q0}.lora_A.weight": (16,)}, "needs [2, 8]"),
    "magnitude without DoRA": ({f"{Q0}.lora_magnitude_vector": (8,)}, "belongs to no module"),
    "untargeted linear": ({Q0.replace("q_p", "k_p") + ".lora_A.weight": (2, 8)}, "belongs to no"),
    "layer too many": ({Q0.replace(".0.", ".2.") + ".lora_A.weight": (2, 8)}, "belongs to no"),
    "layer 00": ({Q0.replace(".0.", ".00.") + ".lora_A.weight": (2, 8)}, "is not a LoRA tensor"),
    "adapter name left in": ({f"{Q0}.lora_A.default.weight": (2, 8)}, "is not a LoRA tensor"),
    "no prefix": ({"model.layers.0.self_attn.q_proj.lora_A.weight": (2, 8)}, "is not a LoRA"),
    "embedding LoRA": (
        {"base_model.model.model.embed_tokens.lora_embedding_A": (2, 8)},
        "LoRA on embeddings is not served",
    ),
    "new embeddings": ({"base_model.model.model.embed_tokens.weight": (9, 8)}, "vocabulary"),
    "new head": ({"base_model.model.lm_head.weight": (9, 8)}, "output head"),
    "lora_bias": ({f"{Q0}.lora_B.bias": (8,)}, "lora_bias"),
    "base bias": ({f"{Q0}.base_layer.bias": (8,)}, "biases are not served"),
    "modules_to_save": ({"base_model.model.norm.modules_to_save.weight": (8,)}, "modules_to_save"),
    "tokens": ({"base_model.model.x.token_adapter.trainable_tokens_delta": (8,)}, "trained tokens"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_tensor_out_of_place_is_refused_by_name(
    write_folder: WriteFolder, stage: Callable[..., StagedObject], case: str
) -> None:
    shapes, word = WRONG[case]
    tensors = {name: shape and np.ones(shape, np.float32) for name, shape in shapes.items()}

    message = refusal(stage, write_folder(tensors=tensors))

    assert word in message
    assert message.startswith("tensor ")


def test_dora_without_its_magnitudes_is_refused(
    write_folder: WriteFolder, stage: Callable[..., StagedObject]
) -> None:
    assert "magnitude: is missing" in refusal(stage, write_folder(use_dora=True))


def test_one_part_under_two_names_is_refused(
    write_folder: WriteFolder, stage: Callable[..., StagedObject]
) -> None:
    ones = np.ones(8, np.float32)
    tensors = {
        f"{Q0}.lora_magnitude_vector": ones,
        f"{Q0}.lora_magnitude_vector.weight": ones,
    }

    assert "is there twice" in refusal(stage, write_folder(use_dora=True, tensors=tensors))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_tensor_with_one_value_that_is_not_finite_is_refused_by_name(
    write_folder: WriteFolder,
    stage: Callable[..., StagedObject],
    dtype: torch.dtype,
    bad: float,
) -> None:
    folder = write_folder()
    weights = folder / "adapter_model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_torch(weights).items()}
    largest = torch.finfo(dtype).max
    tensors[f"{Q0}.lora_A.weight"][0, :2] = torch.tensor([largest, -largest])
    save_torch(tensors, weights)
    stage(folder).discard()
    tensors[f"{Q0}.lora_B.weight"][7, 1] = bad
    save_torch(tensors, weights)

    assert f"tensor '{Q0}.lora_B.weight': holds NaN or Inf" in refusal(stage, folder)


def test_a_refused_adapter_leaves_nothing_behind(
    write_folder: WriteFolder, stage: Callable[..., StagedObject], store: Store
) -> None:
    refusal(stage, write_folder(value=float("nan")))

    assert not list((store.root / "tmp").iterdir())
    assert not list(store.objects.iterdir())


def test_not_finite_values_past_the_first_chunk_are_found(store: Store, tmp_path: Path) -> None:
    size = CHUNK_BYTES // 4
    base = BaseShape(name="b", digest="d", num_layers=1, linears={"self_attn.q_proj": (8, size)})
    lora_a = np.zeros((2, size), np.float32)
    lora_a[1, -1] = np.inf
    folder = tmp_path / "wide"
    folder.mkdir()
    save_torch(
        {f"{Q0}.lora_A.weight": torch.from_numpy(lora_a), f"{Q0}.lora_B.weight": torch.ones(8, 2)},
        folder / "adapter_model.safetensors",
    )
    config = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))

    with pytest.raises(AdapterRefused, match="lora_A"):
        store.stage(folder, base, Limits())


def test_the_digest_forgets_what_changes_no_answer(
    write_folder: WriteFolder, stage: Callable[..., StagedObject]
) -> None:
    first = stage(write_folder("one"))
    same = {
        "lora_dropout": 0.5,
        "base_model_name_or_path": "base",
        "inference_mode": True,
        "target_modules": r".*q_proj",
        "r": 4,
        "rank_pattern": {"q_proj": 2},
        "lora_alpha": 8,
        "alpha_pattern": {"q_proj": 4},
        "sidecar": {"format": 1, "training": {"steps": 10}},
    }

    second = stage(write_folder("two", **same))

    assert second.digest == first.digest
    assert second.path.read_bytes() == first.path.read_bytes()
    assert second.training == {"steps": 10}


CHANGES: dict[str, dict[str, Any]] = {
    "a value": {"value": 2.0},
    "the sign of zero": {"value": -0.0},
    "a dtype": {"tensors": {f"{Q0}.lora_A.weight": np.ones((2, 8), np.float16)}},
    "alpha": {"lora_alpha": 5},
    "rslora": {"use_rslora": True},
    "a template": {"sidecar": {"format": 1, "chat_template": "{{ messages }}"}},
    "another template": {"sidecar": {"format": 1, "chat_template": "{{ messages }} "}},
    "rope": {"sidecar": {"format": 1, "rope": {}}},
    "two values swapped": {
        "tensors": {
            f"{Q0}.lora_A.weight": np.full((2, 8), 2.0, np.float32),
        }
    },
    "the same bytes in another tensor": {
        "tensors": {
            f"{Q0}.lora_B.weight": np.full((8, 2), 2.0, np.float32),
        }
    },
}


def test_the_digest_differs_for_whatever_changes_an_answer(
    write_folder: WriteFolder, stage: Callable[..., StagedObject]
) -> None:
    digests = {"as it is": stage(write_folder("plain")).digest}
    digests["zeros"] = stage(write_folder("zeros", value=0.0)).digest
    for change, options in CHANGES.items():
        digests[change] = stage(write_folder(change.replace(" ", "-"), **options)).digest

    assert len(set(digests.values())) == len(digests)


def test_the_digest_is_the_one_written_down_here(
    write_folder: WriteFolder, stage: Callable[..., StagedObject]
) -> None:
    """A new digest for old content would orphan every adapter in every store: raise FORMAT."""
    assert stage(write_folder()).digest == (
        "85fc127d588994b1bf65c232ca72afbdc86aa2b50060cd40151ef399d97a166f"
    )


def test_a_stored_objects_digest_can_be_worked_out_again(
    write_folder: WriteFolder, stage: Callable[..., StagedObject], store: Store
) -> None:
    staged = stage(write_folder())
    store.put(staged)
    path = object_path(store.root, staged.digest)
    assert object_digest(path) == staged.digest
    assert store.is_whole(staged.digest)

    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)

    assert not store.is_whole(staged.digest)


@pytest.mark.parametrize("manifest", ["", "{}", "[]", '{"modules": 1}', None])
def test_a_safetensors_file_without_a_manifest_is_no_object(
    tmp_path: Path, make_bytes: Callable[..., bytes], manifest: str | None
) -> None:
    path = tmp_path / "object"
    metadata = {} if manifest is None else {"manifest": manifest}
    path.write_bytes(make_bytes({"__metadata__": metadata}))

    with pytest.raises(AdapterRefused, match="holds no manifest"):
        read_object(path)


def test_an_object_of_a_later_format_is_refused(
    write_folder: WriteFolder, stage: Callable[..., StagedObject]
) -> None:
    path = stage(write_folder()).path
    content = path.read_bytes().replace(rb"\"format\":1", rb"\"format\":2")
    path.write_bytes(content)

    with pytest.raises(AdapterRefused, match="format 2"):
        read_object(path)
