"""The real quantizers, on four layers of the default base; `make quantizer` installs them."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from adapters.manifest import BaseShape
from server.base_digest import base_digest
from server.quant.int4 import GPTQFormat, read_format
from tests.cut import cut_adapter, cut_base, example_rows
from tests.training.llama_logprobs import NUM_TOKENS
from tests.training.test_gate import dequantized
from tests.training.test_merge_oracle import merge, options, peft_over, quiet
from training.artifact import ArtifactReport, Progress, make_artifact
from training.calibration import CalibrationOptions, load_calibration
from training.gate import run_gate
from training.gguf_export import export
from training.gguf_lora import export_adapter
from training.merge_adapter import MergeAdapter, open_adapter
from training.quantize import QuantizeOptions, quantize
from training.quantize_run import ROOT, TOOL

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not TOOL.exists(), reason="`make quantizer` was not run"),
]
GATE = {"max_mean_kl": 0.2, "min_top1_agreement": 0.7}  # what is cut off speaks no language
LOAD = """
import os
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
assert "gptqmodel" in type(model.model.layers[0].mlp.up_proj).__module__
with torch.inference_mode():
    logits = model(torch.tensor([json.loads(sys.argv[2])])).logits[0]
torch.save(logits, sys.argv[3])
"""
MAKE = """
import sys
from pathlib import Path
from tests.training.test_quantize_slow import make
make(Path(sys.argv[1]), Path(sys.argv[2]), lambda progress: print(progress.note, flush=True))
"""


@pytest.fixture(scope="session")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the cut base, the cut adapter and its rows."""
    folder = tmp_path_factory.mktemp("cut")
    cut_base(folder / "base")
    cut_adapter("json", folder / "adapter")
    example_rows("json", folder / "rows.jsonl")
    return folder


def make(parts: Path, place: Path, on_progress: Any = lambda progress: None) -> ArtifactReport:
    base = parts / "base"
    return make_artifact(
        str(parts / "adapter"),
        base,
        place / "artifact",
        base_name=base.name,
        base_digest=base_digest(base),
        store=place / "store",
        work=place / "work",
        merge_base="dequantized",
        rows=parts / "rows.jsonl",
        num_tokens=2048,
        gate=GATE,
        device="cpu",
        allow_other_base=True,
        on_progress=on_progress,
    )


@pytest.fixture(scope="session")
def artifact(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> ArtifactReport:
    """The adapter, merged, quantized and gated."""
    return make(parts, tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="session")
def merged(parts: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("merges") / "merged"
    wanted = {"merge_base": "dequantized", "allow_other_base": True}
    merge(options(parts / "base", parts / "adapter", out, **wanted))
    return out


@contextlib.contextmanager
def opened(parts: Path, scratch: Path) -> Iterator[MergeAdapter]:
    base = parts / "base"
    shape = BaseShape.from_config(base, base.name, base_digest(base))
    with open_adapter(
        str(parts / "adapter"), shape, scratch / "store", scratch / "staged", allow_other_base=True
    ) as adapter:
        yield adapter


@pytest.fixture(scope="session")
def prompt(parts: Path) -> list[int]:
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(parts / "base")
    messages = [{"role": "user", "content": "What is the capital of Italy?"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


@torch.inference_mode()
def last_logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    found: torch.Tensor = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    return found


def test_gptq_of_an_adapter_passes_the_gate(artifact: ArtifactReport) -> None:
    made = artifact.provenance["quantized"]
    assert artifact.group_size == 64, "128 does not divide 576"
    assert read_format(artifact.folder) == GPTQFormat(group_size=64), "our engine reads it"
    assert made["versions"]["gptqmodel"]
    assert [len(layer["errors"]) for layer in made["layers"]] == [7] * 4
    errors = [error for layer in made["layers"] for error in layer["errors"].values()]
    assert all(0 < error < 0.1 for error in errors)
    assert made["weight_error"]["max"] < 0.35
    figures = artifact.provenance["gate"]["figures"]
    assert figures["num_rows"] == 22
    assert 1e-4 < figures["mean_kl"] < 0.2


def test_transformers_loads_the_result_and_answers_as_its_codes_say(
    artifact: ArtifactReport, parts: Path, prompt: list[int], tmp_path: Path
) -> None:
    """By GPTQModel's own kernel, over optimum."""
    out = tmp_path / "logits"
    subprocess.run(
        [TOOL, "-c", LOAD, artifact.folder, json.dumps(prompt), out],
        check=True,
        capture_output=True,
        cwd=tmp_path,
    )
    with torch.inference_mode():
        ours = dequantized(artifact.folder, parts / "base")(torch.tensor([prompt])).logits[0]
    # It multiplies in 16 bits; logits are about 10.
    torch.testing.assert_close(torch.load(out), ours, atol=0.4, rtol=0)


def test_a_killed_making_goes_on_after_its_last_layer(
    artifact: ArtifactReport, parts: Path, tmp_path: Path
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", MAKE, parts, tmp_path], stdout=subprocess.PIPE, text=True, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("quantized layer 3"):
                process.kill()
    assert {path.name for path in tmp_path.iterdir()} <= {"work", ".work-adapter"}

    told: list[Progress] = []
    again = make(parts, tmp_path, told.append)

    notes = [each.note for each in told if each.note.startswith("quantized")]
    assert "quantized layer 4 of 4" in notes
    assert "quantized layer 1 of 4" not in notes
    assert again.provenance == artifact.provenance
    weights, expected = (load_file(each.folder / "model.safetensors") for each in (again, artifact))
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize("kind", ["awq", "gptq"])
def test_learned_rounding_of_a_merged_model_answers_as_it(
    kind: str, merged: Path, parts: Path, tmp_path: Path
) -> None:
    """By auto-round, in either layout, and its layers are told of."""
    out = tmp_path / kind
    rows = CalibrationOptions(rows=parts / "rows.jsonl", num_tokens=1024)
    layers: list[tuple[int, int]] = []
    made = quantize(
        QuantizeOptions(
            model=merged, out=out, calibration=rows, kind=kind, backend="auto-round", iterations=12
        ),
        "digest",
        lambda done, of: layers.append((done, of)),
    )
    assert layers == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (made["backend"], made["iterations"]) == ("auto-round", 12)
    assert made["versions"]["auto-round"]
    assert made["weight_error"]["max"] < 0.2
    if kind == "gptq":
        assert read_format(out) == GPTQFormat(group_size=64), "our engine reads it"
    held_out = load_calibration(rows, merged).held_out
    with opened(parts, tmp_path) as adapter:
        figures = run_gate(parts / "base", adapter, out, held_out, device=torch.device("cpu"))
    assert 1e-4 < figures.mean_kl < 0.2
    assert figures.top1_agreement > 0.7


def llama_cpp(model: Path, ids: list[int], *adapter: Path) -> dict[int, float]:
    """The likeliest next tokens that llama.cpp finds, and their log probabilities."""
    script = Path(__file__).with_name("llama_logprobs.py")
    said = subprocess.run(
        [TOOL, "-P", script, model, json.dumps(ids), *adapter],
        check=True,
        capture_output=True,
        text=True,
    )
    return dict(json.loads(said.stdout.splitlines()[-1]))


@pytest.mark.parametrize(("kind", "tolerance"), [("f16", 0.05), ("q8_0", 0.4)])
def test_llama_cpp_answers_as_the_merged_model(
    kind: str, tolerance: float, merged: Path, prompt: list[int], tmp_path: Path
) -> None:
    export(merged, tmp_path / "model.gguf", kind, quiet())
    found = llama_cpp(tmp_path / "model.gguf", prompt)
    model = transformers.AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32).eval()
    expected = last_logprobs(model, prompt)
    assert len(found) == NUM_TOKENS
    for token, value in found.items():
        assert value == pytest.approx(float(expected[token]), abs=tolerance)


def test_llama_cpp_puts_the_adapter_over_the_base(
    parts: Path, prompt: list[int], tmp_path: Path
) -> None:
    export(parts / "base", tmp_path / "base.gguf", "f16", quiet())
    with opened(parts, tmp_path) as adapter:
        export_adapter(adapter, parts / "base", tmp_path / "adapter.gguf")
    plain = llama_cpp(tmp_path / "base.gguf", prompt)
    found = llama_cpp(tmp_path / "base.gguf", prompt, tmp_path / "adapter.gguf")
    expected = last_logprobs(peft_over(parts / "base", "original", parts / "adapter"), prompt)
    for token, value in found.items():
        assert value == pytest.approx(float(expected[token]), abs=0.05)
    assert any(abs(plain.get(token, -99) - value) > 0.5 for token, value in found.items())
