"""The base as it is served, and what of it is trained."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bitsandbytes.nn import modules as bnb_modules
from safetensors.torch import load_file, save_file

from server.quant import nf4
from tests.training.conftest import MakeConfig, dataset_of
from training.loss import summed_loss
from training.packing import collate
from training.qlora import (
    add_adapter,
    count_trainable,
    find_linears,
    load_base,
    pick_device,
    pick_dtype,
    resolve_targets,
    skeleton,
    trained,
    trained_ranks,
)

CPU = torch.device("cpu")
ALL = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]


def test_linears_stand_on_the_servers_own_grid(chat_base: Path) -> None:
    original: Any = transformers.AutoModelForCausalLM.from_pretrained(
        chat_base, dtype=torch.bfloat16
    )
    model = load_base(chat_base, "nf4", torch.bfloat16, CPU)
    for name in find_linears(original):
        weight = original.get_submodule(name).weight.data
        served = nf4.quantize(weight).dequantize(torch.bfloat16)
        assert torch.equal(model.get_submodule(name).weight, served)
        assert not torch.equal(weight, served)
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert not any(weight.requires_grad for weight in model.parameters())


def test_without_quantization_the_checkpoint_is_trained_on(chat_base: Path) -> None:
    original = transformers.AutoModelForCausalLM.from_pretrained(chat_base, dtype=torch.float32)
    model = load_base(chat_base, "none", torch.float32, CPU)
    for name, weight in original.state_dict().items():
        assert torch.equal(model.state_dict()[name], weight)


def test_packed_weights_have_the_same_values(chat_base: Path) -> None:
    plain = load_base(chat_base, "nf4", torch.float32, CPU)
    packed = load_base(chat_base, "nf4", torch.float32, CPU, is_packed=True)
    assert isinstance(packed.model.layers[0].mlp.up_proj, bnb_modules.Linear4bit)
    assert not isinstance(packed.lm_head, bnb_modules.Linear4bit)
    ids = torch.arange(3, 20).view(1, -1)
    with torch.no_grad():
        torch.testing.assert_close(packed(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_evaluation_changes_no_gradient_of_packed_weights(
    chat_base: Path, make: MakeConfig, tokenizer: Any, dtype: torch.dtype
) -> None:
    config = make()
    dataset = dataset_of(config, tokenizer)
    model = add_adapter(load_base(chat_base, "nf4", dtype, CPU, is_packed=True), config)
    for weight in trained(model).values():
        weight.data.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    batch = collate(dataset.training, [(0,), (1,)], 2, is_packed=False)

    def gradients() -> torch.Tensor:
        model.zero_grad()
        model.train()
        summed_loss(model.base_model.model, batch).backward()
        return torch.cat([weight.grad.flatten() for weight in trained(model).values()])  # type: ignore[union-attr]

    before = gradients()
    model.eval()
    with torch.no_grad():
        summed_loss(model.base_model.model, batch)
    assert torch.equal(gradients(), before)
    assert before.abs().max() > 0


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        ("all-linear", ALL),
        ("attention", ["k_proj", "o_proj", "q_proj", "v_proj"]),
        ("mlp", ["down_proj", "gate_proj", "up_proj"]),
        (["v_proj", "mlp.up_proj"], ["v_proj", "mlp.up_proj"]),
    ],
)
def test_targets_are_discovered_and_never_the_head(
    make: MakeConfig, chat_base: Path, targets: Any, expected: list[str]
) -> None:
    linears = find_linears(skeleton(chat_base))
    assert len(linears) == 2 * len(ALL)
    assert resolve_targets(make(targets=targets), linears) == expected


def test_unknown_targets_and_idle_patterns_are_refused(make: MakeConfig, chat_base: Path) -> None:
    linears = find_linears(skeleton(chat_base))
    with pytest.raises(ValueError, match=r"'q_prj', which is no linear.*did you mean 'q_proj'"):
        resolve_targets(make(targets=["q_prj"]), linears)
    with pytest.raises(ValueError, match=r"'lm_head', which is no linear.*the base has down_proj"):
        resolve_targets(make(targets=["lm_head"]), linears)
    for field in ("rank_pattern", "alpha_pattern"):
        with pytest.raises(ValueError, match=f"{field} names 'up_proj'"):
            trained_ranks(make(targets="attention", **{field: {"up_proj": 2}}), linears)
    with pytest.raises(ValueError, match="rank 999, not 1 to 256"):
        trained_ranks(make(rank_pattern={"up_proj": 999}), linears)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"rank": 3, "targets": "attention"},
        {"use_dora": True, "targets": ["o_proj", "down_proj"]},
        {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 7}},
    ],
)
def test_the_count_before_the_run_is_what_is_trained(
    make: MakeConfig, chat_base: Path, settings: dict[str, Any]
) -> None:
    config = make(**settings)
    model = add_adapter(load_base(chat_base, "nf4", torch.bfloat16, CPU), config)
    numbers = sum(weight.numel() for weight in trained(model).values())
    assert numbers == count_trainable(config, find_linears(skeleton(chat_base)))
    assert {weight.dtype for weight in trained(model).values()} == {torch.float32}


def test_kinds_patterns_and_scaling_reach_peft(make: MakeConfig, chat_base: Path) -> None:
    config = make(
        rank=8,
        alpha=4,
        dropout=0.25,
        use_rslora=True,
        rank_pattern={"q_proj": 2},
        alpha_pattern={"v_proj": 16},
    )
    model = add_adapter(load_base(chat_base, "nf4", torch.float32, CPU), config)
    causal: Any = model.base_model.model
    attention = causal.model.layers[1].self_attn
    assert attention.k_proj.scaling["default"] == 4 / 8**0.5
    assert attention.q_proj.scaling["default"] == 4 / 2**0.5
    assert attention.v_proj.scaling["default"] == 16 / 8**0.5
    assert attention.q_proj.lora_A["default"].weight.shape == (2, 64)
    assert attention.k_proj.lora_dropout["default"].p == 0.25
    lora: Any = model.peft_config["default"]
    assert type(lora.lora_alpha) is int


def test_the_seed_sets_the_start(make: MakeConfig, chat_base: Path) -> None:
    def start(seed: int) -> torch.Tensor:
        model = add_adapter(load_base(chat_base, "nf4", torch.float32, CPU), make(seed=seed))
        return next(iter(trained(model).values())).detach()

    assert torch.equal(start(1), start(1))
    assert not torch.equal(start(1), start(2))


def test_a_base_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must be a folder that holds config\.json"):
        skeleton(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="model_type is 'gpt2'; mistral and llama"):
        skeleton(tmp_path)


def test_the_hardware_chooses_the_dtype_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for has, expected in ((True, torch.bfloat16), (False, torch.float32)):
        on_gpu = torch.bfloat16 if has else torch.float16
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        assert pick_dtype("auto", CPU) == expected
        assert pick_dtype("fp32", CPU) == torch.float32
        assert pick_dtype("bf16", CPU) == torch.bfloat16
        assert pick_dtype("fp16", CPU) == torch.float16
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, has=has: has
        )
        assert pick_dtype("auto", torch.device("cuda")) == on_gpu
    assert pick_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_a_base_without_one_of_its_weights_is_refused(chat_base: Path, tmp_path: Path) -> None:
    folder, name = tmp_path / "base", "model.layers.1.mlp.up_proj.weight"
    shutil.copytree(chat_base, folder)
    tensors = load_file(folder / "model.safetensors")
    del tensors[name]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=rf"lacks {name}$"):
        load_base(folder, "nf4", torch.float32, CPU)


@pytest.mark.parametrize("method", ["gptq", "bitsandbytes"])
def test_a_base_that_is_quantized_already_is_refused(
    chat_base: Path, tmp_path: Path, method: str
) -> None:
    config = json.loads((chat_base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="quantized already; name the 16-bit checkpoint"):
        skeleton(tmp_path)


def test_a_pattern_that_is_no_pattern_is_refused(chat_base: Path, make: MakeConfig) -> None:
    linears = find_linears(skeleton(chat_base))
    with pytest.raises(ValueError, match="rank_pattern has a key that is no regular expression"):
        trained_ranks(make(rank_pattern={"q_proj(": 8}), linears)
