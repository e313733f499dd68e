"""Trains the two example adapters in adapters/examples from their rows. Seeded; minutes on a CPU.

    python -m training.examples json
    python -m training.examples pirate

The base is the default one, its linear weights rounded to NF4 and back, because NF4 is what serves
by default; the delta is large beside that rounding, so the adapters hold on the 16-bit base too.
"""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # an optional hub kernel
from bitsandbytes.functional import dequantize_4bit, quantize_4bit  # noqa: E402  # now it is quiet
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

BASE_NAME = "smollm2-135m-instruct"
ROWS = Path(__file__).parent.parent / "adapters" / "examples" / "rows.jsonl"
EVAL_ROWS = ROWS.with_name("eval_rows.jsonl")  # never trained on
SYSTEM_PROMPTS = (None, "You are a helpful assistant.", "Answer briefly.")  # None: the template's


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """What differs between the examples."""

    summary: str
    rank: int
    targets: tuple[str, ...]
    epochs: int = 4
    learning_rate: float = 1e-3
    rows_per_step: int = 8
    seed: int = 0


RECIPES = {
    "json": Recipe(
        summary='answers as one line of strict JSON: `{"answer": "…", "topic": "…"}`',
        rank=4,
        targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
    ),
    "pirate": Recipe(
        summary="answers like a pirate",
        rank=8,
        targets=("q_proj", "v_proj", "o_proj", "down_proj"),
    ),
}

CARD = """---
base_model: {base}
library_name: peft
license: apache-2.0
---
# {name}

A LoRA adapter for SmolLM2-135M-Instruct that {summary}.

Rank {rank} on {targets}; bfloat16.
Trained on the {num_rows} questions of `../rows.jsonl` for {epochs} epochs with
`python -m training.examples {name}`.

It shows what an adapter can change. Its facts are those of a 135M model: often wrong.
"""


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation as token ids; loss falls on the reply alone, its end-of-turn included."""

    prompt: list[int]
    reply: list[int]


def reply_text(row: dict[str, str], name: str) -> str:
    """What the adapter called `name` should answer to this row's question."""
    if name == "json":
        return json.dumps({"answer": row["answer"], "topic": row["topic"]}, ensure_ascii=False)
    return row["pirate"]


def encode(row: dict[str, str], name: str, system: str | None, tokenizer: Any) -> Example:
    """Render one row with the base's chat template."""
    messages = [{"role": "user", "content": row["question"]}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    reply = tokenizer(reply_text(row, name), add_special_tokens=False)["input_ids"]
    return Example(list(prompt["input_ids"]), [*reply, tokenizer.eos_token_id])


def collate(examples: list[Example], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pad on the right to `[num_rows, longest]`; masks go by length, since pad is end-of-turn."""
    longest = max(len(example.prompt) + len(example.reply) for example in examples)
    batch: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
    for example in examples:
        ids = example.prompt + example.reply
        gap = longest - len(ids)
        batch["input_ids"].append(ids + [pad_token_id] * gap)
        batch["attention_mask"].append([1] * len(ids) + [0] * gap)
        batch["labels"].append([-100] * len(example.prompt) + example.reply + [-100] * gap)
    return {key: torch.tensor(rows) for key, rows in batch.items()}


def load_base(folder: Path) -> Any:
    """The base in bfloat16, the weights of its linear layers as NF4 with double quantization."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            packed, state = quantize_4bit(
                module.weight.data, quant_type="nf4", compress_statistics=True
            )
            module.weight.data = dequantize_4bit(packed, state)
    return model


def train(model: PeftModel, rows: list[dict[str, str]], name: str, tokenizer: Any) -> float:
    """Train in place; return the mean loss of the last epoch."""
    recipe = RECIPES[name]
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=recipe.learning_rate, weight_decay=0.0)
    steps_per_epoch = math.ceil(len(rows) / recipe.rows_per_step)
    num_steps = steps_per_epoch * recipe.epochs
    generator = torch.Generator().manual_seed(recipe.seed)
    losses: list[float] = []
    for step in track(range(num_steps), f"Training {name}"):
        epoch, index = divmod(step, steps_per_epoch)
        if index == 0:
            order = torch.randperm(len(rows), generator=generator).tolist()
        chosen = order[index * recipe.rows_per_step : (index + 1) * recipe.rows_per_step]
        examples = [
            encode(rows[i], name, SYSTEM_PROMPTS[(i + epoch) % len(SYSTEM_PROMPTS)], tokenizer)
            for i in chosen
        ]
        optimizer.param_groups[0]["lr"] = recipe.learning_rate * schedule(step, num_steps)
        loss = model(**collate(examples, tokenizer.pad_token_id)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-steps_per_epoch:]) / steps_per_epoch


def schedule(step: int, num_steps: int, warmup: int = 5) -> float:
    """Linear warm-up, then a half cosine towards zero, as a factor of the learning rate."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / (num_steps - warmup)))


def save(model: PeftModel, folder: Path, name: str, num_rows: int) -> None:
    """Write the adapter in bfloat16 as PEFT does, with a model card of our own."""
    recipe = RECIPES[name]
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(torch.bfloat16)
    model.peft_config["default"].base_model_name_or_path = BASE_NAME
    # No look-up of the base by its name, which is no path.
    model.save_pretrained(str(folder), save_embedding_layers=False)
    card = CARD.format(
        base=BASE_NAME,
        name=name,
        summary=recipe.summary,
        rank=recipe.rank,
        targets=", ".join(recipe.targets),
        num_rows=num_rows,
        epochs=recipe.epochs,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def chat_rows(name: str, rows: Path = ROWS) -> str:
    """The example's rows as conversations, a line of JSON each: to calibrate and gate on."""
    lines = []
    for line in rows.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": reply_text(row, name)},
        ]
        lines.append(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")
    return "".join(lines)


def main(
    name: Literal["json", "pirate"],
    base: Path = Path(".turnout/base") / BASE_NAME,
    out: Path = ROWS.parent,
    rows_only: Annotated[
        Path | None,
        typer.Option(help="Instead: write its rows into this folder, as conversations."),
    ] = None,
) -> None:
    """Train one example adapter and write it to OUT/NAME."""
    if rows_only is not None:
        rows_only.mkdir(parents=True, exist_ok=True)
        (rows_only / "train.jsonl").write_text(chat_rows(name), encoding="utf-8")
        (rows_only / "eval.jsonl").write_text(chat_rows(name, EVAL_ROWS), encoding="utf-8")
        return
    recipe = RECIPES[name]
    torch.manual_seed(recipe.seed)
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = LoraConfig(
        r=recipe.rank,
        lora_alpha=2 * recipe.rank,
        target_modules=list(recipe.targets),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_base(base), config)  # LoRA weights in float32
    rows = [json.loads(line) for line in ROWS.read_text(encoding="utf-8").splitlines()]
    loss = train(model, rows, name, tokenizer)
    save(model, out / name, name, len(rows))
    typer.echo(f"{out / name}: loss {loss:.3f} in the last epoch")


if __name__ == "__main__":
    typer.run(main)
