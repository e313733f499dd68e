"""`turnout merge`: what it writes, what it refuses, and that it writes all of it or nothing."""

import contextlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file, save_file

from adapters.manifest import AdapterError, BaseShape
from adapters.registry import Registry
from server.base_digest import base_digest
from server.cli import main
from server.default_base import ensure_default_base
from tests.conftest import MakeAdapter
from tests.training.test_merge_oracle import logits, merge, options, peft_over
from training.folder_lock import locked
from training.merge import PROVENANCE_FILE
from training.merge_checkpoint import Writer

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "adapters" / "examples"


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where merges go: alone in a folder, so that what is left over would be seen."""
    return tmp_path / "outputs" / "merged"


def changed(adapter: Path, to: Path, **tensors: float) -> Path:
    """A copy of an adapter folder, its tensors whose names hold a keyword filled with a value."""
    shutil.copytree(adapter, to)
    weights = load_file(to / "adapter_model.safetensors")
    for part, value in tensors.items():
        weights = {
            name: torch.full_like(tensor, value) if part in name else tensor
            for name, tensor in weights.items()
        }
    save_file(weights, to / "adapter_model.safetensors")
    return to


def test_a_sharded_base_with_tied_embeddings_keeps_its_layout(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, out: Path
) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    base = tmp_path / "base"
    model.save_pretrained(base, max_shard_size="100KB")
    adapter = make_adapter(base=base, target_modules="all-linear")

    merge(options(base, adapter, out))

    names = {path.name for path in base.glob("model*")}
    assert len(names) > 3, "several shards and their index"
    assert {path.name for path in out.iterdir()} == names | {
        "config.json",
        "generation_config.json",
        PROVENANCE_FILE,
    }
    index = "model.safetensors.index.json"
    assert (out / index).read_bytes() == (base / index).read_bytes()
    assert "lm_head.weight" not in json.loads((out / index).read_text())["weight_map"]
    merged = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    unmerged = peft_over(base, "original", adapter)
    torch.testing.assert_close(logits(merged), logits(unmerged), atol=2e-4, rtol=0)


def test_the_same_merge_gives_the_same_bytes_wherever_it_is_made(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(use_dora=True)
    moved = tmp_path / "moved"
    shutil.copytree(adapter, moved)
    contents = []
    for place, folder in (("a", adapter), ("b", moved)):
        out = tmp_path / place / "merged"
        merge(options(tiny_base, folder, out, merge_base="dequantized"))
        contents.append({path.name: path.read_bytes() for path in out.iterdir()})
    assert contents[0] == contents[1]


def test_the_provenance_says_what_was_merged_and_how_far_it_drifted(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, out: Path
) -> None:
    digest, store = base_digest(tiny_base), tmp_path / "store"
    base = BaseShape.from_config(tiny_base, "tiny", digest)
    with contextlib.closing(Registry.open(store, base)) as registry:
        revision = registry.push("bot", make_adapter())

    choices = {"merge_base": "dequantized", "base_name": "tiny", "store": store}
    returned = merge(options(tiny_base, "bot", out, **choices))

    found = json.loads((out / PROVENANCE_FILE).read_text())
    assert found == returned
    assert found["format"] == 1
    assert found["kind"] == "merged"
    assert found["base"] == {"name": "tiny", "digest": digest}
    assert found["adapter"] == {"digest": revision.digest, "revision": "bot@1"}
    assert found["merge_base"] == "dequantized"
    assert found["versions"]["torch"] == torch.__version__
    assert set(found["versions"]) == {"bitsandbytes", "peft", "torch", "transformers", "turnout"}
    assert len(found["drift"]) == 5
    assert set(found["drift"][0]) == {
        "probe",
        "num_tokens",
        "mean_kl",
        "max_kl",
        "top1_agreement",
    }


def test_the_adapters_own_chat_template_goes_into_the_output(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, out: Path
) -> None:
    adapter = changed(make_adapter(), tmp_path / "templated")
    (adapter / "turnout.json").write_text(json.dumps({"format": 1, "chat_template": "MINE"}))
    merge(options(tiny_base, adapter, out))
    assert (out / "chat_template.jinja").read_text() == "MINE"


@pytest.mark.parametrize("merge_base", ["nf4", "int4", "4bit"])
def test_merging_into_four_bits_is_refused_with_the_reason(
    merge_base: str, tiny_base: Path, out: Path
) -> None:
    with pytest.raises(ValueError, match=r"original or dequantized; .*half a step.*would erase it"):
        options(tiny_base, "any", out, merge_base=merge_base)


def test_an_unknown_merge_base_is_refused_by_name(tiny_base: Path, out: Path) -> None:
    with pytest.raises(ValueError, match=r"--merge-base is 'auto'; .*dequantized$"):
        options(tiny_base, "any", out, merge_base="auto")


def test_a_quantized_base_is_refused_before_its_weights_are_read(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, out: Path
) -> None:
    base = tmp_path / "quantized"
    shutil.copytree(tiny_base, base)
    config = json.loads((base / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (base / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"quantized already \(bitsandbytes\).*would erase it"):
        merge(options(base, make_adapter(), out))
    assert not out.parent.exists()


def test_an_output_that_exists_is_refused_and_stays_as_it_is(
    tiny_base: Path, tmp_path: Path
) -> None:
    folder, file, link = (tmp_path / name for name in ("folder", "file", "link"))
    folder.mkdir()
    file.write_text("mine")
    link.symlink_to(tmp_path / "nowhere")
    for taken in (folder, file, link):
        with pytest.raises(ValueError, match="which exists"):
            options(tiny_base, "any", taken)
    assert file.read_text() == "mine"


def test_an_output_that_appears_during_the_merge_is_not_replaced(
    tiny_base: Path, make_adapter: MakeAdapter, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = Writer.finish

    def finish_late(writer: Writer) -> None:
        finish(writer)
        out.mkdir()

    monkeypatch.setattr(Writer, "finish", finish_late)
    with pytest.raises(ValueError, match="exists by now"):
        merge(options(tiny_base, make_adapter(), out))
    assert list(out.parent.iterdir()) == [out]
    assert list(out.iterdir()) == []


def test_nan_or_inf_in_the_sum_is_refused_by_tensor_and_leaves_nothing(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, out: Path
) -> None:
    base = tmp_path / "fp16"
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.float16)
    model.save_pretrained(base)
    adapter = changed(make_adapter(base=base), tmp_path / "huge", lora_A=300.0, lora_B=300.0)
    with pytest.raises(ValueError, match=r"layers\.0.*_proj.* would hold NaN or Inf in F16"):
        merge(options(base, adapter, out))
    assert list(out.parent.iterdir()) == []


@pytest.mark.parametrize("moment", ["write", "copy", "finish", "close"])
def test_an_interrupted_merge_leaves_nothing(
    moment: str,
    tiny_base: Path,
    make_adapter: MakeAdapter,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupt(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Writer, moment, interrupt)
    with pytest.raises(KeyboardInterrupt):
        merge(options(tiny_base, make_adapter(), out))
    assert list(out.parent.iterdir()) == []


@pytest.mark.slow
def test_what_a_killed_merge_left_goes_with_the_next_one(
    tiny_base: Path, make_adapter: MakeAdapter, out: Path
) -> None:
    program = (
        "import os, sys\n"
        "from tests.training.test_merge import Path, Writer, merge, options\n"
        "Writer.finish = lambda writer: os.kill(os.getpid(), 9)\n"
        "merge(options(*map(Path, sys.argv[1:])))\n"
    )
    adapter = make_adapter()
    command = [sys.executable, "-c", program, *map(str, (tiny_base, adapter, out))]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    (left,) = out.parent.iterdir()
    assert (left / "checkpoint" / "model.safetensors").stat().st_size > 0
    merge(options(tiny_base, adapter, out))
    assert list(out.parent.iterdir()) == [out]


def test_what_a_killed_merge_left_is_no_part_of_the_next_one_not_even_of_a_failed_one(
    tiny_base: Path, make_adapter: MakeAdapter, out: Path
) -> None:
    left = out.parent / ".merged-merging"

    def leave() -> None:
        (left / "checkpoint").mkdir(parents=True)
        (left / "checkpoint" / "model-00001-of-00002.safetensors").write_bytes(bytes(1000))
        (left / "file").touch()

    leave()
    with pytest.raises(AdapterError, match="bias"):
        merge(options(tiny_base, make_adapter(bias="all"), out))
    assert list(out.parent.iterdir()) == []
    leave()
    merge(options(tiny_base, make_adapter(), out))
    assert list(out.parent.iterdir()) == [out]
    assert "model-00001-of-00002.safetensors" not in {path.name for path in out.iterdir()}


def test_two_merges_into_one_folder_do_not_meet(
    tiny_base: Path, make_adapter: MakeAdapter, out: Path
) -> None:
    left = out.parent / ".merged-merging"
    with locked(left):
        (left / "theirs").touch()
        with pytest.raises(ValueError, match=r"another process is at work in .*\.merged-merging"):
            merge(options(tiny_base, make_adapter(), out))
        assert (left / "theirs").exists()
    beside = out.parent / ".merged-2-merging"  # of another --out
    beside.mkdir()
    merge(options(tiny_base, make_adapter(), out))
    assert sorted(out.parent.iterdir()) == [beside, out]


def test_an_adapter_that_does_not_fit_leaves_nothing(
    tiny_base: Path, make_adapter: MakeAdapter, out: Path
) -> None:
    with pytest.raises(AdapterError, match="bias: trained biases are not served"):
        merge(options(tiny_base, make_adapter(bias="all"), out))
    assert list(out.parent.iterdir()) == []


def test_a_base_without_one_of_its_linears_is_refused(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, out: Path
) -> None:
    adapter, base = make_adapter(), tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.down_proj.weight"
    whole = weights.pop(name)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj\.weight is missing"):
        merge(options(base, adapter, out, allow_other_base=True))
    weights[name] = whole[:-1].contiguous()
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"down_proj has shape \[63, 128\], not \[64, 128\]"):
        merge(options(base, adapter, out, allow_other_base=True))


@pytest.mark.parametrize(
    "name",
    [
        "model.norm.weight",
        "model.embed_tokens.weight",
        "model.layers.1.input_layernorm.weight",
        "model.layers.0.post_attention_layernorm.weight",
    ],
)
def test_a_base_without_an_embedding_or_a_norm_is_refused(
    name: str, tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, out: Path
) -> None:
    adapter, base = make_adapter(), tmp_path / "base"
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    del weights[name]
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"tensor {name} is missing"):
        merge(options(base, adapter, out, allow_other_base=True))


def test_a_disk_that_is_too_small_is_told_before_anything_is_written(
    tiny_base: Path, make_adapter: MakeAdapter, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match=r"needs \d+ bytes; .* has 1000"):
        merge(options(tiny_base, make_adapter(), out))


def test_a_probe_file_that_is_not_there_is_refused_at_once(tiny_base: Path, out: Path) -> None:
    with pytest.raises(ValueError, match="must be a text file"):
        options(tiny_base, "any", out, probe=out.parent / "none.txt")


def test_the_command_merges_and_prints_the_drift(
    tiny_base: Path, make_adapter: MakeAdapter, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["merge", "--adapter", str(make_adapter()), "--base", str(tiny_base)]
    command += ["--merge-base", "dequantized", "--out", str(out), "--device", "cpu"]

    with pytest.raises(SystemExit) as exit_:
        main(command)

    assert exit_.value.code == 0
    printed = capsys.readouterr().out
    for text in ("Mean KL", "random tokens 3", "all", "128", "100.00%", "dequantized base"):
        assert text in printed
    assert json.loads((out / PROVENANCE_FILE).read_text())["merge_base"] == "dequantized"

    with pytest.raises(SystemExit) as exit_:
        main(command)
    assert exit_.value.code == 1
    assert "which exists" in capsys.readouterr().err


def test_an_error_is_one_line_and_nothing_else(tiny_base: Path, out: Path) -> None:
    program = "from server.cli import main; main()"
    command = [sys.executable, "-c", program, "merge", "--adapter", "any", "--out", str(out)]
    command += ["--base", str(tiny_base), "--merge-base", "nf4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert len(done.stderr.splitlines()) == 1, done.stderr


def test_the_command_refuses_an_option_before_it_reads_the_base(
    tiny_base: Path,
    out: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "server.training_cli.base_digest", lambda folder: pytest.fail("it was read")
    )
    command = ["merge", "--adapter", "any", "--base", str(tiny_base), "--out", str(out)]
    with pytest.raises(SystemExit) as exit_:
        main([*command, "--merge-base", "nf4"])
    assert exit_.value.code == 1
    assert "would erase it" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["gpu", "cuda:1", "meta"])
def test_an_unknown_device_is_refused_by_name(device: str, tiny_base: Path, out: Path) -> None:
    with pytest.raises(ValueError, match=f"--device is '{device}'; it must be auto, cuda or cpu"):
        options(tiny_base, "any", out, device=device)


def test_a_gpu_that_is_not_there_is_told(
    tiny_base: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="torch finds no GPU here"):
        options(tiny_base, "any", out, device="cuda")


def test_buffers_of_old_checkpoints_are_copied(
    tiny_base: Path, make_adapter: MakeAdapter, tmp_path: Path, out: Path
) -> None:
    base, adapter = tmp_path / "base", make_adapter()
    shutil.copytree(tiny_base, base)
    weights = load_file(base / "model.safetensors")
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    weights[name] = torch.rand(8)
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    found = merge(options(base, adapter, out, allow_other_base=True))
    assert torch.equal(load_file(out / "model.safetensors")[name], weights[name])
    assert found["drift"][-1]["max_kl"] < 1e-6


def test_a_terminal_sees_how_far_the_merge_is(
    tiny_base: Path, make_adapter: MakeAdapter, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    merge(options(tiny_base, make_adapter(), out), Console(force_terminal=True))
    assert "Merging" in capsys.readouterr().out


def random_base(folder: Path, num_layers: int) -> Path:
    """A bf16 Mistral of 8.4 MB a layer, without a model being built."""
    hidden, intermediate, vocab = 512, 2048, 4096
    folder.mkdir()
    config = transformers.MistralConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=num_layers,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
        tie_word_embeddings=True,
        architectures=["MistralForCausalLM"],
    )
    config.save_pretrained(folder)
    shapes = {"model.embed_tokens": (vocab, hidden), "model.norm": (hidden,)}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            shapes[f"{prefix}.self_attn.{name}"] = (hidden, hidden)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{prefix}.mlp.{name}"] = (intermediate, hidden)
        shapes[f"{prefix}.mlp.down_proj"] = (hidden, intermediate)
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{name}"] = (hidden,)
    tensors = {
        f"{name}.weight": torch.rand(shape, dtype=torch.bfloat16) * 0.1 - 0.05
        for name, shape in shapes.items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def random_adapter(folder: Path, num_layers: int) -> Path:
    """DoRA, the costliest kind, on one linear of every layer."""
    folder.mkdir()
    tensors = {}
    for layer in range(num_layers):
        prefix = f"base_model.model.model.layers.{layer}.mlp.up_proj"
        tensors[f"{prefix}.lora_A.weight"] = torch.randn(8, 512) * 0.01
        tensors[f"{prefix}.lora_B.weight"] = torch.randn(2048, 8) * 0.01
        tensors[f"{prefix}.lora_magnitude_vector"] = torch.ones(2048)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 8, "target_modules": ["up_proj"], "use_dora": True}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


MEASURE = """
import sys
from pathlib import Path
from rich.console import Console
from training.merge import MergeOptions, merge

def status(field):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024

base, adapter, out = sys.argv[1:]
options = MergeOptions(adapter=adapter, base=Path(base), base_name="b",
                       merge_base="dequantized", out=Path(out), store=Path(out), device="cpu")
Path("/proc/self/clear_refs").write_text("5")  # forget the peak of the imports
before = status("VmRSS")
merge(options, "0" * 64, Console(quiet=True))
print(status("VmHWM") - before)
"""


def peak_growth(base: Path, adapter: Path, out: Path) -> int:
    """Bytes by which a merge's process grows at most, beyond its imports."""
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(base), str(adapter), str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


@pytest.mark.slow
def test_memory_is_bounded_by_a_layer_and_not_by_the_model(tmp_path: Path) -> None:
    growths = {}
    for num_layers in (6, 48):
        base = random_base(tmp_path / f"base-{num_layers}", num_layers)
        adapter = random_adapter(tmp_path / f"adapter-{num_layers}", num_layers)
        growths[num_layers] = peak_growth(base, adapter, tmp_path / f"out-{num_layers}")
    checkpoint_bytes = (tmp_path / "base-48" / "model.safetensors").stat().st_size
    assert checkpoint_bytes > 400e6
    assert growths[48] < checkpoint_bytes / 2
    assert growths[48] < growths[6] + checkpoint_bytes / 8, "eight times the layers, the same peak"


@pytest.mark.slow
@pytest.mark.parametrize("merge_base", ["original", "dequantized"])
def test_the_merged_json_example_still_answers_in_json(merge_base: str, tmp_path: Path) -> None:
    base, out = ensure_default_base(), tmp_path / "merged"

    found = merge(options(base, EXAMPLES / "json", out, merge_base=merge_base))

    assert found["drift"][-1]["mean_kl"] < 5e-3
    assert found["drift"][-1]["top1_agreement"] > 0.95
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(out)
    model = transformers.AutoModelForCausalLM.from_pretrained(out).eval()
    turns = [{"role": "user", "content": "What is the capital of Italy?"}]
    ids = tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        reply = model.generate(**ids, max_new_tokens=60, do_sample=False)[0]
    text = tokenizer.decode(reply[ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert set(json.loads(text)) == {"answer", "topic"}
