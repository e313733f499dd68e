"""One promotion, from its folder to a registered artifact: `python -m training.promote FOLDER`.

The server starts it, follows its state file and may kill it at any point; what finished stages
left is not done again when it is started anew. docs/promotion.md tells an operator all of it.
"""

import os
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import torch

from adapters.promotions import JobFolder, PromotionRequest
from training.artifact import ArtifactReport, GateFailed, Progress, make_artifact
from training.gate import Thresholds
from training.promotion_job import Job, Listener, Refused, step_aside

_GPU_POLL_S = 2.0
_GIB = 1 << 30


def make(request: PromotionRequest, out: Path, work: Path, listener: Listener) -> ArtifactReport:
    """Merge, quantize and gate what the request says. Raises Refused."""
    try:
        changed = request.changed_files()
    except OSError as error:
        raise Refused(str(error)) from error
    if changed:
        raise Refused(f"{changed[0]} has changed since the promotion began; promote again")
    if request.device == "cuda":
        wait_for_gpu(gpu_bytes(Path(request.base)), request.wait_gpu_s, listener)

    def on_progress(progress: Progress) -> None:
        listener.on_progress(progress.stage, progress.total, progress.note)

    try:
        return make_artifact(
            request.revision,
            Path(request.base),
            out,
            base_name=request.base_name,
            base_digest=request.base_digest,
            store=Path(request.store),
            work=work,
            merge_base=request.merge_base,
            group_size=request.group_size,
            rows=None if request.rows is None else Path(request.rows),
            eval_rows=None if request.eval_rows is None else Path(request.eval_rows),
            text=None if request.text is None else Path(request.text),
            num_tokens=request.num_tokens,
            gate=Thresholds.from_settings(request.gate),
            seed=request.seed,
            device=request.device,
            backend=request.backend,
            allow_other_base=request.allow_other_base,
            on_progress=on_progress,
        )
    except GateFailed as failed:
        raise Refused(str(failed.report["message"]), {"gate": failed.report}) from failed
    except (ValueError, OSError, MemoryError, torch.OutOfMemoryError) as error:
        raise Refused(str(error) or type(error).__name__) from error


def wait_for_gpu(num_bytes: int, limit_s: float, listener: Listener) -> None:
    """Say what the GPU must have room for, and wait for it up to `limit_s`. Raises Refused."""
    if not torch.cuda.is_available():
        raise Refused("device is cuda, and torch finds no GPU here")
    deadline = time.monotonic() + limit_s
    while (free := torch.cuda.mem_get_info()[0]) < num_bytes:
        room = f"{num_bytes / _GIB:.1f} GiB of GPU memory; {free / _GIB:.1f} are free"
        if time.monotonic() >= deadline:
            raise Refused(f"needs {room}, and waited {limit_s:.0f} s; let it run on the CPU")
        listener.on_wait(f"waiting for {room}")
        time.sleep(_GPU_POLL_S)
    listener.on_wait(f"takes {num_bytes / _GIB:.1f} GiB of GPU memory")


def gpu_bytes(base: Path) -> int:
    """GPU memory that merging and quantizing one layer after another takes.

    One layer in fp32 with its Hessians (fp32 [in, in] of each input width), the calibration
    tokens' activations, embeddings and head in 16 bits, and a CUDA context.
    """
    config = msgspec.json.decode((base / "config.json").read_bytes(), type=dict[str, Any])
    hidden, intermediate = int(config["hidden_size"]), int(config["intermediate_size"])
    layer = (4 * hidden * hidden + 3 * hidden * intermediate) * 4
    hessians = (hidden * hidden + intermediate * intermediate) * 4 * 2
    activations = 2 * 64 * 512 * hidden * 4
    ends = 2 * int(config["vocab_size"]) * hidden * 2
    return layer * 2 + hessians + activations + ends + _GIB


def main(args: list[str]) -> int:
    """Run the promotion in the folder that is named; 1 if it failed."""
    step_aside()
    folder = JobFolder(Path(args[0]))
    folder.write_process(os.getpid())
    state = Job(folder, make).run()
    return 0 if state.status == "done" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
