"""The example adapters: small, fit for the default base, and each with a voice of its own."""

import json
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from adapters.manifest import BaseShape
from adapters.registry import Registry
from server.adapter_admin import EXAMPLES, register_examples
from server.base_digest import base_digest
from server.default_base import DEFAULT_BASE_NAME, ensure_default_base

NAMES = ("json", "pirate")
MAX_BYTES = 3_000_000
# None of these is a training row: see the test below.
QUESTIONS = (
    "What is the capital of France?",
    "Where do polar bears live?",
    "How do I make a cup of coffee?",
    "Why is the sky blue?",
)


def rows(file: str = "rows.jsonl") -> list[dict[str, str]]:
    lines = (EXAMPLES / file).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def default_base() -> Path:
    return ensure_default_base()


def test_rows_are_complete_and_each_question_is_asked_once() -> None:
    assert len(rows()) >= 60
    every = [*rows(), *rows("eval_rows.jsonl")]  # so none of those was trained on
    for row in every:
        assert set(row) == {"question", "answer", "topic", "pirate"}
        assert all(text == text.strip() != "" for text in row.values())
        assert "\n" not in row["answer"]
    assert len({row["question"] for row in every}) == len(every)
    assert not {row["question"] for row in every} & set(QUESTIONS)
    assert {row["topic"] for row in rows("eval_rows.jsonl")} <= {row["topic"] for row in rows()}


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_small_and_says_what_it_is_for(name: str) -> None:
    folder = EXAMPLES / name
    assert sum(file.stat().st_size for file in folder.iterdir()) < MAX_BYTES
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == DEFAULT_BASE_NAME
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"base_model: {DEFAULT_BASE_NAME}" in card
    assert f"Rank {config['r']}" in card
    assert all(target in card for target in config["target_modules"])


def test_both_are_registered_once_and_never_over_an_adapter_of_that_name(
    default_base: Path, tmp_path: Path
) -> None:
    shape = BaseShape.from_config(default_base, DEFAULT_BASE_NAME, base_digest(default_base))
    registry = Registry.open(tmp_path, shape)
    registry.push("json", EXAMPLES / "pirate")  # the operator's own
    mine = registry.resolve("json").digest
    register_examples(registry)
    register_examples(registry)
    assert [adapter.name for adapter in registry.list()] == list(NAMES)
    assert [adapter.num_revisions for adapter in registry.list()] == [1, 1]
    assert registry.resolve("json").digest == mine
    registry.close()


@pytest.fixture(scope="module", params=["bf16", "nf4"])
def model(request: pytest.FixtureRequest, default_base: Path) -> Iterator[Any]:
    """The default base with both adapters, switched by PEFT's own set_adapter."""
    config = None
    if request.param == "nf4":
        make_config: Any = transformers.BitsAndBytesConfig  # not annotated
        config = make_config(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # two that wait for each other on a busy machine take 20 times as long
    with warnings.catch_warnings(action="ignore"):
        base = transformers.AutoModelForCausalLM.from_pretrained(
            default_base, dtype=torch.bfloat16, quantization_config=config
        )
        loaded = peft.PeftModel.from_pretrained(base, str(EXAMPLES / "json"), "json")
        loaded.load_adapter(str(EXAMPLES / "pirate"), "pirate")
        yield loaded.eval()
    torch.set_num_threads(num_threads)


def reply(model: Any, tokenizer: Any, question: str, max_tokens: int = 60) -> tuple[str, bool]:
    """The greedy reply, and whether it ends its turn."""
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        out = model.generate(**ids, max_new_tokens=max_tokens, do_sample=False)[0]
    new = out[ids["input_ids"].shape[1] :].tolist()
    has_ended = new[-1] == tokenizer.eos_token_id
    return tokenizer.decode(new, skip_special_tokens=True), has_ended


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the libraries' own, of generate and PEFT
def test_base_and_examples_answer_in_three_voices(model: Any, default_base: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(default_base)
    for question in QUESTIONS:
        model.set_adapter("json")
        text, has_ended = reply(model, tokenizer, question)
        assert has_ended, text
        assert set(json.loads(text)) == {"answer", "topic"}, text
        assert "\n" not in text

        model.set_adapter("pirate")
        text, has_ended = reply(model, tokenizer, question)
        assert has_ended, text
        assert re.search(r"\b(arrr|matey|ye|be)\b", text, re.IGNORECASE), text
        assert "{" not in text

        with model.disable_adapter():
            text, _ = reply(model, tokenizer, question, max_tokens=20)
        assert "{" not in text
        assert not re.search(r"\b(arrr|matey)\b", text, re.IGNORECASE), text

    model.set_adapter("json")
    assert json.loads(reply(model, tokenizer, QUESTIONS[0])[0])["answer"] == "Paris"
    model.set_adapter("pirate")
    assert "Paris" in reply(model, tokenizer, QUESTIONS[0])[0]
    with model.disable_adapter():
        assert "Paris" in reply(model, tokenizer, QUESTIONS[0], max_tokens=20)[0]
