"""A whole run on a GPU, from rows to an adapter that PEFT reads."""

import io
import json
import random
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from server.base_digest import base_digest
from server.bench.reference import save_reference_base
from training import run
from training.config import TrainConfig, make_config
from training.fast.layer import CHOICES
from training.memory import MIB

pytestmark = pytest.mark.gpu
GPU = "cuda"
SHAPE = {
    "num_hidden_layers": 4,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 512,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bases") / "base"
    save_reference_base(folder, torch.device(GPU), **SHAPE)
    return folder


@pytest.fixture
def config(base: Path, tmp_path: Path) -> TrainConfig:
    """Rows of one sentence, over and over: what a base of random weights can learn."""
    numbers, rows = random.Random(0), tmp_path / "rows.jsonl"
    words = [f"w{numbers.randrange(3, 512)}" for _ in range(40)]
    texts = [" ".join(words[start:] + words[:start]) for start in range(0, 40, 2)]
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {"max_steps": 12, "batch_size": 4, "micro_batch": 2, "learning_rate": 5e-3}
    settings |= {"max_length": 64, "eval_fraction": 0.2, "eval_generations": 0, "warmup": 1}
    return make_config({"base": base, "data": rows, "out": tmp_path / "out", **settings})[0]


@pytest.mark.parametrize(
    ("checkpointing", "num_kept", "on_host"), [(None, len(CHOICES), False), (True, 3, True)]
)
def test_a_run_learns_with_the_kernels_of_its_plan_and_leaves_an_adapter(
    config: TrainConfig, checkpointing: bool | None, num_kept: int, on_host: bool
) -> None:
    config = config.model_copy(update={"gradient_checkpointing": checkpointing})
    prepared = run.prepare(config)
    options = prepared.plan.kernels.options
    assert options is not None
    assert (len(options.keep), options.on_host) == (num_kept, on_host)
    digest, sink = base_digest(config.base), Console(file=io.StringIO())
    torch.cuda.reset_peak_memory_stats()  # other tests of this process
    outcome = run.train(prepared, digest, sink, resume=False, overwrite=False)
    losses = [each["loss"] for each in outcome.state.evaluations]
    assert losses[-1] < losses[0] - 0.5
    assert outcome.peak_bytes < prepared.plan.total_bytes + 64 * MIB
    tensors = load_file(config.out / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * SHAPE["num_hidden_layers"]
    assert all(tensor.isfinite().all() for tensor in tensors.values())
    notes = json.loads((config.out / "turnout.json").read_text())
    assert notes["training"]["memory"]["peak"] == outcome.peak_bytes
