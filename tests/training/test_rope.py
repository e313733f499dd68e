"""RoPE scaling from the settings to the model that is trained, and to the folder that is served."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from rich.console import Console

from adapters.manifest import BaseShape
from adapters.registry import Registry
from adapters.rope import RopeScaling
from server.base_digest import base_digest
from server.base_text import CheckpointText
from tests.training.conftest import MakeConfig
from training import run
from training.qlora import load_base
from training.rope import apply_scaling, run_scaling

CPU = torch.device("cpu")
LINEAR = {"type": "linear", "factor": 4}
YARN = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128}


def test_without_the_setting_the_bases_own_embedding_is_trained(
    make: MakeConfig, chat_base: Path
) -> None:
    assert run_scaling(make()) is None
    model = load_base(chat_base, "none", torch.float32, CPU)
    rotary = model.model.rotary_emb
    apply_scaling(model, None)
    assert model.model.rotary_emb is rotary


def test_yarn_stretches_the_bases_length_unless_another_is_named(make: MakeConfig) -> None:
    found = run_scaling(make(rope_scaling={"type": "yarn", "factor": 2}))
    assert found is not None
    assert found.original_max_position_embeddings == 512
    named = run_scaling(make(rope_scaling=YARN))
    assert named is not None
    assert named.original_max_position_embeddings == 128


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ({"type": "dynamic", "factor": 2}, r"rope_scaling\.rope_type: 'dynamic' is not served"),
        ({"type": "linear"}, r"rope_scaling\.factor: None is not a number"),
        ({"type": "linear", "factor": 0.5}, r"rope_scaling\.factor: 0\.5 is not a number of 1"),
        ({**LINEAR, "rope_theta": 1e6}, r"rope_scaling\.rope_theta: 1000000\.0 is not the base's"),
    ],
)
def test_what_could_not_be_served_is_refused_before_anything_is_loaded(
    make: MakeConfig, setting: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValueError, match=complaint):
        run.prepare(make(rope_scaling=setting))


def test_a_setting_that_is_no_mapping_and_a_scaled_base_are_refused(
    make: MakeConfig, tmp_path: Path, chat_base: Path
) -> None:
    with pytest.raises(ValueError, match="rope_scaling is 'linear'"):
        make(rope_scaling="linear")
    config = json.loads((chat_base / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="the base itself has linear scaling"):
        run_scaling(make(base=tmp_path, rope_scaling=LINEAR))


@pytest.mark.parametrize("setting", [LINEAR, YARN])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_model_computes_what_transformers_does_with_that_config(
    make: MakeConfig, chat_base: Path, setting: dict[str, Any], dtype: torch.dtype
) -> None:
    scaling = run_scaling(make(rope_scaling=setting))
    assert scaling is not None
    config = transformers.AutoConfig.from_pretrained(chat_base)
    config.rope_parameters = {
        "rope_type": setting.get("type", "yarn"),
        "rope_theta": 10000.0,
        **{name: value for name, value in setting.items() if name != "type"},
    }
    expected: Any = transformers.AutoModelForCausalLM.from_pretrained(
        chat_base, config=config, dtype=dtype
    )
    model = load_base(chat_base, "none", dtype, CPU)
    ids = torch.arange(3, 83).view(1, -1)
    with torch.no_grad():
        unscaled = model(ids).logits
        apply_scaling(model, scaling)
        scaled = model(ids).logits
        assert torch.equal(scaled, expected(ids).logits)
    assert not torch.allclose(scaled, unscaled, atol=1e-3)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_run_leaves_a_folder_that_is_registered_with_its_scaling(
    make: MakeConfig, tmp_path: Path
) -> None:
    config = make(rope_scaling=YARN, max_steps=1, eval_fraction=0)
    prepared = run.prepare(config)
    seen = io.StringIO()
    run.show(prepared, Console(file=seen, width=120))
    assert "yarn, factor 2 over 128 positions" in seen.getvalue()
    digest = base_digest(config.base)
    run.train(prepared, digest, Console(file=io.StringIO()), resume=False, overwrite=False)

    notes = json.loads((config.out / "turnout.json").read_text())
    assert RopeScaling.read(notes["rope"], theta=10000.0) == prepared.plan.rope
    assert "| RoPE | yarn, factor 2 over 128 positions |" in (config.out / "README.md").read_text()
    text = CheckpointText(config.base)
    shape = BaseShape.from_config(config.base, "chat-base", digest, text=text)
    registry = Registry.open(tmp_path / "store", shape)
    revision = registry.push("mine", config.out)
    registry.close()
    assert revision.rope == prepared.plan.rope
    assert revision.source["mismatches"] == {}
