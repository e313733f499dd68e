"""A real model in NF4 on the GPU: as near to exact arithmetic as bitsandbytes is."""

import random
import warnings
from collections import Counter
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
from tests.conftest import MakeAdapter
from tests.server.engine.conftest import MakeHarness
from tests.server.engine.test_default_base_oracle import EXAMPLES, QUESTIONS
from tests.server.engine.test_oracle import KINDS

pytestmark = pytest.mark.gpu

MORE_QUESTIONS = (
    "What is a turnout on a railway?",
    "Write one line about autumn.",
    "How many legs does a spider have?",
    "What do bees make?",
    "Explain gravity to a child.",
    "Which planet is the largest?",
    "Give me a recipe for pancakes.",
    "What is the opposite of hot?",
    "Who painted the Mona Lisa?",
    "How does a bicycle stay upright?",
    "What is a prime number?",
    "Say something kind.",
)
GREEDY = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
MARGIN = 0.002  # 0.2 points
RANDOM_KINDS = ("all-linear", "rank_pattern", "rslora", "dora")


@pytest.fixture(scope="module")
def base() -> Path:
    return ensure_default_base()


@pytest.fixture(scope="module")
def folders(base: Path, make_adapter: MakeAdapter) -> dict[str, Path]:
    """Trained adapters and, of other kinds, random ones."""
    found = {name: EXAMPLES / name for name in ("json", "pirate")}
    for seed, kind in enumerate(RANDOM_KINDS):
        found[kind] = make_adapter(base=base, seed=seed, **KINDS[kind])
    return found


def oracle(base: Path, folders: dict[str, Path], *, is_exact: bool) -> Any:
    """PEFT over fp32 arithmetic on the values that NF4 holds, or over bitsandbytes' own."""
    settings: dict[str, Any] = {"dtype": torch.float32}
    if not is_exact:
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        settings = {"dtype": torch.bfloat16, "quantization_config": quantization}
    with warnings.catch_warnings(action="ignore"):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            base, device_map="cuda", **settings
        )
        linears = {name for group in FUSED.values() for name in group}
        for name, module in model.named_modules():
            if is_exact and name.split(".", 3)[-1] in linears:
                quantized = nf4.quantize(module.weight.data.bfloat16())
                module.weight.data = quantized.dequantize(torch.float32)
        wrapped: Any = None
        for name, folder in folders.items():
            if wrapped is None:
                wrapped = peft.PeftModel.from_pretrained(model, str(folder), name)
            else:
                wrapped.load_adapter(str(folder), adapter_name=name)
    return wrapped.eval()


@torch.inference_mode()
def choices(model: Any, name: str | None, requests: list[Request]) -> list[int]:
    """The oracle's choice at each place of these answers, all read in one pass, padded behind."""
    texts = [request.prompt_ids + request.output_ids for request in requests]
    longest = max(map(len, texts))
    ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts], device="cuda")
    if name is None:
        with model.disable_adapter():
            logits = model(ids).logits
    else:
        model.set_adapter(name)
        logits = model(ids).logits
    found: list[int] = []
    for row, text, request in zip(logits.argmax(dim=-1), texts, requests, strict=True):
        found += row[len(request.prompt_ids) - 1 : len(text) - 1].tolist()
    return found


def test_top_1_is_as_often_off_exact_arithmetic_as_bitsandbytes_is(
    make_harness: MakeHarness, base: Path, folders: dict[str, Path]
) -> None:
    harness = make_harness(
        base=base, quantization="nf4", dtype="bfloat16", cache={"num_blocks": 4096}
    )
    assert harness.info.kernels["linear"] == "NF4, CUDA"
    tokenizer = transformers.AutoTokenizer.from_pretrained(base)
    chats = [[{"role": "user", "content": text}] for text in (*QUESTIONS, *MORE_QUESTIONS)]
    prompts: Any = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, return_dict=False
    )
    refs: dict[str | None, AdapterRef | None] = {None: None}
    refs.update({name: harness.push(folder) for name, folder in folders.items()})

    answers: dict[tuple[str, str | None], list[Request]] = {}
    for name, ref in refs.items():
        answers["alone", name] = [harness.add(list(p), ref, GREEDY) for p in prompts]
        harness.run()
    order = [(name, prompt) for prompt in prompts for name in refs]
    random.Random(0).shuffle(order)
    for name, prompt in order:
        request = harness.add(list(prompt), refs[name], GREEDY)
        answers.setdefault(("mixed", name), []).append(request)
    harness.run()

    exact, theirs = (oracle(base, folders, is_exact=flag) for flag in (True, False))
    places: Counter[Any] = Counter()
    our_misses: Counter[Any] = Counter()
    their_misses: Counter[Any] = Counter()
    for key, requests in answers.items():
        right = choices(exact, key[1], requests)
        beside = choices(theirs, key[1], requests)
        ours = [token_id for request in requests for token_id in request.output_ids]
        places[key] = len(right)
        our_misses[key] = sum(a != b for a, b in zip(ours, right, strict=True))
        their_misses[key] = sum(a != b for a, b in zip(beside, right, strict=True))
    for key, count in places.items():
        shares = our_misses[key] / count, their_misses[key] / count
        print(f"{key}: ours {shares[0]:.2%}, bitsandbytes {shares[1]:.2%} of {count}")  # noqa: T201  # the figures
    assert our_misses.total() <= their_misses.total() + MARGIN * places.total()
    for key, count in places.items():
        assert our_misses[key] <= their_misses[key] + MARGIN * count + 0.01 * count, key
