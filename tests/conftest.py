"""What every test may use: a tiny random Mistral, and adapters over it made by PEFT itself."""

import itertools
import os
import warnings
from pathlib import Path
from typing import Any, Protocol

# Before torch is loaded: OpenMP threads that spin while they wait take the core that the thread
# they wait for needs, and tests run many processes on few cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import peft
import pytest
import torch
import transformers

from tests.random_mistral import random_mistral


class MakeAdapter(Protocol):
    """See the `make_adapter` fixture."""

    def __call__(
        self,
        *,
        base: Path | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        **lora_config: Any,
    ) -> Path: ...


@pytest.fixture(scope="session")
def tiny_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Mistral: 2 layers, hidden 64, 4 heads over 2 KV heads, vocab 256, fp32."""
    return random_mistral(tmp_path_factory.mktemp("tiny-base"))


@pytest.fixture(scope="session")
def make_adapter(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> MakeAdapter:
    """Return a function that saves a PEFT LoRA adapter and returns its folder.

    `base` is `tiny_base` unless another one is given.

    Keywords are LoraConfig's, by default r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"],
    task_type="CAUSAL_LM"; A, B and DoRA's magnitude are random, non-zero and set by `seed`.
    """
    root = tmp_path_factory.mktemp("adapters")
    counter = itertools.count()

    def make(
        *,
        base: Path | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        **lora_config: Any,
    ) -> Path:
        defaults = {
            "r": 8,
            "lora_alpha": 16,
            "target_modules": ["q_proj", "v_proj"],
            "task_type": "CAUSAL_LM",
        }
        over = transformers.MistralForCausalLM.from_pretrained(base or tiny_base)
        config = peft.LoraConfig(**{**defaults, **lora_config})
        generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(), warnings.catch_warnings(action="ignore"):
            model = peft.get_peft_model(over, config)
            _randomize(model, generator)
            folder = root / f"adapter-{next(counter)}"
            model.to(dtype).save_pretrained(str(folder))
        return folder

    return make


def _randomize(model: peft.PeftModel, generator: torch.Generator) -> None:
    """Give every LoRA tensor non-zero values large enough to change the model's next token."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude_vector" in name:
                noise = torch.rand(parameter.shape, generator=generator)
                parameter.mul_(0.75 + 0.5 * noise)
            elif "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
