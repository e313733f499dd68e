"""Configs: what PEFT would do with each is what the manifest says, or the field is refused."""

import dataclasses
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from adapters.manifest import LINEARS, AdapterError, AdapterRefused, BaseShape, Limits
from adapters.peft_config import PeftConfig, read_peft_config
from adapters.store import Store

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "default targets": {"target_modules": None},
    "one linear": {"target_modules": ["down_proj"]},
    "full names": {"target_modules": ["model.layers.1.mlp.up_proj", "k_proj"]},
    "dotted suffix": {"target_modules": ["self_attn.o_proj", "0.mlp.gate_proj"]},
    "all-linear": {"target_modules": "all-linear"},
    "regex": {"target_modules": r".*\.0\..*(q|up)_proj|.*layers\.1\.mlp\.\w+_proj"},
    "regex of unsloth": {
        "target_modules": r"(?:.*?(?:language|text).*?(?:attn|mlp).*?(?:k_proj|v_proj).*?)|"
        r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|mlp)\.(?:(?:q_proj|gate_proj)))"
    },
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "o_proj"]},
    "excluded by regex": {"target_modules": ATTENTION, "exclude_modules": r".*\.1\..*"},
    "rank_pattern": {
        "target_modules": "all-linear",
        # in sorted order: PEFT sorts the keys as it saves, and the first match wins
        "rank_pattern": {r".*\.1\..*": 2, "0.mlp.up_proj": 1, "down_proj": 16, "q_proj": 4},
    },
    "alpha_pattern": {
        "target_modules": ATTENTION,
        "alpha_pattern": {"model.layers.0.self_attn.q_proj": 7, r"[kv]_proj": 5, "q_proj": 3},
    },
    "both patterns, rslora": {
        "use_rslora": True,
        "target_modules": ATTENTION,
        "rank_pattern": {r"layers\.1\..*": 3},
        "alpha_pattern": {"^model.layers.0.self_attn.v_proj": 11},
    },
    "rslora": {"use_rslora": True, "r": 7, "lora_alpha": 10},
    "dora": {"use_dora": True, "target_modules": "all-linear"},
    "dora, rslora": {"use_dora": True, "use_rslora": True, "rank_pattern": {"q_proj": 3}},
    "layers": {"layers_to_transform": [1], "target_modules": ATTENTION},
    "one layer as a number": {"layers_to_transform": 0},
    "no layers named": {"layers_to_transform": []},
    "layers_pattern": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "layers_pattern list": {"layers_to_transform": [0], "layers_pattern": ["h", "layers"]},
    "layers and a full name": {
        "layers_to_transform": [1],
        "target_modules": ["model.layers.0.self_attn.q_proj", "v_proj"],
    },
    "alpha zero": {"lora_alpha": 0},
    "alpha negative": {"lora_alpha": -3},
    "gaussian": {"init_lora_weights": "gaussian", "lora_dropout": 0.3},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "mica": {"init_lora_weights": "mica"},
}


def load_with_peft(base: Path, folder: Path) -> peft.PeftModel:
    with warnings.catch_warnings(action="ignore"):  # PEFT asks transformers in an old way
        model = transformers.MistralForCausalLM.from_pretrained(base)
        return peft.PeftModel.from_pretrained(model, str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_rank_and_scaling_of_every_module_are_pefts_own(
    kind: str, tiny_base: Path, make_adapter: Any, base_shape: BaseShape, tmp_path: Path
) -> None:
    folder = make_adapter(**KINDS[kind])
    model = load_with_peft(tiny_base, folder)
    expected = {
        name.removeprefix("base_model.model.model.layers."): (
            module.r["default"],
            module.scaling["default"],
            "default" in module.lora_magnitude_vector,
        )
        for name, module in model.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }
    store = Store.open(tmp_path / "store")

    staged = store.stage(folder, base_shape, Limits())

    store.close()
    found = {
        f"{entry.layer}.{entry.linear}": (entry.rank, entry.scaling, entry.use_dora)
        for entry in staged.manifest.modules
    }
    assert found == expected
    lora = [tensor for name, tensor in model.named_parameters() if "lora_" in name]
    assert staged.manifest.num_parameters == sum(tensor.numel() for tensor in lora)
    assert staged.manifest.num_bytes == 4 * staged.manifest.num_parameters


def test_all_linear_before_peft_expanded_it_means_the_seven_linears(base_shape: BaseShape) -> None:
    for spelling in ("all-linear", "ALL-Linear"):
        modules = read(base_shape, target_modules=spelling).modules
        names = [(entry.layer, entry.linear) for entry in modules]
        assert names == [(layer, linear) for layer in range(2) for linear in LINEARS]


def test_every_field_of_pefts_config_is_known(base_shape: BaseShape) -> None:
    fields = {field.name for field in dataclasses.fields(peft.LoraConfig)}
    config = dataclasses.asdict(peft.LoraConfig(r=2)) | {"target_modules": ["q_proj"]}

    for field in fields:
        read(base_shape, None, **{field: config[field]})


def read(base: BaseShape, limits: Limits | None = None, /, **config: Any) -> PeftConfig:
    fields = {"peft_type": "LORA", "r": 2, "target_modules": ["q_proj"], **config}
    return read_peft_config(json.dumps(fields).encode(), base, limits or Limits())


def refusal(base: BaseShape, limits: Limits | None = None, /, **config: Any) -> AdapterRefused:
    with pytest.raises(AdapterRefused) as caught:
        read(base, limits, **config)
    return caught.value


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("bias", "all"),
        ("bias", "lora_only"),
        ("modules_to_save", ["lm_head"]),
        ("lora_bias", True),
        ("trainable_token_indices", [1]),
        ("trainable_token_indices", {"embed_tokens": [1]}),
        ("target_parameters", ["weight"]),
        ("alora_invocation_tokens", [1, 2]),
        ("fan_in_fan_out", True),
        ("megatron_config", {"tensor_parallel": 2}),
        ("layer_replication", [[0, 2]]),
        ("use_qalora", True),
        ("use_bdlora", {"nblocks": 2}),
        ("arrow_config", {"top_k": 2}),
        ("kasa_config", {"beta": 1}),
        ("monteclora_config", {"num_samples": 8}),
        ("velora_config", {"num_groups": 1}),
        ("peft_type", "IA3"),
        ("peft_type", "ADALORA"),
        ("peft_type", None),
        ("task_type", "SEQ_CLS"),
        ("init_lora_weights", "pissa"),
        ("init_lora_weights", "pissa_niter_16"),
        ("init_lora_weights", "olora"),
        ("init_lora_weights", "corda"),
        ("init_lora_weights", "loftq"),
        ("init_lora_weights", "lora_ga"),
        ("init_lora_weights", ["gaussian"]),
        ("enable_lora", [True]),
        ("r", 0),
        ("r", -1),
        ("r", True),
        ("r", 2.0),
        ("r", "8"),
        ("r", 10**400),
        ("lora_alpha", "16"),
        ("lora_alpha", True),
        ("lora_alpha", None),
        ("lora_alpha", 10**400),
        ("lora_alpha", 1e7),
        ("use_dora", 1),
        ("use_rslora", "yes"),
        ("rank_pattern", [4]),
        ("alpha_pattern", "q_proj"),
        ("target_modules", 1),
        ("target_modules", [1]),
        ("target_modules", []),
        ("target_modules", ""),
        ("target_modules", ["c_attn"]),
        ("target_modules", ["lm_head"]),
        ("target_modules", ["embed_tokens", "q_proj"]),
        ("target_modules", ["self_attn"]),
        ("target_modules", ["input_layernorm"]),
        ("target_modules", ".*"),
        ("target_modules", "("),
        ("target_modules", "a{99999999999999999999}"),
        ("target_modules", "x" * 5000),
        ("exclude_modules", {"a": 1}),
        ("layers_to_transform", "1"),
        ("layers_to_transform", [True]),
        ("layers_to_transform", [0.5]),
        ("layers_pattern", "layers"),
        ("base_model_name_or_path", 5),
        ("base_model_name_or_path", "mistralai/Mistral-7B-v0.1"),
        ("revision", "v2"),
    ],
)
def test_what_is_not_served_is_refused_by_the_name_of_its_field(
    base_shape: BaseShape, field: str, value: object
) -> None:
    error = refusal(base_shape, None, **{field: value})

    assert error.field == field
    assert str(error).startswith(f"{field}: ")


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
@pytest.mark.parametrize("pattern", ["(", "*", r"(?P<idx>", "a" * 5000])
def test_a_pattern_that_is_no_regex_is_refused(
    base_shape: BaseShape, field: str, pattern: str
) -> None:
    assert refusal(base_shape, None, **{field: {pattern: 1}}).field == field


@pytest.mark.parametrize(
    "config",
    [
        {"target_modules": "(.*)*(.*)*(.*)*(.*)*(.*)*x!"},
        {"exclude_modules": "(([a-z._]|[a-z._0-9])*)*!"},
        {"rank_pattern": {"(([a-z._]|[a-z._0-9])*)*!": 4}},
        {
            "layers_to_transform": [0],
            "layers_pattern": "(([a-z._]|[a-z._0-9])*)*!",
        },
    ],
    ids=str,
)
def test_a_regex_that_never_ends_is_stopped(
    base_shape: BaseShape, config: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    error = refusal(base_shape, **config)

    assert "takes over 1 s to match" in str(error)
    assert error.field in config


def test_layers_with_a_regex_are_refused_as_peft_refuses_them(base_shape: BaseShape) -> None:
    error = refusal(base_shape, target_modules=".*q_proj", layers_to_transform=[0])

    assert error.field == "layers_to_transform"


def test_rank_over_the_limit_is_refused_with_module_and_numbers(base_shape: BaseShape) -> None:
    error = refusal(base_shape, Limits(max_rank=8), rank_pattern={r".*1\.self_attn\.q_proj": 9})

    assert "rank 9 of model.layers.1.self_attn.q_proj is over the limit of 8" in str(error)
    assert read(base_shape, Limits(max_rank=8), r=8).modules[0].rank == 8


def test_another_base_is_served_where_the_operator_allows_it(base_shape: BaseShape) -> None:
    limits = Limits(allow_other_base=True)

    config = read(base_shape, limits, base_model_name_or_path="other/base", revision="v2")

    assert config.declared_base == "other/base"


def test_a_base_goes_by_name_path_folder_and_hub_id(tiny_base: Path, base_shape: BaseShape) -> None:
    spellings = ("base", str(tiny_base), f"{tiny_base}/", f"someone/{tiny_base.name}", None, "")
    for spelling in spellings:
        read(base_shape, base_model_name_or_path=spelling, revision="main")

    for spelling in ("tiny", f"/elsewhere/{tiny_base.name}", f"a/b/{tiny_base.name}", "base2"):
        assert not base_shape.is_called(spelling)


@pytest.mark.parametrize("text", [b"", b"[]", b"null", b"{", b'{"r": 1, "r": 2}', b"\xff{}"])
def test_a_config_that_is_no_json_object_is_refused(base_shape: BaseShape, text: bytes) -> None:
    with pytest.raises(AdapterRefused, match=r"adapter_config\.json"):
        read_peft_config(text, base_shape, Limits())


FIELDS = sorted(field.name for field in dataclasses.fields(peft.LoraConfig))
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.from_regex(r"[a-z_.*0-9]{0,8}"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


@settings(max_examples=150, deadline=None)
@given(config=st.dictionaries(st.sampled_from(FIELDS) | st.text(max_size=4), VALUES, max_size=4))
def test_any_config_is_read_or_refused(one_linear: BaseShape, config: dict[str, Any]) -> None:
    try:
        found = read(one_linear, None, **config)
    except AdapterError:
        return
    assert found.modules
    assert all(entry.rank >= 1 and abs(entry.scaling) <= 1e6 for entry in found.modules)


def test_scaling_follows_peft_in_every_bit(base_shape: BaseShape) -> None:
    for rank in (1, 3, 7, 12, 100):
        plain = read(base_shape, r=rank, lora_alpha=10).modules[0].scaling
        stable = read(base_shape, r=rank, lora_alpha=10, use_rslora=True).modules[0].scaling
        layer = peft.tuners.lora.layer.Linear(
            torch.nn.Linear(4, 4),
            "default",
            peft.LoraConfig(use_rslora=True),
            r=rank,
            lora_alpha=10,
        )
        assert plain == 10 / rank
        assert stable == layer.scaling["default"]
