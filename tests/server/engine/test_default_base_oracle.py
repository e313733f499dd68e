"""The default base and the shipped adapters against transformers + PEFT: real model, real text."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from server.default_base import ensure_default_base
from server.engine.request import AdapterRef, Request, SamplingParams
from server.model.spec import FUSED
from server.quant import nf4
from tests.server.engine.conftest import GREEDY, Harness, MakeHarness
from tests.server.engine.test_oracle import Oracle, disagreements

EXAMPLES = Path(__file__).parents[3] / "adapters" / "examples"
NAMES = (None, "json", "pirate")
QUESTIONS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "Name three fruits.",
    "Who wrote Hamlet?",
    "How do I boil an egg?",
    "What is seven times eight?",
    "Tell me about the moon in two sentences.",
    "What should I pack for a trip to the sea?",
)


@pytest.fixture(scope="module")
def base() -> Path:
    return ensure_default_base()


@pytest.fixture(scope="module")
def prompts(base: Path) -> list[list[int]]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    found: Any = tokenizer.apply_chat_template(chats, add_generation_prompt=True, return_dict=False)
    return [list(prompt) for prompt in found]


def add_all(harness: Harness, prompts: list[list[int]], sampling: SamplingParams) -> list[Any]:
    """Every prompt through the base and both adapters, all in one batch: (name, request)."""
    refs: dict[str | None, AdapterRef | None] = {None: None}
    refs.update({name: harness.push(EXAMPLES / name) for name in NAMES if name})
    return [(name, harness.add(p, refs[name], sampling)) for p in prompts for name in NAMES]


def test_in_fp32_64_greedy_tokens_of_8_prompts_equal_the_oracles(
    make_harness: MakeHarness, base: Path, prompts: list[list[int]]
) -> None:
    harness = make_harness(base=base)
    added: list[tuple[str | None, Request]] = add_all(harness, prompts, GREEDY)
    harness.run()
    oracle = Oracle(base, {name: EXAMPLES / name for name in NAMES if name})
    for name, request in added:
        assert len(request.output_ids) == 64
        assert disagreements(oracle, request, name) == []


@torch.inference_mode()
def choices(model: Any, name: str | None, token_ids: list[int]) -> list[int]:
    """The most likely next token after each token."""
    ids = torch.tensor([token_ids])
    if name is None:
        with model.disable_adapter():
            logits = model(ids).logits[0]
    else:
        model.set_adapter(name)
        logits = model(ids).logits[0]
    found: list[int] = logits.argmax(dim=-1).tolist()
    return found


def with_adapters(model: Any) -> Any:
    with warnings.catch_warnings(action="ignore"):
        wrapped = peft.PeftModel.from_pretrained(model, str(EXAMPLES / "json"), "json")
        wrapped.load_adapter(str(EXAMPLES / "pirate"), adapter_name="pirate")
    return wrapped.eval()


def exact_nf4(base: Path) -> Any:
    """fp32 arithmetic over the very values that NF4 holds."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    names = {name for group in FUSED.values() for name in group}
    for name, module in model.named_modules():
        if name.split(".", 3)[-1] in names:
            quantized = nf4.quantize(module.weight.data.bfloat16())
            module.weight.data = quantized.dequantize(torch.float32)
    return with_adapters(model)


def bitsandbytes_nf4(base: Path) -> Any:
    """bitsandbytes' own arithmetic, as transformers runs it."""
    config = transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    with warnings.catch_warnings(action="ignore"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, quantization_config=config
        )
    return with_adapters(model)


@pytest.fixture
def quiet_oracles() -> Iterator[None]:
    with warnings.catch_warnings(action="ignore"):
        yield


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_oracles")
def test_in_nf4_we_are_as_close_to_exact_arithmetic_as_bitsandbytes_is(
    make_harness: MakeHarness,
    base: Path,
    prompts: list[list[int]],
    record_property: Any,
) -> None:
    harness = make_harness(base=base, quantization="nf4", dtype="bfloat16")
    answers: list[tuple[str | None, Request]] = add_all(harness, prompts, GREEDY)
    harness.run()
    forced = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1)
    texts = [(name, r.prompt_ids + r.output_ids, r.adapter) for name, r in answers]
    scored = [harness.add(text, adapter, forced) for _, text, adapter in texts]
    outputs = harness.run()

    exact, theirs = exact_nf4(base), bitsandbytes_nf4(base)
    num_places = our_misses = their_misses = 0
    for (name, text, _), request in zip(texts, scored, strict=True):
        first = outputs[request.request_id][0]
        assert first.prompt_logprobs is not None
        ours = [found.top_ids[0] for found in first.prompt_logprobs[1:] if found is not None]
        right = choices(exact, name, text)[:-1]
        num_places += len(right)
        our_misses += sum(a != b for a, b in zip(ours, right, strict=True))
        bitsandbytes = choices(theirs, name, text)[:-1]
        their_misses += sum(a != b for a, b in zip(bitsandbytes, right, strict=True))
    record_property("our_disagreement", our_misses / num_places)
    record_property("bitsandbytes_disagreement", their_misses / num_places)
    print(f"top-1 off exact NF4: ours {our_misses}, bitsandbytes {their_misses} of {num_places}")  # noqa: T201  # the figure itself
    assert our_misses <= their_misses + 0.01 * num_places
    assert our_misses <= 0.03 * num_places
