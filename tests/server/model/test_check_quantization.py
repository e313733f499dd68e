"""Which folders may be served in which quantization."""

import json
from pathlib import Path

import pytest

from server.model.loader import check_quantization


def a_folder(root: Path, provenance: object) -> Path:
    (root / "config.json").write_text("{}")
    (root / "turnout.json").write_text(json.dumps(provenance))
    return root


def test_nf4_of_a_merged_model_is_refused_for_it_would_lose_the_adapter(tmp_path: Path) -> None:
    folder = a_folder(tmp_path, {"kind": "merged"})
    with pytest.raises(ValueError, match="would erase: serve it with quantization none"):
        check_quantization(folder, "nf4")
    assert check_quantization(folder, "none") is None


@pytest.mark.parametrize("provenance", [{}, [], {"kind": "adapter"}, "merged"])
def test_any_other_note_in_the_folder_is_no_matter(tmp_path: Path, provenance: object) -> None:
    assert check_quantization(a_folder(tmp_path, provenance), "nf4") is None


def test_gptq_is_what_the_folder_itself_must_be(tmp_path: Path) -> None:
    folder = a_folder(tmp_path, {})
    with pytest.raises(ValueError, match="holds no GPTQ checkpoint"):
        check_quantization(folder, "gptq")
