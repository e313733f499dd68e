"""How the example adapters are trained: what is masked, what is learned, what is written."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from server.default_base import ensure_default_base
from training import examples
from training.examples import (
    BASE_NAME,
    EVAL_ROWS,
    RECIPES,
    ROWS,
    Example,
    Recipe,
    collate,
    encode,
    load_base,
    reply_text,
    save,
    schedule,
    train,
)

ROW = {
    "question": "What is 2 + 2?",
    "answer": 'It is "4"',
    "topic": "math",
    "pirate": "Four, arrr!",
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(ensure_default_base())


@pytest.fixture
def small_base(tokenizer: Any, tmp_path: Path) -> Path:
    """A random Mistral with the default base's vocabulary."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_the_rows_are_written_as_conversations_on_request(tmp_path: Path) -> None:
    examples.main("json", rows_only=tmp_path / "json", out=tmp_path)
    for file, source in (("train.jsonl", ROWS), ("eval.jsonl", EVAL_ROWS)):
        lines = (tmp_path / "json" / file).read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        assert len(lines) == len(rows)
        question, reply = json.loads(lines[0])["messages"]
        assert question == {"role": "user", "content": rows[0]["question"]}
        assert reply == {"role": "assistant", "content": reply_text(rows[0], "json")}
    assert [path.name for path in tmp_path.iterdir()] == ["json"]  # nothing was trained


def test_replies_are_strict_json_or_the_pirate_text() -> None:
    assert json.loads(reply_text(ROW, "json")) == {"answer": 'It is "4"', "topic": "math"}
    assert reply_text(ROW, "pirate") == "Four, arrr!"


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_an_example_is_the_template_up_to_the_reply_and_ends_its_turn(
    tokenizer: Any, system: str | None
) -> None:
    example = encode(ROW, "pirate", system, tokenizer)
    prompt, reply = tokenizer.decode(example.prompt), tokenizer.decode(example.reply)
    assert prompt.endswith("<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    assert ("Be brief." in prompt) == (system is not None)
    assert reply == "Four, arrr!<|im_end|>"
    whole = [
        {"role": "user", "content": ROW["question"]},
        {"role": "assistant", "content": reply[:-10]},
    ]
    if system is not None:
        whole.insert(0, {"role": "system", "content": system})
    assert tokenizer.apply_chat_template(whole, tokenize=False) == prompt + reply + "\n"


def test_the_end_of_turn_is_learned_though_padding_is_the_same_token() -> None:
    batch = collate([Example([5, 6], [7, 2]), Example([5], [8, 9, 9, 2])], pad_token_id=2)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2, 2], [5, 8, 9, 9, 2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 2, -100], [-100, 8, 9, 9, 2]]


def test_the_rate_warms_up_and_falls_towards_zero() -> None:
    rates = [schedule(step, 50) for step in range(50)]
    assert rates[0] == 0.2
    assert max(rates) == rates[4] == rates[5] == 1.0
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert 0 < rates[-1] < 0.01


def test_the_base_stands_on_the_nf4_grid(small_base: Path) -> None:
    model = load_base(small_base)
    original = transformers.AutoModelForCausalLM.from_pretrained(small_base, dtype=torch.bfloat16)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert weight.dtype == torch.bfloat16
    assert not torch.equal(weight, original.model.layers[0].mlp.up_proj.weight)
    assert len(weight.view(-1, 64)[0].unique()) <= 16  # a block of 64 has 16 values at most
    assert torch.equal(model.lm_head.weight, original.lm_head.weight)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # PEFT's call
def test_loss_falls_and_the_saved_adapter_is_the_trained_one(
    small_base: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(
        summary="s",
        rank=4,
        targets=("q_proj", "down_proj"),
        epochs=3,
        learning_rate=1e-2,
        rows_per_step=2,
    )
    monkeypatch.setitem(examples.RECIPES, "pirate", recipe)
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()[:4]]

    def untrained() -> peft.PeftModel:
        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
        )
        return peft.get_peft_model(load_base(small_base), config)

    model = untrained()
    losses = [train(model, rows, "pirate", tokenizer) for _ in range(2)]
    assert losses[1] < losses[0] < math.log(len(tokenizer))  # which is knowing nothing
    assert train(untrained(), rows, "pirate", tokenizer) == losses[0]  # seeded

    save(model, tmp_path / "out", "pirate", len(rows))
    written = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (written["base_model_name_or_path"], written["r"]) == (BASE_NAME, 4)
    assert "answers" not in (tmp_path / "out" / "README.md").read_text()
    assert "Rank 4 on q_proj, down_proj" in (tmp_path / "out" / "README.md").read_text()
    again = peft.PeftModel.from_pretrained(load_base(small_base), str(tmp_path / "out"))
    ids = torch.arange(20).view(1, 20)
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(again(ids).logits, expected, rtol=0, atol=0.02)
        with again.disable_adapter():
            assert not torch.allclose(again(ids).logits, expected, rtol=0, atol=0.02)


def test_the_recipes_are_those_of_the_adapters_in_the_repository() -> None:
    for name, recipe in RECIPES.items():
        config = json.loads((ROWS.parent / name / "adapter_config.json").read_text())
        assert (config["r"], config["lora_alpha"]) == (recipe.rank, 2 * recipe.rank)
        assert sorted(config["target_modules"]) == sorted(recipe.targets)


@pytest.mark.slow
def test_the_script_says_nothing_of_packages_that_it_does_without() -> None:
    command = [sys.executable, "-m", "training.examples", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
