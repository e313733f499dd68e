"""A GPTQ checkpoint as the base, and as a weight set beside one: over what its codes stand for."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from server.engine.gpu_runner import GpuRunner
from server.engine.model_runner import ModelRunner
from server.kernels.nf4_pack import INT4, dequantize_reference
from server.model import gpu_loader
from server.model.decoder import Decoder
from server.model.gpu_decoder import GpuDecoder
from server.model.gpu_loader import load_gpu_decoder, load_gpu_weight_set
from server.model.loader import Checkpoint, load_decoder, load_weight_set
from server.model.rotary import RotaryTables
from server.model.spec import FUSED, read_spec
from tests.server.engine import gpu_reference
from tests.server.engine.conftest import MakeHarness
from tests.server.engine.test_oracle import KINDS, Oracle, disagreements, run_mixed
from tests.server.gptq_folder import quantize_folder

CPU = torch.device("cpu")


def no_progress(stage: str, fraction: float) -> None:
    pass


@pytest.fixture(scope="module")
def folders(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The tiny base in GPTQ's layout, and unquantized with the same values."""
    return quantize_folder(tiny_base, tmp_path_factory.mktemp("quantized"), group_size=32)


@pytest.fixture(scope="module")
def gptq(folders: tuple[Path, Path]) -> Path:
    return folders[0]


@pytest.fixture(scope="module")
def kinds(make_adapter: Callable[..., Path]) -> dict[str, Path]:
    return {name: make_adapter(seed=i, **config) for i, (name, config) in enumerate(KINDS.items())}


@pytest.fixture(scope="module")
def oracle(folders: tuple[Path, Path], kinds: dict[str, Path]) -> Oracle:
    """PEFT in fp32 over the values that the codes stand for."""
    return Oracle(folders[1], kinds)


@pytest.mark.parametrize("on_gpu", [False, True])
def test_adapters_over_it_agree_with_peft_row_by_row(
    on_gpu: bool,
    make_harness: MakeHarness,
    gptq: Path,
    kinds: dict[str, Path],
    oracle: Oracle,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if on_gpu:
        gpu_reference.install(monkeypatch)
    harness = make_harness(base=gptq, quantization="gptq")
    assert isinstance(harness.engine.weight_sets.base, GpuRunner if on_gpu else ModelRunner)
    assert harness.info.quantization == "gptq"
    for name, request in run_mixed(harness, kinds):
        assert len(request.output_ids) == 64
        assert disagreements(oracle, request, name) == []


@pytest.mark.parametrize("quantization", ["nf4", "none"])
def test_another_quantization_of_it_is_refused(
    quantization: Any, make_harness: MakeHarness, gptq: Path
) -> None:
    with pytest.raises(ValueError, match=f"with quantization gptq, not {quantization}"):
        make_harness(base=gptq, quantization=quantization)


def test_gptq_of_an_unquantized_checkpoint_is_refused(
    make_harness: MakeHarness, tiny_base: Path
) -> None:
    with pytest.raises(ValueError, match="holds no GPTQ checkpoint"):
        make_harness(base=tiny_base, quantization="gptq")


@pytest.mark.parametrize("group_size", [32, 64])
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_every_linear_has_the_values_of_its_codes(
    group_size: int, layout: str, tiny_base: Path, tmp_path: Path
) -> None:
    quantized, plain = quantize_folder(tiny_base, tmp_path, group_size, layout)
    expected = load_on_cpu(plain, "none")
    found, packed = load_on_cpu(quantized, "gptq"), load_on_gpu(quantized, "gptq")
    for index, layer in enumerate(expected.layers):
        for group in FUSED:
            wanted = layer.linears[group]
            on_cpu, on_gpu = found.linear(index, group), packed.linear(index, group)
            assert torch.equal(on_cpu.weight.weight, wanted.weight.weight)
            assert on_gpu.weight.format is INT4[group_size]
            assert torch.equal(dequantize_reference(on_gpu.weight), wanted.weight.weight)
            torch.testing.assert_close(on_gpu.row_norms_squared, wanted.row_norms_squared)


def test_a_linear_that_cannot_be_read_is_named(gptq: Path, tmp_path: Path) -> None:
    tensors = load_file(gptq / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.g_idx"] += 1
    damaged = copy_of(gptq, tmp_path / "damaged", tensors)
    with pytest.raises(ValueError, match=r"damaged: model\.layers\.1\.mlp\.up_proj: groups of sc"):
        load_on_cpu(damaged, "gptq")


def copy_of(folder: Path, to: Path, tensors: dict[str, torch.Tensor]) -> Path:
    shutil.copytree(folder, to)
    save_file(tensors, to / "model.safetensors", {"format": "pt"})
    return to


def rotary_of(folder: Path) -> RotaryTables:
    spec = read_spec(folder)
    return RotaryTables(spec.head_dim, spec.rope_theta, 64, 1, CPU)


def load_on_cpu(folder: Path, quantization: str, dtype: torch.dtype = torch.float32) -> Decoder:
    checkpoint, spec, rotary = Checkpoint(folder), read_spec(folder), rotary_of(folder)
    return load_decoder(checkpoint, spec, quantization, dtype, CPU, rotary, no_progress)


def load_on_gpu(folder: Path, quantization: str) -> GpuDecoder:
    checkpoint, spec, rotary = Checkpoint(folder), read_spec(folder), rotary_of(folder)
    return load_gpu_decoder(checkpoint, spec, quantization, CPU, rotary, no_progress)


class TestWeightSets:
    """What equals the base's is the base's own memory; the rest is the checkpoint's."""

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("is_tied", [False, True])
    def test_on_a_cpu(
        self, dtype: torch.dtype, is_tied: bool, tiny_base: Path, tmp_path: Path
    ) -> None:
        base_folder, gptq = changed(tiny_base, tmp_path, is_tied=is_tied)
        base = load_on_cpu(base_folder, "none", dtype)
        found = load_weight_set(Checkpoint(gptq), read_spec(gptq), base)
        assert found.embedding is base.embedding
        assert found.lm_head is base.lm_head
        assert found.rotary is base.rotary
        assert found.final_norm is not base.final_norm
        assert found.layers[0].input_norm is base.layers[0].input_norm
        assert found.layers[1].post_attention_norm is not base.layers[1].post_attention_norm
        alone = load_on_cpu(gptq, "gptq", dtype)
        assert torch.equal(found.final_norm, alone.final_norm)
        for one, other in zip(found.layers, alone.layers, strict=True):
            assert torch.equal(one.post_attention_norm, other.post_attention_norm)
            for group in FUSED:
                x = torch.randn(3, one.linears[group].weight.weight.shape[-1])
                assert torch.equal(one.linears[group](x), other.linears[group](x))

    @pytest.mark.parametrize("is_tied", [False, True])
    def test_on_a_gpu(
        self, is_tied: bool, tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(gpu_loader, "DTYPE", torch.float32)
        base_folder, gptq = changed(tiny_base, tmp_path, is_tied=is_tied)
        base = load_on_gpu(base_folder, "nf4")
        found = load_gpu_weight_set(Checkpoint(gptq), read_spec(gptq), base)
        assert found.embedding is base.embedding
        assert found.lm_head is base.lm_head
        assert found.rotary is base.rotary
        assert found.scratch is base.scratch
        assert found.final_norm is not base.final_norm
        assert found.layers[0].input_norm is base.layers[0].input_norm
        alone = load_on_gpu(gptq, "gptq")
        assert torch.equal(found.final_norm, alone.final_norm)
        for one, other in zip(found.layers, alone.layers, strict=True):
            assert torch.equal(one.post_attention_norm, other.post_attention_norm)
            for group in FUSED:
                assert torch.equal(
                    one.linears[group].weight.packed, other.linears[group].weight.packed
                )

    def test_a_head_and_an_embedding_of_its_own_are_kept(
        self, tiny_base: Path, gptq: Path, tmp_path: Path
    ) -> None:
        tensors = load_file(gptq / "model.safetensors")
        tensors["lm_head.weight"][5, 7] += 1
        tensors["model.embed_tokens.weight"][3, 2] += 1
        own = copy_of(gptq, tmp_path / "own", tensors)
        base = load_on_cpu(tiny_base, "none")
        found = load_weight_set(Checkpoint(own), read_spec(own), base)
        assert torch.equal(found.lm_head.weight, tensors["lm_head.weight"])
        assert torch.equal(found.embedding, tensors["model.embed_tokens.weight"])

    def test_an_unquantized_checkpoint_is_refused(self, tiny_base: Path) -> None:
        base = load_on_cpu(tiny_base, "none")
        with pytest.raises(ValueError, match="a weight set is a GPTQ checkpoint"):
            load_weight_set(Checkpoint(tiny_base), read_spec(tiny_base), base)

    @pytest.mark.parametrize("field", ["rope_theta", "vocab_size", "num_kv_heads"])
    def test_another_shape_than_the_bases_is_refused(
        self, field: str, tiny_base: Path, gptq: Path
    ) -> None:
        spec = read_spec(gptq)
        other = dataclasses.replace(spec, **{field: getattr(spec, field) * 2})
        with pytest.raises(ValueError, match=f"{field} is .* the base's is"):
            load_weight_set(Checkpoint(gptq), other, load_on_cpu(tiny_base, "none"))
        with pytest.raises(ValueError, match=f"{field} is .* the base's is"):
            load_gpu_weight_set(Checkpoint(gptq), other, load_on_gpu(tiny_base, "nf4"))


def changed(tiny_base: Path, folder: Path, *, is_tied: bool) -> tuple[Path, Path]:
    """A base, and a GPTQ checkpoint of it with other norms here and there."""
    tensors = load_file(tiny_base / "model.safetensors")
    if is_tied:
        del tensors["lm_head.weight"]
    base = copy_of(tiny_base, folder / "base", tensors)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": is_tied}))
    tensors["model.norm.weight"] = tensors["model.norm.weight"] + 1
    tensors["model.layers.1.post_attention_layernorm.weight"] *= 2
    merged = copy_of(base, folder / "merged", tensors)
    return base, quantize_folder(merged, folder / "out")[0]
