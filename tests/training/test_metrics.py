"""Answers of base and adapter, and their scores."""

import sys
from typing import Any

import peft
import pytest
import torch
import transformers

from tests.training.conftest import MakeConfig, dataset_of
from training import metrics
from training.metrics import answer, choose, compare, missing_libraries, reference, scores
from training.qlora import add_adapter, load_base, trained
from training.render import Example, Renderer
from training.rows import Chat

CPU = torch.device("cpu")
ANSWERS = ["the cat sat on the mat", "no", ""]
REFERENCES = ["the cat sat on the mat", "no, never", "yes"]


def chat(*turns: tuple[str, str]) -> Chat:
    return Chat(tuple({"role": role, "content": content} for role, content in turns))


@pytest.fixture
def renderer(tokenizer: Any) -> Renderer:
    return Renderer(tokenizer, frozenset({tokenizer.eos_token_id}), "assistant")


@pytest.fixture
def model(make: MakeConfig) -> peft.PeftModel:
    """An adapter that changes every answer."""
    config = make()
    model = add_adapter(load_base(config.base, "nf4", torch.float32, CPU), config)
    with torch.no_grad():
        for weight in trained(model).values():
            weight.normal_(std=0.2, generator=torch.Generator().manual_seed(0))
    return model


def test_scores_are_shares_of_agreement() -> None:
    found = scores(REFERENCES, ANSWERS)
    assert found["exact match"] == pytest.approx(1 / 3)
    assert found["ROUGE-L"] == pytest.approx((1 + 2 * 1 * 0.5 / 1.5 + 0) / 3)
    assert 0 < found["BLEU"] < 100
    assert scores(["no"], ["no"]) == {"exact match": 1, "ROUGE-L": 1, "BLEU": pytest.approx(100)}
    nothing = {"exact match": 0, "ROUGE-L": 0, "BLEU": 0}
    assert scores(["one two three"], ["four"]) == nothing


def test_words_of_every_script_count() -> None:
    assert scores(["Москва здесь"], ["москва там"])["ROUGE-L"] == pytest.approx(0.5)


def test_without_a_library_its_score_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_libraries() == []
    monkeypatch.setitem(sys.modules, "rouge_score", None)
    assert missing_libraries() == [
        "ROUGE-L is left out: it needs rouge_score: pip install rouge-score"
    ]
    assert scores(REFERENCES, ANSWERS).keys() == {"exact match", "BLEU"}
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    assert len(missing_libraries()) == 2
    assert scores(REFERENCES, ANSWERS) == {"exact match": pytest.approx(1 / 3)}


def test_rows_are_chosen_by_seed_among_those_with_a_whole_reply() -> None:
    rows = [Example((i, 1, 2), (False, True, True), True, 1 if i % 2 else None) for i in range(20)]
    assert choose(rows, 99, 0) == [row for row in rows if row.reply_at]
    some = choose(rows, 4, 0)
    assert len(some) == 4
    assert [row.ids for row in some] == sorted(row.ids for row in some)
    assert choose(rows, 4, 0) == some
    assert any(choose(rows, 4, seed) != some for seed in range(1, 5))


def test_answers_are_those_of_transformers_one_row_at_a_time(
    make: MakeConfig, tokenizer: Any, renderer: Renderer, model: peft.PeftModel
) -> None:
    rows = dataset_of(make(), tokenizer).training[:5]
    assert len({len(row.ids) for row in rows}) > 1  # so that some are padded
    found = answer(model, renderer, rows, max_tokens=8)
    for row, text in zip(rows, found, strict=True):
        ids = torch.tensor([row.ids[: row.reply_at]])
        config = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=8, eos_token_id=2, pad_token_id=2
        )
        generate: Any = model.generate
        whole = generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=config,
            use_cache=True,
        )
        new = whole[0, ids.shape[1] :]
        assert text == tokenizer.decode(new, skip_special_tokens=True).strip()


def test_an_answer_ends_with_the_turn(
    make: MakeConfig, tokenizer: Any, model: peft.PeftModel
) -> None:
    rows = dataset_of(make(), tokenizer).training[:3]
    endless = Renderer(tokenizer, frozenset(), "assistant")
    first = answer(model, endless, rows, max_tokens=6)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in first]
    stop = ids[0][2]
    ended = answer(model, Renderer(tokenizer, frozenset({stop}), "assistant"), rows, max_tokens=6)
    assert first[0].startswith(ended[0])
    assert len(ended[0]) < len(first[0])


def test_base_and_adapter_answer_the_same_held_out_rows(
    make: MakeConfig, tokenizer: Any, renderer: Renderer, model: peft.PeftModel
) -> None:
    dataset, heard = dataset_of(make(), tokenizer), []
    count = sum(weight.numel() for weight in trained(model).values())

    def hear(count: int, total: int) -> None:
        heard.append((count, total))

    found = compare(model, renderer, dataset, count=2, max_tokens=6, seed=0, on_answer=hear)
    assert found is not None
    assert heard == [(2, 4), (2, 4)]
    assert found.is_held_out
    assert found.rows == "2 held-out rows"
    chosen = choose(dataset.evaluation, 2, 0)
    assert [sample.question for sample in found.samples] == [row.question for row in chosen]
    assert all(sample.question.startswith("Say ") for sample in found.samples)
    assert all(sample.reference.startswith("yes") for sample in found.samples)
    after = answer(model, renderer, chosen, max_tokens=6)
    assert [sample.after for sample in found.samples] == after
    assert [sample.before for sample in found.samples] != after
    assert found.after == scores([sample.reference for sample in found.samples], after)
    assert sum(weight.numel() for weight in trained(model).values()) == count  # trained still
    untrained = add_adapter(load_base(make().base, "nf4", torch.float32, CPU), make())
    before = answer(untrained, renderer, chosen, max_tokens=6)  # its B is 0: the base itself
    assert [sample.before for sample in found.samples] == before


def test_training_rows_are_asked_where_nothing_is_held_out(
    make: MakeConfig, tokenizer: Any, renderer: Renderer, model: peft.PeftModel, tmp_path: Any
) -> None:
    dataset = dataset_of(make(eval_fraction=0), tokenizer)
    found = compare(model, renderer, dataset, count=3, max_tokens=2, seed=0)
    assert found is not None
    assert found.rows == "3 training rows"
    (tmp_path / "a.jsonl").write_text('{"text": "nothing to ask"}\n')
    plain = dataset_of(make(data=tmp_path / "a.jsonl", eval_fraction=0), tokenizer)
    assert compare(model, renderer, plain, count=3, max_tokens=2, seed=0) is None


def test_answers_are_never_longer_than_references_need(
    make: MakeConfig,
    tokenizer: Any,
    renderer: Renderer,
    model: peft.PeftModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    dataset, asked = dataset_of(make(), tokenizer), []

    def nothing(model: Any, renderer: Any, rows: Any, *, max_tokens: int, **_: Any) -> list[str]:
        asked.append(max_tokens)
        return [""] * len(rows)

    monkeypatch.setattr(metrics, "answer", nothing)
    for limit in (5, 999):
        compare(model, renderer, dataset, count=9, max_tokens=limit, seed=0)
    longest = max(len(row.ids) - (row.reply_at or 0) for row in dataset.evaluation)
    assert asked == [5, 5, *[longest + longest // 2 + 16] * 2]


def test_out_of_memory_halves_the_rows_answered_at_once(
    make: MakeConfig,
    tokenizer: Any,
    renderer: Renderer,
    model: peft.PeftModel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = dataset_of(make(), tokenizer).training
    expected = answer(model, renderer, rows, max_tokens=3)
    real, room = metrics._generate, 2

    def scarce(model: Any, renderer: Any, prompts: Any, max_tokens: int) -> Any:
        if len(prompts) > room:
            raise torch.OutOfMemoryError
        return real(model, renderer, prompts, max_tokens)

    monkeypatch.setattr(metrics, "_generate", scarce)
    assert answer(model, renderer, rows, max_tokens=3) == expected
    room = 0
    with pytest.raises(ValueError, match="eval_generations: 0 go without"):
        answer(model, renderer, rows, max_tokens=3)


def test_the_reference_is_the_reply_as_it_was_written(tokenizer: Any, renderer: Renderer) -> None:
    example = renderer.example(
        chat(("user", "A?"), ("assistant", "B."), ("user", "C?"), ("assistant", "D é."))
    )
    assert reference(example, renderer) == "D é."
    assert example.question == "C?"
