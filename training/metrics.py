"""What base and adapter answer to the same questions, and how near the references that is."""

import functools
import importlib.util
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from peft import PeftModel
from transformers import DynamicCache

from training.data import Dataset
from training.render import Example, Renderer

LIBRARIES = {"ROUGE-L": "rouge_score", "BLEU": "sacrebleu"}  # pip knows one as rouge-score
_MAX_ROWS = 32  # answered at once, halved where memory runs out


class OnAnswer(Protocol):
    """Hears of progress."""

    def __call__(self, count: int, total: int) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One row, answered twice."""

    question: str
    reference: str
    before: str  # the base's answer
    after: str  # the adapter's


@dataclass(frozen=True, slots=True, kw_only=True)
class Generations:
    """Answers of the base and the adapter, and their scores: between 0 and 1, BLEU up to 100."""

    samples: tuple[Sample, ...]
    is_held_out: bool  # else they are rows that were trained on
    before: Mapping[str, float]
    after: Mapping[str, float]

    @property
    def rows(self) -> str:
        """What was asked, in words."""
        return f"{len(self.samples)} {'held-out' if self.is_held_out else 'training'} rows"


def missing_libraries() -> list[str]:
    """What cannot be measured here, each with the remedy."""
    return [
        f"{score} is left out: it needs {library}: pip install {library.replace('_', '-')}"
        for score, library in LIBRARIES.items()
        if importlib.util.find_spec(library) is None
    ]


def compare(
    model: PeftModel,
    renderer: Renderer,
    dataset: Dataset,
    *,
    count: int,
    max_tokens: int,
    seed: int,
    on_answer: OnAnswer = lambda count, total: None,
) -> Generations | None:
    """Ask up to `count` rows of base and adapter alike; None where no row has a whole reply.

    Held-out rows, or training rows where nothing is held out. Answers are greedy, of at most
    `max_tokens` tokens, and cut where they are half as long again as any reference.
    `on_answer` hears how many more there are, and of how many.
    """
    rows = choose(dataset.evaluation or dataset.training, count, seed)
    if not rows:
        return None
    references = [reference(row, renderer) for row in rows]
    longest = max(len(row.ids) - (row.reply_at or 0) for row in rows)
    limit = min(max_tokens, longest + longest // 2 + 16)
    said = functools.partial(on_answer, total=2 * len(rows))
    after = answer(model, renderer, rows, max_tokens=limit, on_answer=said)
    with model.disable_adapter():
        before = answer(model, renderer, rows, max_tokens=limit, on_answer=said)
    samples = (
        Sample(question=row.question, reference=reference, before=first, after=then)
        for row, reference, first, then in zip(rows, references, before, after, strict=True)
    )
    return Generations(
        samples=tuple(samples),
        is_held_out=bool(dataset.evaluation),
        before=scores(references, before),
        after=scores(references, after),
    )


def choose(examples: Sequence[Example], count: int, seed: int) -> list[Example]:
    """Up to `count` of the examples that end in a whole reply to something, in their order."""
    able = [i for i, example in enumerate(examples) if example.reply_at is not None]
    chosen = random.Random(seed).sample(able, min(count, len(able)))
    return [examples[i] for i in sorted(chosen)]


def reference(example: Example, renderer: Renderer) -> str:
    """The text of an example's last reply."""
    return _text(list(example.ids[example.reply_at :]), renderer)


@torch.no_grad()
def answer(
    model: PeftModel,
    renderer: Renderer,
    rows: Sequence[Example],
    *,
    max_tokens: int,
    on_answer: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """The model's greedy reply to each row's prompt, in the rows' order."""
    model.eval()
    prompts = [list(row.ids[: row.reply_at]) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))  # alike ones, to pad less
    found: dict[int, str] = {}
    size = _MAX_ROWS
    while len(found) < len(order):
        part = order[len(found) : len(found) + size]
        try:
            replies = _generate(model, renderer, [prompts[i] for i in part], max_tokens)
        except torch.OutOfMemoryError:
            if size == 1:
                raise ValueError(
                    "memory is too small to generate; --resume and eval_generations: 0 go without"
                ) from None
            size //= 2
            torch.cuda.empty_cache()
            continue
        found |= {i: _text(reply, renderer) for i, reply in zip(part, replies, strict=True)}
        on_answer(len(part))
    return [found[i] for i in range(len(rows))]


def _generate(
    model: PeftModel, renderer: Renderer, prompts: list[list[int]], max_tokens: int
) -> list[list[int]]:
    """New tokens after each prompt; prompts are padded on the left and masked by length.

    A loop of our own: transformers' follows the sampling and penalties of the base's own
    generation_config.json, and on a CPU copies the head once a row.
    """
    causal: Any = model.base_model.model
    longest = max(map(len, prompts))
    gaps = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * gap + prompt for gap, prompt in zip(gaps, prompts, strict=True)])
    seen = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps])
    ids, seen = ids.to(causal.device), seen.to(causal.device)
    ends = torch.tensor(sorted(renderer.end_ids), device=ids.device)
    is_done = torch.zeros(len(prompts), dtype=torch.bool, device=ids.device)
    cache, found = DynamicCache(config=causal.config), []
    for _ in range(max_tokens):
        hidden = causal.model(
            input_ids=ids,
            attention_mask=seen,
            position_ids=(seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        latest = causal.lm_head(hidden[:, -1].contiguous()).argmax(-1)  # [num_rows]
        found.append(latest)
        is_done |= torch.isin(latest, ends)
        if is_done.all():
            break
        ids, seen = latest.unsqueeze(1), torch.cat([seen, torch.ones_like(seen[:, :1])], 1)
    new: list[list[int]] = torch.stack(found, 1).tolist()
    return new


def _text(ids: list[int], renderer: Renderer) -> str:
    """Up to the end of the turn."""
    end = next((i for i, token in enumerate(ids) if token in renderer.end_ids), len(ids))
    return str(renderer.tokenizer.decode(ids[:end], skip_special_tokens=True)).strip()


def scores(references: Sequence[str], answers: Sequence[str]) -> dict[str, float]:
    """Exact match, ROUGE-L (F) and BLEU of the answers, as far as their libraries are there."""
    pairs = list(zip(references, answers, strict=True))
    found = {"exact match": sum(one == other for one, other in pairs) / len(pairs)}
    if importlib.util.find_spec(LIBRARIES["ROUGE-L"]):
        rouge: Any = importlib.import_module("rouge_score.rouge_scorer")
        scorer = rouge.RougeScorer(["rougeL"], tokenizer=_Words())
        found["ROUGE-L"] = sum(scorer.score(*pair)["rougeL"].fmeasure for pair in pairs) / len(
            pairs
        )
    if importlib.util.find_spec(LIBRARIES["BLEU"]):
        sacrebleu: Any = importlib.import_module("sacrebleu")
        # effective_order: answers of less than four words have no 4-grams to agree in.
        bleu = sacrebleu.BLEU(effective_order=True)
        found["BLEU"] = bleu.corpus_score(list(answers), [list(references)]).score
    return found


class _Words:
    """Words of any script; rouge-score's own tokenizer drops all letters but a to z."""

    def tokenize(self, text: str) -> list[str]:
        return re.findall(r"\w+", text.lower())
