"""What turnout.json says of an adapter's training, held against the base that would serve it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from adapters.folder import read_sidecar
from adapters.manifest import AdapterRefused, BaseShape
from adapters.registry import Registry

WriteFolder = Callable[..., Path]
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"
PROBE = [{"role": "user", "content": "abc"}]
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 2, "original_max_position_embeddings": 64}


class Text:
    """A base's text: a letter is a token, and a template of its own adds one before."""

    def __init__(self, chat_template: str | None = TEMPLATE) -> None:
        self.chat_template = chat_template

    def prompt_ids(self, messages: list[dict[str, str]], template: str | None) -> list[int]:
        letters = "".join(message["content"] for message in messages)
        return [1] * (template is not None) + [ord(letter) for letter in letters]


def sha256(template: str) -> str:
    return hashlib.sha256(template.encode()).hexdigest()


def notes(**changes: Any) -> dict[str, Any]:
    """What training over `base` writes down, with changes."""
    return {
        "base_digest": "b" * 64,
        "template_sha256": sha256(TEMPLATE),
        "probe": {"messages": PROBE, "ids": [97, 98, 99]},
        "seed": 0,
        "versions": {"torch": "2"},
        **changes,
    }


@pytest.fixture
def base(one_linear: BaseShape) -> BaseShape:
    return replace(one_linear, text=Text(), rope=ROPE)


def test_what_agrees_is_taken(base: BaseShape, write_folder: WriteFolder) -> None:
    folder = write_folder(sidecar={"format": 1, "rope": ROPE, "training": notes()})
    sidecar = read_sidecar(folder, base)
    assert sidecar.mismatches == {}
    assert sidecar.training["seed"] == 0


@pytest.mark.parametrize(
    ("changes", "field", "complaint"),
    [
        (
            {"base_digest": "c" * 64},
            "training.base_digest",
            "on base cccccccccccc; .* bbbbbbbbbbbb",
        ),
        ({"template_sha256": "e" * 64}, "training.template_sha256", "template eeeeeeeeeeee; "),
        ({"template_sha256": None}, "training.template_sha256", "chat template none; "),
        (
            {"probe": {"messages": PROBE, "ids": [97, 120, 99]}},
            "training.probe",
            "its token 1 was 120 in training and is 98 here",
        ),
        (
            {"probe": {"messages": PROBE, "ids": [97, 98]}},
            "training.probe",
            "2 tokens in training, to 3 here",
        ),
    ],
)
def test_each_difference_is_refused_by_name_unless_whoever_pushes_it_knows(
    base: BaseShape, write_folder: WriteFolder, changes: dict[str, Any], field: str, complaint: str
) -> None:
    folder = write_folder(sidecar={"format": 1, "training": notes(**changes)})
    with pytest.raises(AdapterRefused, match=complaint) as caught:
        read_sidecar(folder, base)
    assert caught.value.field == field
    assert "allow_mismatch" in caught.value.message
    sidecar = read_sidecar(folder, base, allow_mismatch=True)
    assert list(sidecar.mismatches) == [field]


def test_a_template_of_its_own_is_what_the_adapter_must_have_been_trained_with(
    base: BaseShape, write_folder: WriteFolder
) -> None:
    own = {"format": 1, "chat_template": "mine"}
    trained = notes(
        template_sha256=sha256("mine"), probe={"messages": PROBE, "ids": [1, 97, 98, 99]}
    )
    assert read_sidecar(write_folder(sidecar={**own, "training": trained}), base).mismatches == {}
    with pytest.raises(AdapterRefused, match="template_sha256"):
        read_sidecar(write_folder(sidecar={**own, "training": notes()}), base)
    both = read_sidecar(
        write_folder(sidecar={**own, "training": notes()}), base, allow_mismatch=True
    )
    assert set(both.mismatches) == {"training.template_sha256", "training.probe"}


def test_a_base_without_a_template_cannot_render_what_was_trained_with_one(
    base: BaseShape, write_folder: WriteFolder
) -> None:
    bare = replace(base, text=Text(None))
    folder = write_folder(sidecar={"format": 1, "training": notes(template_sha256=None)})
    with pytest.raises(AdapterRefused, match="this base has none"):
        read_sidecar(folder, bare)
    plain = notes(template_sha256=None, probe=None)
    assert read_sidecar(write_folder(sidecar={"format": 1, "training": plain}), bare).training


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"base_digest": 7}, r"training\.base_digest: 7 is not a text"),
        ({"template_sha256": [1]}, r"template_sha256: \[1\] is not a text"),
        ({"probe": [1]}, r"training\.probe: \[1\] does not hold messages"),
        ({"probe": {"messages": PROBE, "ids": ["a"]}}, "does not hold messages and their token"),
        ({"probe": {"messages": [{"role": "user"}], "ids": []}}, "does not hold messages"),
        ({"probe": {"messages": [{"role": 1, "content": 2}], "ids": []}}, "does not hold messages"),
    ],
)
def test_notes_that_cannot_be_read_are_refused_whatever_is_allowed(
    base: BaseShape, write_folder: WriteFolder, changes: dict[str, Any], complaint: str
) -> None:
    folder = write_folder(sidecar={"format": 1, "training": notes(**changes)})
    with pytest.raises(AdapterRefused, match=complaint):
        read_sidecar(folder, base, allow_mismatch=True)


def test_who_serves_no_text_compares_the_base_alone(
    one_linear: BaseShape, write_folder: WriteFolder
) -> None:
    folder = write_folder(sidecar={"format": 1, "training": notes(template_sha256="x")})
    assert read_sidecar(folder, one_linear).mismatches == {}
    folder = write_folder(sidecar={"format": 1, "training": notes(base_digest="x")})
    with pytest.raises(AdapterRefused, match="it was trained on base x"):
        read_sidecar(folder, one_linear)


def test_an_adapter_that_says_nothing_of_its_training_is_taken(
    base: BaseShape, write_folder: WriteFolder
) -> None:
    assert read_sidecar(write_folder(), base).mismatches == {}
    assert read_sidecar(write_folder(sidecar={"format": 1}), base).mismatches == {}


@pytest.mark.parametrize(
    ("rope", "complaint"),
    [
        ({"rope_type": "default", "rope_theta": 5e5}, "is not the base's"),
        ({"rope_theta": 5e5}, "is not the base's"),
        ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic' is not served; linear and yarn are"),
        ({"rope_type": "linear", "factor": 0}, r"rope\.factor: 0 is not a number of 1 or more"),
        ([], "is not an object"),
    ],
)
def test_rope_that_is_not_served_is_refused_whatever_is_allowed(
    base: BaseShape, write_folder: WriteFolder, rope: object, complaint: str
) -> None:
    folder = write_folder(sidecar={"format": 1, "rope": rope})
    with pytest.raises(AdapterRefused, match=complaint):
        read_sidecar(folder, base, allow_mismatch=True)


def test_scaling_over_a_base_that_is_scaled_itself_is_refused(
    base: BaseShape, write_folder: WriteFolder
) -> None:
    scaled = replace(base, rope={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    with pytest.raises(AdapterRefused, match="which has linear scaling"):
        read_sidecar(write_folder(sidecar={"format": 1, "rope": YARN}), scaled)


def test_scaling_is_part_of_the_digest_and_survives_with_its_revision(
    base: BaseShape, write_folder: WriteFolder, tmp_path: Path
) -> None:
    spelled = [YARN, {"type": "yarn", **YARN, "rope_theta": 10000}, {**YARN, "factor": 3.0}, None]
    registry = Registry.open(tmp_path / "store", base)
    digests: list[str] = []
    for rope in spelled:
        sidecar = {"format": 1, "rope": rope} if rope else None
        folder = write_folder(f"rope-{len(digests)}", sidecar=sidecar)
        digests.append(registry.push("a", folder).digest)
    registry.close()

    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    registry = Registry.open(tmp_path / "store", base)
    scalings = [revision.rope for revision in registry.revisions("a")]
    registry.close()
    assert [rope and rope.factor for rope in scalings] == [2.0, 3.0, None]
    assert str(scalings[0]) == "yarn, factor 2 over 64 positions"


def test_what_was_overlooked_is_noted_with_the_revision(
    base: BaseShape,
    write_folder: WriteFolder,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder = write_folder(sidecar={"format": 1, "training": notes(base_digest="c" * 64)})
    registry = Registry.open(tmp_path / "store", base)
    with pytest.raises(AdapterRefused, match="base_digest"):
        registry.push("a", folder)
    assert registry.list() == []
    revision = registry.push("a", folder, allow_mismatch=True)
    registry.close()
    assert list(revision.source["mismatches"]) == ["training.base_digest"]
    assert "it was trained on base cccccccccccc" in caplog.text
    assert json.dumps(revision.source)  # as it is stored
