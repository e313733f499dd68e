"""Settings: a closed schema, old names with a hint, complaints that help."""

import re
from pathlib import Path
from typing import Any

import pytest

from training.config import TrainConfig, make_config, parse_options
from training.config import read_settings as read
from training.old_names import RENAMED, TRANSLATED

NEEDED: dict[str, Any] = {"base": "b", "data": "d.jsonl", "out": "o"}
DOCS = Path(__file__).parent.parent.parent / "docs" / "training.md"


def made(**settings: Any) -> TrainConfig:
    return make_config({**NEEDED, **settings})[0]


def test_defaults_stand_and_alpha_follows_the_rank() -> None:
    config = made()
    assert (config.rank, config.lora_alpha, config.targets) == (16, 32.0, "all-linear")
    assert made(rank=4).lora_alpha == 8.0
    assert made(rank=4, alpha=3).lora_alpha == 3.0


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("learing_rate", "learning_rate"),
        ("epoch", "epochs"),
        ("max_seq_lenght", "max_length"),  # nearest an old name: ours is told
        ("use_rslor", "use_rslora"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=rf"'{name}' is not a setting.*did you mean '{meant}'\?"):
        made(**{name: 1})


def test_a_name_like_no_other_is_refused_without_a_guess() -> None:
    with pytest.raises(ValueError, match=r"'zzzz' is not a setting of a training run$"):
        made(zzzz=1)


def test_what_is_missing_or_wrong_is_said_with_its_name_and_value() -> None:
    with pytest.raises(ValueError, match=r"^out is missing: --out"):
        make_config({"base": "b", "data": "d"})
    with pytest.raises(ValueError, match=r"^rank is 0: input should be greater"):
        made(rank=0)
    with pytest.raises(ValueError, match=r"^schedule is 'cosin': input should be 'cosine'"):
        made(schedule="cosin")


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"packing": True, "group_lengths": True}, "packing and group_lengths exclude"),
        ({"patience": 2, "eval_fraction": 0}, "patience needs eval_data"),
        ({"targets": []}, "targets is empty"),
        ({"alpha_pattern": {"q_proj": 0}}, "alpha_pattern is 0: input should be greater"),
        ({"alpha": float("inf")}, "alpha is inf: input should be a finite"),
        ({"warmup": float("inf")}, "warmup is inf: input should be a finite"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=f"^{complaint}"):
        made(**settings)


def test_a_config_is_never_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        made().rank = 3


@pytest.mark.parametrize(("old", "ours"), sorted(RENAMED.items()))
def test_every_old_name_is_taken_with_a_hint(old: str, ours: str) -> None:
    assert ours in TrainConfig.model_fields
    assert old not in TrainConfig.model_fields
    needed = {name: value for name, value in NEEDED.items() if name != ours}
    shares = ("dropout", "eval_fraction", "learning_rate", "warmup", "weight_decay")
    flags = ("gradient_checkpointing", "group_lengths", "packing")
    values: dict[str, Any] = {"schedule": "linear", "targets": "attention"}
    values |= dict.fromkeys(shares, "0.25") | dict.fromkeys(flags, True)
    value = values.get(ours, "8")
    config, hints = make_config({**needed, old: value})
    assert hints == [f"{old} is called {ours} here"]
    assert config == make_config({**needed, ours: value})[0]


@pytest.mark.parametrize(
    ("old", "value", "ours"),
    [
        ("evaluation_strategy", "epoch", {"eval_every": 0}),
        ("eval_strategy", "no", {"eval_fraction": 0.0}),
        ("eval_strategy", False, {"eval_fraction": 0.0}),  # YAML's reading of `no`
        ("save_strategy", "epoch", {"save_every": 0}),
        ("gradient_accumulation_steps", 8, {"batch_size": 32}),
        ("optim", "adamw_torch", {"optimizer": "adamw"}),
        ("optim", "paged_adamw_8bit", {"optimizer": "paged_adamw_8bit"}),
        ("optim", "paged_adamw_32bit", {"optimizer": "paged_adamw"}),
        ("load_in_4bit", False, {"quantization": "none"}),
        ("load_in_4bit", True, {"quantization": "nf4"}),
        ("bf16", True, {"dtype": "bf16"}),
        ("bf16", False, {"dtype": "auto"}),
        ("completion_only_loss", True, {"loss": "completion"}),
        ("completion_only_loss", False, {"loss": "all"}),
        ("completion_only_loss", None, {"loss": "assistant"}),
        ("bf16", "auto", {"dtype": "auto"}),
        ("assistant_only_loss", True, {"loss": "assistant"}),
        ("train_on_inputs", True, {"loss": "all"}),
        ("dataset_text_field", "text", {"format": "text"}),
        ("logging_steps", 10, {"rank": 16}),
        ("lr_scheduler_type", "linear", {"schedule": "linear"}),
        ("lr_scheduler_type", "constant_with_warmup", {"schedule": "constant"}),
        ("lr_scheduler", "cosine", {"schedule": "cosine"}),
        ("fp16", True, {"dtype": "fp16"}),
        ("bnb_4bit_compute_dtype", "torch.bfloat16", {"dtype": "bf16"}),
        ("bnb_4bit_compute_dtype", "float16", {"dtype": "fp16"}),
        ("bnb_4bit_quant_type", "nf4", {"quantization": "nf4"}),
        ("bnb_4bit_use_double_quant", True, {"quantization": "nf4"}),
        ("load_in_8bit", False, {"quantization": "nf4"}),
        ("load_best_model_at_end", True, {}),
        ("bias", "none", {}),
        ("lora_bias", False, {}),
        ("task_type", "CAUSAL_LM", {}),
    ],
)
def test_old_names_of_another_meaning_are_translated(
    old: str, value: Any, ours: dict[str, Any]
) -> None:
    config, (hint,) = make_config({**NEEDED, old: value})
    assert {name: getattr(config, name) for name in ours} == ours
    assert hint.startswith(f"{old} is taken as ")
    assert old in TRANSLATED


def test_accumulation_multiplies_the_micro_batch_wherever_it_stands() -> None:
    settings = {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2}
    assert made(**settings).batch_size == 8


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"evaluation_strategy": "sometimes"}, "evaluation_strategy: 'sometimes' is neither"),
        ({"dataset_text_field": "body"}, "dataset_text_field: it is 'body'; rename"),
        ({"load_in_4bit": True, "quantization": "none"}, "load_in_4bit contradicts quantization"),
        ({"rank": 4, "lora_r": 8}, "rank is given twice, once as lora_r"),
        ({"optim": "sgd"}, "optimizer is 'sgd'"),
        ({"optim": ["adamw"]}, "optimizer is ['adamw']"),
        ({"load_in_4bit": "true"}, "load_in_4bit: 'true' is neither true nor false"),
        ({"save_strategy": False}, "save_strategy: 'no' is neither"),
        ({"gradient_accumulation_steps": None}, "gradient_accumulation_steps: it is None, which"),
        ({"gradient_accumulation_steps": 2.5}, "gradient_accumulation_steps: it is 2.5, which"),
        ({"gradient_accumulation_steps": True}, "gradient_accumulation_steps: it is True, which"),
        ({"lr_scheduler_type": "polynomial"}, "schedule is 'polynomial'"),
        ({"load_in_8bit": True}, "load_in_8bit: it is True; here it is False in every run"),
        ({"bias": "all"}, "bias: it is 'all'; here it is 'none'"),
        ({"task_type": "SEQ_CLS"}, "task_type: it is 'SEQ_CLS'"),
        ({"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type: it is 'fp4'; here it is 'nf4'"),
        ({"bnb_4bit_compute_dtype": "int8"}, "dtype is 'int8'"),
    ],
)
def test_an_old_name_that_cannot_be_honoured_is_refused(
    settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(complaint)}"):
        made(**settings)


def test_targets_are_a_preset_a_list_or_names_with_commas() -> None:
    assert made(targets="attention").targets == "attention"
    assert made(targets=["q_proj", "v_proj"]).targets == ("q_proj", "v_proj")
    assert made(targets="q_proj, v_proj").targets == ("q_proj", "v_proj")


def test_options_of_the_command_line_are_settings() -> None:
    words = "--rank 8 --use-dora --loss=all --learning_rate 1e-4 --no-packing --dropout -0.5"
    assert parse_options(words.split()) == {
        "rank": 8,
        "use_dora": True,
        "loss": "all",
        "learning_rate": "1e-4",  # YAML 1.1 takes it for a text; the schema does not
        "packing": False,
        "dropout": -0.5,
    }
    assert made(learning_rate="1e-4").learning_rate == 1e-4


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["rank", "8"], "'rank' belongs to no option"),
        (["--rank", "8", "9"], "'9' belongs to no option"),
        (["--rank", "8", "--rank=9"], "--rank is given twice"),
    ],
)
def test_words_that_are_no_option_are_refused(words: list[str], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_options(words)


def test_a_prompt_on_the_command_line_is_taken_as_it_is() -> None:
    for text in ("Ticket # 5: be brief", "first\nsecond", "[x", "no", '"quoted', " a "):
        assert parse_options(["--system", text]) == {"system": text}
    assert parse_options(["--output-dir", "2026-11-22"]) == {"output_dir": "2026-11-22"}
    assert parse_options(["--system", "null"]) == {"system": None}


def test_an_option_that_is_not_yaml_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"^--target-modules is '@x', which is not YAML"):
        parse_options(["--target-modules", "@x"])


@pytest.mark.parametrize("name", ["rank", "learning_rate", "epochs", "alpha", "system", "out"])
def test_a_value_that_was_forgotten_is_never_taken_for_one(name: str) -> None:
    with pytest.raises(ValueError, match=rf"^{name} is True; it needs a value"):
        made(**{name: True})
    assert made(use_dora=True, gradient_checkpointing=False).use_dora


def test_a_setting_that_stands_twice_in_a_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("rank: 8\nepochs: 2\nrank: 16\n")
    with pytest.raises(ValueError, match="rank is given twice"):
        read(path)


def test_a_file_of_another_encoding_is_named(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(b"system: caf\xe9\n")
    with pytest.raises(ValueError, match=r"run\.yaml is not YAML: 'utf-8' codec"):
        read(path)


def test_paths_in_a_file_are_relative_to_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("data: rows.jsonl\noutput_dir: out\nrank: 4\nsystem: base\n")
    assert read(path) == {
        "data": str(tmp_path / "rows.jsonl"),
        "output_dir": str(tmp_path / "out"),
        "rank": 4,
        "system": "base",
    }


@pytest.mark.parametrize("text", ["- a\n- b\n", "", "1: 2\n", "rank: [1\n"])
def test_a_file_without_settings_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"run\.yaml (must hold settings|is not YAML)"):
        read(path)


def test_every_setting_and_every_old_name_is_documented() -> None:
    text = DOCS.read_text(encoding="utf-8")
    names = {*TrainConfig.model_fields, *RENAMED, *TRANSLATED}
    assert {name for name in names if f"`{name}`" not in text} == set()
