"""Runs GPTQModel or auto-round, in the interpreter that has it: `python -P quantize_worker.py JOB`.

It imports nothing of Turnout's, so that it runs where Turnout is not installed. JOB is a JSON file,
training/quantize_run.py writes it. A line of JSON on stdout for each thing that happens; what the
libraries print goes to stderr. It ends when its stdin does: it never outlives who started it.
"""

import importlib
import importlib.metadata
import itertools
import json
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

Say = Callable[..., None]
_ROW = 256  # tokens
_LAYERS_PER_CHECKPOINT = 4  # on a GPU: writing one takes longer there than a layer
_VERSIONS = ("gptqmodel", "auto-round", "torch", "transformers", "numpy")


def gptq(job: dict[str, Any], say: Say) -> None:
    """GPTQ (arXiv:2210.17323), layer by layer; what a killed run finished is not done again."""
    library = importlib.import_module("gptqmodel")
    on_gpu = job["device"] == "cuda"
    config = importlib.import_module("gptqmodel.quantization.config").GPTQConfig(
        bits=4,
        group_size=job["group_size"],
        sym=True,
        desc_act=job["desc_act"],
        act_group_aware=not job["desc_act"],  # inputs in order of weight, groups where they are
        # On a CPU the faster one is compiled on first use, with a C++ compiler.
        pack_impl="gpu" if on_gpu else "original",
        auto_forward_data_parallel=False,
    )
    store = importlib.import_module("gptqmodel.looper.checkpoint_store")
    model = library.GPTQModel.load(job["model"], config, device=job["device"])
    model.layer_callback = _Layers(job["num_layers"], say)
    samples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in job["samples"]]
    log = model.quantize(
        samples,
        batch_size=job["batch_size"],
        calibration_sort="desc",  # of like length in a batch, to pad less
        calibration_data_min_length=1,
        checkpoint=store.CheckpointConfig(
            path=job["checkpoints"], interval=f"layer:{_LAYERS_PER_CHECKPOINT if on_gpu else 1}"
        ),
    )
    say("errors", rows=[_error(row) for row in itertools.chain(*log.values())])
    model.save(job["out"])


def auto_round(job: dict[str, Any], say: Say) -> None:
    """auto-round (arXiv:2309.05516): learned rounding, in the layout of GPTQ or of AWQ."""
    _count_layers(job["num_layers"], say)
    library = importlib.import_module("auto_round")
    torch, transformers = map(importlib.import_module, ("torch", "transformers"))
    model = transformers.AutoModelForCausalLM.from_pretrained(job["model"], dtype="auto")
    tokenizer = transformers.AutoTokenizer.from_pretrained(job["model"])
    # It takes rows of one length alone, so documents are put end to end.
    ids = [token for sample in job["samples"] for token in sample]
    length = min(_ROW, len(ids))
    rows = [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)]
    rounder = library.AutoRound(
        model,
        tokenizer,
        bits=4,
        group_size=job["group_size"],
        sym=job["kind"] == "gptq",
        iters=job["iterations"],
        dataset=torch.utils.data.DataLoader([{"input_ids": torch.tensor(row)} for row in rows]),
        seqlen=length,
        nsamples=len(rows),
        batch_size=min(8, len(rows)),
        seed=job["seed"],
        device_map=job["device"],
        enable_torch_compile=False,
    )
    parts = Path(f"{job['out']}-parts")
    rounder.quantize_and_save(str(parts), format=f"auto_{job['kind']}")
    (config,) = parts.rglob("config.json")  # it makes a folder in there, named as it likes
    config.parent.rename(job["out"])


class _Layers:
    """GPTQModel calls it twice a layer: when it is quantized, and when it is packed too.

    A thread of its own waits for each layer's packing, so one may be told of after the next.
    """

    def __init__(self, num_layers: int, say: Say) -> None:
        self._num_layers, self._say = num_layers, say
        self._done, self._telling = 0, threading.Lock()

    def layer_complete(self, layer_idx: int, submodule_finalized: bool) -> None:
        """Say that a layer is done, unless a later one is."""
        with self._telling:
            if submodule_finalized and layer_idx >= self._done:
                self._done = layer_idx + 1
                self._say("layer", done=self._done, of=self._num_layers)


def _count_layers(num_layers: int, say: Say) -> None:
    """Have auto-round's own progress bar tell of layers: the one with as many steps."""
    bars = importlib.import_module("tqdm").tqdm
    update = bars.update

    def update_and_say(bar: Any, count: float = 1) -> Any:
        shown = update(bar, count)
        if bar.total == num_layers:
            say("layer", done=int(bar.n), of=num_layers)
        return shown

    bars.update = update_and_say


def _error(row: dict[str, Any]) -> dict[str, Any]:
    """One linear's share of GPTQModel's log; it counts in strings."""
    try:
        error: float | None = float(row["loss"])
    except ValueError:  # words, where the linear was rounded without a Hessian
        error = None
    return {
        "layer": int(row["layer"]),
        "linear": row["module"],
        "error": error,
        "seconds": float(row.get("time") or 0),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _end_with_stdin() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


def main(path: str) -> None:
    """Do the job in the file at `path`."""
    # Or GPTQModel has no worker thread on machines of one or two cores, and crashes.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    said = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever prints to stdout from here on
    threading.Thread(target=_end_with_stdin, daemon=True).start()

    def say(event: str, **fields: Any) -> None:
        said.write(json.dumps({"event": event, **fields}) + "\n")
        said.flush()

    job = json.loads(Path(path).read_text(encoding="utf-8"))
    if job["device"] == "auto":
        has_gpu = importlib.import_module("torch").cuda.is_available()
        job["device"] = "cuda" if has_gpu else "cpu"
    say("started", device=job["device"], versions=_versions())
    {"gptqmodel": gptq, "auto-round": auto_round}[job["backend"]](job, say)
    say("done")
    os._exit(0)  # the libraries' threads and atexit hooks have nothing left to do


if __name__ == "__main__":
    main(sys.argv[1])
