"""What config.json says about the base."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from server.model.spec import read_spec


def with_config(base: Path, to: Path, *, without: str = "", **changes: object) -> Path:
    shutil.copytree(base, to)
    config = json.loads((base / "config.json").read_text()) | changes
    config.pop(without, None)
    (to / "config.json").write_text(json.dumps(config))
    return to


@pytest.mark.parametrize("field", ["num_attention_heads", "rms_norm_eps"])
def test_a_field_that_is_not_there_is_named(field: str, tiny_base: Path, tmp_path: Path) -> None:
    folder = with_config(tiny_base, tmp_path / "base", without=field)
    with pytest.raises(ValueError, match=f"base: config.json does not say '{field}'"):
        read_spec(folder)


def test_mistrals_sliding_window_is_transformers_own_where_nothing_is_said(
    tiny_base: Path, tmp_path: Path
) -> None:
    assert read_spec(tiny_base).sliding_window is None
    unsaid = with_config(tiny_base, tmp_path / "unsaid", without="sliding_window")
    assert read_spec(unsaid).sliding_window == 4096
    short = with_config(tiny_base, tmp_path / "short", sliding_window=20)
    assert read_spec(short).sliding_window == 20


def test_llama_has_no_sliding_window(tiny_base: Path, tmp_path: Path) -> None:
    llama: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "sliding_window": 20,
    }
    assert read_spec(with_config(tiny_base, tmp_path / "llama", **llama)).sliding_window is None
