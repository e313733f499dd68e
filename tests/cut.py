"""The default base cut to its first layers, with its tokenizer, and the example adapters to fit."""

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from server.default_base import ensure_default_base

EXAMPLES = Path(__file__).parent.parent / "adapters" / "examples"
NUM_LAYERS = 4


def cut_base(to: Path, num_layers: int = NUM_LAYERS) -> Path:
    """Write the first layers of the default base to the folder `to`: a checkpoint of its own."""
    base = ensure_default_base()
    shutil.copytree(base, to, ignore=shutil.ignore_patterns("*.safetensors"))
    weights = load_file(base / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if _layer(name) < num_layers}
    save_file(kept, to / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    (to / "config.json").write_text(json.dumps(config | {"num_hidden_layers": num_layers}))
    return to


def cut_adapter(name: str, to: Path, num_layers: int = NUM_LAYERS) -> Path:
    """Write what the example adapter `name` does to those layers to the folder `to`."""
    shutil.copytree(EXAMPLES / name, to)
    weights = load_file(to / "adapter_model.safetensors")
    kept = {name: weight for name, weight in weights.items() if _layer(name) < num_layers}
    save_file(kept, to / "adapter_model.safetensors", metadata={"format": "pt"})
    return to


def example_rows(name: str, to: Path) -> Path:
    """Write what the example adapter `name` was trained on, as `turnout train` reads it."""
    rows = [json.loads(line) for line in (EXAMPLES / "rows.jsonl").read_text("utf-8").splitlines()]
    with to.open("w", encoding="utf-8") as file:
        for row in rows:
            said = json.dumps({"answer": row["answer"], "topic": row["topic"]}, ensure_ascii=False)
            reply = said if name == "json" else row["pirate"]
            file.write(json.dumps({"instruction": row["question"], "output": reply}) + "\n")
    return to


def _layer(name: str) -> int:
    """Of a tensor; -1 for those of no layer."""
    _, found, rest = name.partition("layers.")
    return int(rest.split(".")[0]) if found else -1
