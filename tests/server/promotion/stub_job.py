"""A promotion's process whose stages are stubs: `python stub_job.py FOLDER`.

What it does is in $STUB, as JSON: {"stage_s": seconds of a stage, "fail": a message of the gate,
"hang": the stage in which to hang, "crash": the one in which to exit with code 3}. Each stage
leaves its part in the work folder, with a count of how often it was done.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from adapters.promotions import JobFolder, PromotionRequest, Stage
from training.promotion_job import Job, Listener, Refused

STAGES: tuple[Stage, ...] = ("merge", "quantize", "gate")
STUB: dict[str, Any] = json.loads(os.environ.get("STUB", "{}"))


@dataclass
class Made:
    folder: Path
    adapter_digest: str
    merge_base: str = "dequantized"
    group_size: int = 64
    provenance: dict[str, Any] = field(default_factory=dict)


def make(request: PromotionRequest, out: Path, work: Path, listener: Listener) -> Made:
    done = Made(out, request.adapter_digest, provenance={"gate": {"passed": True}})
    if out.exists():
        return done
    work.mkdir(exist_ok=True)
    (work / f".out-{os.getpid()}").mkdir()  # as a merge that is killed leaves it
    (work.parent / f".work-adapter-{os.getpid()}").mkdir()
    for index, stage in enumerate(STAGES):
        if (work / stage).exists():
            continue
        listener.on_progress(stage, index / 3, f"stub {stage}")
        if STUB.get("crash") == stage:
            sys.exit(3)
        time.sleep(1e3 if STUB.get("hang") == stage else STUB.get("stage_s", 0.0))
        if stage == "gate" and "fail" in STUB:
            raise Refused(STUB["fail"], {"gate": {"passed": False}})
        (work / f"{stage}.new").write_text(request.revision)
        (work / f"{stage}.new").rename(work / stage)
        listener.on_progress(stage, (index + 1) / 3, f"stub {stage} is done")
    half = work / "half"
    half.mkdir(exist_ok=True)
    for stage in STAGES:
        (half / f"{stage}.safetensors").write_text((work / stage).read_text() * 1000)
    (half / "config.json").write_text("{}")
    half.rename(out)
    return done


if __name__ == "__main__":
    folder = JobFolder(Path(sys.argv[1]))
    folder.write_process(os.getpid())
    sys.exit(0 if Job(folder, make).run().status == "done" else 1)
