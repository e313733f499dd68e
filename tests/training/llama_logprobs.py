"""What llama.cpp says may come next: `python -P llama_logprobs.py MODEL IDS [LORA]`, as JSON.

Runs in the environment that `make quantizer` makes. Prints the likeliest tokens and their log
probabilities: [[token id, log probability], ...].
"""

import importlib
import json
import sys
from typing import Any

NUM_TOKENS = 40


def main(model: str, ids: list[int], adapter: str | None) -> list[tuple[int, float]]:
    """Over the model in a GGUF file, with or without a LoRA over it."""
    library = importlib.import_module("xllamacpp")
    params = library.CommonParams()
    params.model.path = model
    params.n_ctx, params.n_parallel, params.cpuparams.n_threads = 256, 1, 1
    if adapter is not None:
        lora = library.CommonAdapterLoraInfo()
        lora.path, lora.scale = adapter, 1.0
        params.lora_adapters = [lora]
    server = library.Server(params)
    request = {"prompt": ids, "n_predict": 1, "n_probs": NUM_TOKENS, "temperature": 0.0}
    answer: dict[str, Any] = server.handle_completions(request)
    first = answer["choices"][0]["logprobs"]["content"][0]
    return [(token["id"], token["logprob"]) for token in first["top_logprobs"]]


if __name__ == "__main__":
    model, ids, *adapters = sys.argv[1:]
    said = main(model, json.loads(ids), adapters[0] if adapters else None)
    sys.stdout.write("\n" + json.dumps(said) + "\n")
    sys.stdout.flush()
