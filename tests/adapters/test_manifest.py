"""The base's shape, the bank's rows, and the manifest's round trip."""

import json
from pathlib import Path

import msgspec
import pytest
import transformers

from adapters.manifest import (
    AdapterManifest,
    AdapterRefused,
    BaseShape,
    Limits,
    ModuleEntry,
    show,
)


def entry(layer: int, rank: int, *, use_dora: bool = False) -> ModuleEntry:
    return ModuleEntry(layer=layer, linear="mlp.up_proj", rank=rank, scaling=0.1, use_dora=use_dora)


def test_the_shapes_are_those_of_the_checkpoint(tiny_base: Path) -> None:
    model = transformers.MistralForCausalLM.from_pretrained(tiny_base)

    shape = BaseShape.from_config(tiny_base, "tiny", "d", aliases=frozenset({"org/tiny"}))

    assert shape.num_layers == 2
    linears = {
        name: tuple(module.weight.shape)
        for name, module in model.model.layers[0].named_modules()
        if name.endswith("_proj")
    }
    assert shape.linears == linears
    assert [f"model.layers.0.{name}" for name in shape.linears] == list(shape.linear_names)[:7]
    assert shape.rope == {"rope_theta": 10000.0, "rope_type": "default"}
    assert shape.is_called("org/tiny")


def test_an_old_config_and_a_llama_are_read(tmp_path: Path) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "rope_theta": 5e5,
        "rope_scaling": {"type": "linear", "factor": 2.0},
        "_name_or_path": "org/old",
    }
    (tmp_path / "config.json").write_text(json.dumps(config))

    shape = BaseShape.from_config(tmp_path, "old", "d")

    assert shape.linears["self_attn.k_proj"] == (64, 64)
    assert shape.rope == {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    assert shape.is_called("org/old")


def test_a_base_of_another_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')

    with pytest.raises(ValueError, match="model_type is 'gpt2'"):
        BaseShape.from_config(tmp_path, "gpt2", "d")


def test_a_manifest_survives_its_json() -> None:
    manifest = AdapterManifest(
        modules=(entry(0, 4), entry(1, 8)),
        num_parameters=10,
        num_bytes=40,
        rope={"rope_theta": 10000.0},
        chat_template="é{{ x }}",
    )

    assert AdapterManifest.from_json(manifest.to_json()) == manifest
    with pytest.raises(msgspec.ValidationError):
        AdapterManifest.from_json("{}")


def test_equal_manifests_have_equal_json_whatever_the_order_of_their_keys() -> None:
    ropes = ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    texts = {
        AdapterManifest(modules=(entry(0, 1),), num_parameters=1, num_bytes=1, rope=rope).to_json()
        for rope in ropes
    }

    assert len(texts) == 1


def test_bank_rows_are_the_largest_rank_and_one_row_of_gains_with_dora() -> None:
    plain = AdapterManifest(modules=(entry(0, 4), entry(1, 8)), num_parameters=1, num_bytes=1)
    dora = AdapterManifest(
        modules=(entry(0, 8), entry(1, 2, use_dora=True)), num_parameters=1, num_bytes=1
    )

    assert (plain.max_rank, plain.num_rank_rows, plain.use_dora) == (8, 8, False)
    assert (dora.max_rank, dora.num_rank_rows, dora.use_dora) == (8, 9, True)


@pytest.mark.parametrize(("rows", "fits"), [(1, True), (16, True), (17, False), (24, False)])
def test_an_adapter_must_fit_the_bank_in_whole_pages(rows: int, fits: bool) -> None:
    limits = Limits(max_bank_rows=23, page_rows=8)

    if fits:
        limits.check_fit(rows)
    else:
        with pytest.raises(AdapterRefused, match="24 in pages of 8; the bank holds 23"):
            limits.check_fit(rows)


def test_values_are_shown_short_and_printable() -> None:
    assert show("plain") == "'plain'"
    assert show("\x1b[31m\u202e\ud800") == r"'\x1b[31m\u202e\ud800'"
    assert len(show("x" * 1000)) == 120
