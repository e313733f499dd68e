"""The baseline: transformers' generate around PEFT, switching the whole model by set_adapter.

It batches as well as that design can: all requests of one adapter in one generate call, adapter by
adapter.
"""

import time
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from server.bench.timing import Timing
from server.config import ModelConfig


class PeftBaseline:
    """transformers + PEFT over the same checkpoint in the same quantization."""

    name = "transformers + PEFT"

    def __init__(self, model: ModelConfig, folders: list[Path], new_tokens: int) -> None:
        options: dict[str, Any] = {"dtype": torch.bfloat16}
        if model.quantization == "nf4":
            options["quantization_config"] = transformers.BitsAndBytesConfig(
                load_in_4bit=True,
                bnb_4bit_quant_type="nf4",
                bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            )
        transformers.utils.logging.disable_progress_bar()
        with warnings.catch_warnings(action="ignore"):
            base = transformers.AutoModelForCausalLM.from_pretrained(model.path, **options)
            self._model: Any = peft.PeftModel.from_pretrained(base, str(folders[0]), "a0")
            for index, folder in enumerate(folders[1:], start=1):
                self._model.load_adapter(str(folder), adapter_name=f"a{index}")
        self._model.eval()
        self._new_tokens = new_tokens

    @torch.inference_mode()
    def run(self, prompts: list[list[int]], choice: list[int | None]) -> Timing:
        """Run one batch: prompts[i] through adapter choice[i], None for the base."""
        groups: dict[int | None, list[list[int]]] = {}
        for prompt, chosen in zip(prompts, choice, strict=True):
            groups.setdefault(chosen, []).append(prompt)
        prefill_s = sum(self._group(chosen, group, 1) for chosen, group in groups.items())
        total_s = sum(
            self._group(chosen, group, self._new_tokens) for chosen, group in groups.items()
        )
        return Timing(prefill_s, total_s)

    def _group(self, chosen: int | None, prompts: list[list[int]], new_tokens: int) -> float:
        """Seconds for one adapter's requests, in one generate call."""
        ids = torch.tensor(prompts, device=self._model.device)
        began = time.perf_counter()
        if chosen is None:
            with self._model.disable_adapter():
                self._generate(ids, new_tokens)
        else:
            self._model.set_adapter(f"a{chosen}")
            self._generate(ids, new_tokens)
        return time.perf_counter() - began

    def _generate(self, ids: torch.Tensor, new_tokens: int) -> None:
        self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            min_new_tokens=new_tokens,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
        )
