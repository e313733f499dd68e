"""Every kind of adapter, merged: PEFT's own merge, PEFT's logits, our engine's tokens."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from rich.console import Console
from safetensors.torch import load_file

from server.base_digest import base_digest
from server.config import AdapterConfig, CacheConfig, Config, ModelConfig
from server.quant import nf4
from tests.conftest import MakeAdapter
from tests.server.engine.conftest import Harness
from tests.server.engine.test_oracle import ALL, KINDS
from training import merge as merge_module
from training.merge import MergeOptions

# All of PEFT's switches together, and a mean one: a magnitude on a subset, by regex.
MIXED: dict[str, dict[str, Any]] = {
    "dora with patterns": {
        "target_modules": ALL,
        "use_dora": True,
        "use_rslora": True,
        "r": 4,
        "rank_pattern": {"down_proj": 7, r"layers\.1\.self_attn\.q_proj": 3},
        "alpha_pattern": {"v_proj": 3},
    },
    "dora on a subset": {"target_modules": r".*\.1\..*(gate|o)_proj", "use_dora": True},
}
EVERY_KIND = {**KINDS, **MIXED}
MERGE_BASES = ("original", "dequantized")
WEIGHT_TOLERANCE = 2e-6  # fp32: weights of about 1, sums over at most 16 ranks in another order
LOGIT_TOLERANCE = 2e-4  # fp32 over 2 layers, logits of about 10
PROMPT = [5, 9, 200, 31, 77, 8, 120, 64, 3, 250]


def options(base: Path, adapter: Path | str, out: Path, **changes: Any) -> MergeOptions:
    """A merge of `adapter` into `base` at `out`, on the CPU."""
    fields: dict[str, Any] = {
        "adapter": str(adapter),
        "base": base,
        "base_name": base.name,
        "merge_base": "original",
        "out": out,
        "store": out.parent / "store",
        "device": "cpu",
    }
    return MergeOptions(**{**fields, **changes})


def merge(options: MergeOptions, console: Console | None = None) -> dict[str, Any]:
    """Merge; say nothing unless to a console that is given."""
    return merge_module.merge(options, base_digest(options.base), console or quiet())


def quiet() -> Console:
    """A console that nobody reads."""
    return Console(quiet=True)


def peft_over(base: Path, merge_base: str, adapter: Path) -> peft.PeftModel:
    """transformers + PEFT in fp32 over the base's own values, or over NF4's."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if merge_base == "dequantized":
        stored = load_file(base / "model.safetensors")
        for name, module in model.named_modules():
            if isinstance(module, torch.nn.Linear) and name != "lm_head":
                quantized = nf4.quantize(stored[f"{name}.weight"])
                module.weight.data = quantized.dequantize(torch.float32)
    with warnings.catch_warnings(action="ignore"):
        return peft.PeftModel.from_pretrained(model, str(adapter)).eval()


@torch.inference_mode()
def logits(model: Any) -> torch.Tensor:
    """[num_tokens, vocab] after each token of PROMPT."""
    found: torch.Tensor = model(torch.tensor([PROMPT])).logits[0]
    return found


@pytest.fixture(scope="module")
def kinds(make_adapter: MakeAdapter) -> dict[str, Path]:
    return {name: make_adapter(seed=i, **kind) for i, (name, kind) in enumerate(EVERY_KIND.items())}


@pytest.fixture(scope="module")
def adapter_path(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Harness]:
    """Our engine over the unquantized base, for the adapter path."""
    harness = engine(tiny_base, tmp_path_factory.mktemp("adapter-path"))
    yield harness
    harness.close()


def engine(base: Path, store: Path) -> Harness:
    """Our engine over an unquantized checkpoint in fp32."""
    model = ModelConfig(path=base, quantization="none", dtype="float32")
    cache = CacheConfig(num_blocks=32)
    return Harness(Config(model=model, cache=cache, adapters=AdapterConfig(store=store)))


@pytest.mark.parametrize("merge_base", MERGE_BASES)
@pytest.mark.parametrize("kind", EVERY_KIND)
def test_merged_weights_and_logits_are_pefts(
    kind: str, merge_base: str, kinds: dict[str, Path], tiny_base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "merged"

    provenance = merge(options(tiny_base, kinds[kind], out, merge_base=merge_base))

    oracle = peft_over(tiny_base, merge_base, kinds[kind])
    unmerged = logits(oracle)
    expected = oracle.merge_and_unload().state_dict()
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=WEIGHT_TOLERANCE, rtol=1e-5)
    model = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    torch.testing.assert_close(logits(model), unmerged, atol=LOGIT_TOLERANCE, rtol=0)
    assert provenance["drift"][-1]["max_kl"] < 1e-6  # an fp32 base loses nothing in the cast
    assert provenance["drift"][-1]["top1_agreement"] == 1


@pytest.mark.parametrize("kind", EVERY_KIND)
def test_our_engine_answers_through_both_paths_with_the_same_tokens(
    kind: str, kinds: dict[str, Path], tiny_base: Path, adapter_path: Harness, tmp_path: Path
) -> None:
    expected = adapter_path.generate(PROMPT, adapter_path.push(kinds[kind]))
    assert expected != adapter_path.generate(PROMPT), "the adapter must matter"

    merge(options(tiny_base, kinds[kind], tmp_path / "merged"))

    merged_path = engine(tmp_path / "merged", tmp_path / "store")
    assert merged_path.generate(PROMPT) == expected
    merged_path.close()


@pytest.mark.parametrize("merge_base", MERGE_BASES)
@pytest.mark.parametrize("kind", ["half precision", "dora"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_base_is_added_to_in_fp32_and_rounded_once(
    dtype: torch.dtype,
    kind: str,
    merge_base: str,
    kinds: dict[str, Path],
    tiny_base: Path,
    tmp_path: Path,
) -> None:
    base = tmp_path / "base16"
    transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=dtype).save_pretrained(base)
    choices = {"merge_base": merge_base, "allow_other_base": True}

    merge(options(base, kinds[kind], tmp_path / "merged", **choices))

    exact = peft_over(base, merge_base, kinds[kind]).merge_and_unload().state_dict()
    for name, tensor in load_file(tmp_path / "merged" / "model.safetensors").items():
        assert tensor.dtype == dtype
        # another order of fp32 sums may tip one weight in ten thousand to its neighbour, no more
        differs = tensor != exact[name].to(dtype)
        assert differs.float().mean() < 1e-3, name
        torch.testing.assert_close(tensor.float(), exact[name], atol=1e-6, rtol=2**-7)


def test_an_untouched_base_is_what_the_engine_serves_in_nf4(
    make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    adapter = make_adapter(target_modules=["q_proj"], layers_to_transform=[0])
    out = tmp_path / "merged"

    merge(options(tiny_base, adapter, out, merge_base="dequantized"))

    stored, found = (load_file(folder / "model.safetensors") for folder in (tiny_base, out))
    served = nf4.quantize(stored["model.layers.1.mlp.up_proj.weight"]).dequantize(torch.float32)
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], served)
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"):
        assert torch.equal(found[name], stored[name])
