"""What doctor says about memory is what the parts take, and it fits a terminal."""

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from bitsandbytes.functional import quantize_4bit
from rich.console import Console

from server.config import AdapterConfig, CacheConfig, Config, ModelConfig
from server.doctor import (
    NF4_BITS,
    Budget,
    Needs,
    budget,
    cpu_flags,
    gpu_text,
    memory_rows,
    needs,
    report,
    size_text,
)
from server.kernels.dense_linear import can_pack
from server.kernels.nf4_pack import CHUNK_IN, INT4, TILE_OUT
from server.model.adapter_bank import AdapterBank
from server.model.kv_cache import KVCache
from server.model.spec import ModelSpec, read_spec

CPU, GPU = torch.device("cpu"), torch.device("cuda")
MISTRAL_7B = ModelSpec(
    num_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=32000,
    max_positions=32768,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    sliding_window=4096,
    tie_word_embeddings=False,
    eos_token_ids=(2,),
)


def num_bytes(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def test_a_16_bit_base_takes_its_parameters(tiny_base: Path) -> None:
    model = transformers.MistralForCausalLM.from_pretrained(tiny_base)
    need = needs(read_spec(tiny_base), "none", torch.float16, GPU)
    assert need.weights == 2 * sum(weight.numel() for weight in model.parameters())


def test_nf4_bits_are_what_bitsandbytes_takes() -> None:
    weight = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(0))
    packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    taken = num_bytes([packed, state.absmax, state.state2.absmax])
    assert math.isclose(8 * taken / weight.numel(), NF4_BITS, rel_tol=1e-3)


def test_mistral_7b_in_nf4_takes_what_is_known_of_it() -> None:
    need = needs(MISTRAL_7B, "nf4", torch.bfloat16, GPU)
    assert math.isclose(need.weights, 6_979_321_856 * NF4_BITS / 8 + 2 * 262_410_240, rel_tol=1e-4)
    assert need.bank_row * 16 == 41_943_040 * 2  # PEFT's count at rank 16, all-linear
    assert need.kv_token == 131_072


def test_nf4_on_a_cpu_takes_16_bits_a_weight(tiny_base: Path) -> None:
    spec = read_spec(tiny_base)
    on_cpu = needs(spec, "nf4", torch.bfloat16, CPU)
    assert on_cpu.weights == needs(spec, "none", torch.bfloat16, CPU).weights
    assert on_cpu.weights > needs(spec, "nf4", torch.bfloat16, GPU).weights
    assert "expanded" in on_cpu.weights_note


@pytest.mark.parametrize(("group_size", "bits"), [(32, 5.0), (64, 4.5), (128, 4.25)])
def test_a_gptq_base_takes_its_codes_and_a_scale_a_group(group_size: int, bits: float) -> None:
    need = needs(MISTRAL_7B, "gptq", torch.bfloat16, GPU, group_size)
    assert math.isclose(need.weights, 6_979_321_856 * bits / 8 + 2 * 262_410_240, rel_tol=1e-4)
    assert f"groups of {group_size}" in need.weights_note
    chunk = INT4[group_size].chunk_bytes  # what the GPU's kernel reads
    assert chunk == TILE_OUT * CHUNK_IN * bits / 8


def test_a_gptq_base_on_a_cpu_takes_16_bits_a_weight(tiny_base: Path) -> None:
    spec = read_spec(tiny_base)
    on_cpu = needs(spec, "gptq", torch.bfloat16, CPU)
    assert on_cpu.weights == needs(spec, "none", torch.bfloat16, CPU).weights
    assert "expanded" in on_cpu.weights_note


def test_a_quantization_that_the_folder_is_not_in_is_refused(tiny_base: Path) -> None:
    config = Config(model=ModelConfig(path=tiny_base, quantization="gptq", device="cpu"))
    with pytest.raises(ValueError, match="holds no GPTQ checkpoint"):
        report(config, Console(file=io.StringIO()))


def test_a_tied_head_costs_nothing_unless_it_is_packed() -> None:
    tied = dataclasses.replace(MISTRAL_7B, tie_word_embeddings=True)
    head = 2 * MISTRAL_7B.vocab_size * MISTRAL_7B.hidden_size
    saved = needs(MISTRAL_7B, "none", torch.bfloat16, GPU).weights
    assert saved - needs(tied, "none", torch.bfloat16, GPU).weights == head
    saved = needs(MISTRAL_7B, "none", torch.bfloat16, CPU).weights
    expected = 0 if can_pack(torch.bfloat16, CPU) else head
    assert saved - needs(tied, "none", torch.bfloat16, CPU).weights == expected


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's call
def test_a_rank_row_takes_what_an_adapter_has_per_rank(tiny_base: Path) -> None:
    model = transformers.MistralForCausalLM.from_pretrained(tiny_base)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    num_trainable, _ = peft.get_peft_model(model, config).get_nb_trainable_parameters()
    need = needs(read_spec(tiny_base), "none", torch.bfloat16, GPU)
    assert need.bank_row * 4 == num_trainable * 2


def test_bank_and_kv_are_what_the_engine_allocates(tiny_base: Path) -> None:
    spec = read_spec(tiny_base)
    need = needs(spec, "nf4", torch.bfloat16, CPU)
    bank = AdapterBank(spec, 16, torch.float32, CPU)
    assert need.bank_row * 16 == num_bytes([*bank.lora_a.values(), *bank.lora_b.values()])
    cache = KVCache(spec, 3, 16, torch.bfloat16, CPU)
    assert need.kv_token * 3 * 16 == num_bytes([*cache.k, *cache.v])


NEED = Needs(weights=1000, weights_note="", bank_row=10, kv_token=5)


def config_of(path: Path = Path("x"), **cache: Any) -> Config:
    return Config(
        model=ModelConfig(path=path, quantization="none"),
        adapters=AdapterConfig(bank_rows=64),
        cache=CacheConfig(**cache),
    )


def test_kv_gets_its_share_of_what_is_left_on_a_gpu() -> None:
    spent = budget(NEED, config_of(), free=3640, is_gpu=True)
    assert (spent.weights, spent.bank, spent.kv) == (1000, 640, 1800)
    assert spent.fits


def test_kv_gets_what_the_operator_says() -> None:
    assert budget(NEED, config_of(cpu_bytes=77), free=9999, is_gpu=False).kv == 77
    assert budget(NEED, config_of(num_blocks=2), free=9999, is_gpu=True).kv == 2 * 16 * 5


def test_a_base_that_is_too_large_does_not_fit() -> None:
    assert not budget(NEED, config_of(), free=1600, is_gpu=True).fits
    assert not budget(NEED, config_of(cpu_bytes=100), free=1739, is_gpu=False).fits
    assert budget(NEED, config_of(cpu_bytes=100), free=1740, is_gpu=False).fits


def test_rows_say_how_many_adapters_and_tokens_there_is_room_for() -> None:
    spent = Budget(free=4000, weights=1000, bank=640, kv=1800)
    rows = {name: note for name, _, note in memory_rows(NEED, spent, config_of())}
    assert rows["adapter bank"] == "4 adapters of rank 16, 160 B each"
    assert rows["KV cache"] == "360 tokens, 5 B each"
    assert rows["together"] == "of 3.9 KiB free: fits"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536 << 10, "1.5 MiB"),
        (24 << 30, "24.0 GiB"),
        (3 << 42, "12288.0 GiB"),
    ],
)
def test_sizes_read_well(given: int, said: str) -> None:
    assert size_text(given) == said


def test_cpu_flags_are_those_that_matter(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor : 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n")
    assert cpu_flags(cpuinfo) == {"avx2", "avx512f", "avx512_bf16"}
    assert cpu_flags(tmp_path / "none") == set()


def test_a_gpu_is_described_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (20 << 30, 24 << 30))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 9))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA L4")
    assert gpu_text(0) == "NVIDIA L4, sm_89, 24.0 GiB, 20.0 GiB free"


def test_the_report_fits_80_columns_and_reads_no_weights(tiny_base: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((tiny_base / "config.json").read_text())
    text = io.StringIO()
    config = Config(model=ModelConfig(path=tmp_path, name="smollm2-135m-instruct"))
    assert report(config, Console(file=text, width=80))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in text.getvalue()
    for word in (torch.__version__, "32 adapters of rank 16", "fits", "linear"):
        assert any(word in line for line in lines), word


def test_the_report_says_when_it_does_not_fit(tiny_base: Path) -> None:
    text = io.StringIO()
    config = config_of(tiny_base, cpu_bytes=1 << 50)
    assert not report(config, Console(file=text, width=80))
    assert "does not fit" in text.getvalue()
