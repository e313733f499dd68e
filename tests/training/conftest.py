"""A small random base with the default base's tokenizer and template, and rows to train it on."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from server.default_base import ensure_default_base
from training.config import TrainConfig, make_config
from training.data import Dataset, load_dataset
from training.fast.choice import choices
from training.render import Renderer, end_ids
from training.trainer import Trainer

MakeConfig = Callable[..., TrainConfig]


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(ensure_default_base())


@pytest.fixture(scope="session")
def chat_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Mistral, 2 layers and hidden 64, with the default base's vocabulary."""
    folder = tmp_path_factory.mktemp("bases") / "chat-base"
    config = transformers.MistralConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        sliding_window=None,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.MistralForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(ensure_default_base() / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve instruction rows of differing lengths."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    rows = [
        {"instruction": f"Say {'so ' * (number % 5)}{number}.", "output": "yes " * (1 + number % 4)}
        for number in range(12)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def make(chat_base: Path, rows_file: Path, tmp_path: Path) -> MakeConfig:
    """Return a function that makes a config over `chat_base`; keywords are settings."""

    def config(**settings: Any) -> TrainConfig:
        defaults = {
            "base": chat_base,
            "data": rows_file,
            "out": tmp_path / "out",
            "rank": 4,
            "learning_rate": 5e-3,
            "dtype": "fp32",
            "batch_size": 4,
            "micro_batch": 2,
            "max_length": 128,
            "eval_fraction": 0.25,
            "eval_generations": 0,
        }
        return make_config({**defaults, **settings})[0]

    return config


def dataset_of(config: TrainConfig, tokenizer: Any) -> Dataset:
    """What a run on this config trains and evaluates on."""
    return load_dataset(config, Renderer(tokenizer, end_ids(config.base, tokenizer), config.loss))


def cpu_trainer(config: TrainConfig, model: Any, dataset: Dataset, **options: Any) -> Trainer:
    """A trainer on the CPU, with the kernels that take the least memory."""
    causal, cpu = model.base_model.model, torch.device("cpu")
    kernels = choices(config, causal.config, causal.dtype, cpu)[-1]
    return Trainer(config, model, dataset, pad_id=2, device=cpu, kernels=kernels, **options)
