"""What is calibrated on: seeded, bounded, and never a row that is held out."""

import copy
import json
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.training.conftest import MakeConfig, dataset_of
from training import calibration
from training.calibration import Calibration, CalibrationOptions, load_calibration

TEXT = "\n\n".join(
    f"Paragraph {number} has some words in it, {number} of them." for number in range(40)
)


@pytest.fixture(autouse=True)
def _quick_tokenizer(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that a checkpoint of these tests has, read once."""
    quick = SimpleNamespace(from_pretrained=lambda folder: copy.copy(tokenizer))
    monkeypatch.setattr(calibration, "AutoTokenizer", quick)


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def load(base: Path, **options: Any) -> Calibration:
    return load_calibration(CalibrationOptions(**options), base)


def flat(sequences: Iterable[tuple[int, ...]]) -> list[int]:
    return [token for sequence in sequences for token in sequence]


def holds(found: Calibration, document: tuple[int, ...]) -> bool:
    """Whether a document is somewhere in what is calibrated on."""
    every = flat(found.samples)
    starts = range(len(every) - len(document) + 1)
    return any(tuple(every[at : at + len(document)]) == document for at in starts)


def is_kept_apart(found: Calibration) -> bool:
    return not any(holds(found, example.ids) for example in found.held_out)


def test_rows_that_training_held_out_are_not_calibrated_on(
    make: MakeConfig, tokenizer: Any, chat_base: Path, rows_file: Path
) -> None:
    config = make(eval_fraction=0.4, seed=3)
    dataset = dataset_of(config, tokenizer)
    settings = config.model_dump(mode="json", exclude_defaults=True)
    training = {"settings": settings, "data_fingerprint": dataset.fingerprint}

    found = load(chat_base, rows=rows_file, training=training)

    assert found.held_out == dataset.evaluation
    assert found.held_out_by == "training"
    assert is_kept_apart(found)
    assert all(holds(found, example.ids) for example in dataset.training)
    assert found.report()["num_held_out"] == len(dataset.evaluation) > 1


def test_other_rows_than_those_of_training_are_split_anew(chat_base: Path, rows_file: Path) -> None:
    training = {"settings": {"eval_fraction": 0.1, "seed": 3}, "data_fingerprint": "others"}
    for given in (training, {}, None):
        found = load(chat_base, rows=rows_file, training=given)
        assert found.held_out_by == "calibration"
        assert len(found.held_out) == 2
        assert is_kept_apart(found)


def test_held_out_rows_may_have_a_file_of_their_own(
    chat_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    rows = rows_file.read_text().splitlines()
    own = tmp_path / "own.jsonl"
    own.write_text("\n".join(rows[:3]) + "\n")
    found = load(chat_base, rows=rows_file, eval_rows=own)
    assert len(found.held_out) == 3
    assert found.held_out_by == "eval_rows"
    assert is_kept_apart(found)
    with pytest.raises(ValueError, match=r"evaluated on rows of their own \(own\.jsonl\)"):
        load(chat_base, rows=rows_file, training={"settings": {"eval_data": "own.jsonl"}})


def test_rows_that_training_held_out_stay_out_beside_others_of_their_own(
    make: MakeConfig, tokenizer: Any, chat_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    config = make(eval_fraction=0.4, seed=3)
    dataset = dataset_of(config, tokenizer)
    settings = config.model_dump(mode="json", exclude_defaults=True)
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"instruction": "Another.", "output": "one"}) + "\n")
    training = {"settings": settings, "data_fingerprint": dataset.fingerprint}
    found = load(chat_base, rows=rows_file, eval_rows=own, training=training)
    assert len(found.held_out) == 1
    assert not any(holds(found, example.ids) for example in dataset.evaluation)
    assert all(holds(found, example.ids) for example in dataset.training)


def test_the_seed_alone_decides_what_is_taken(chat_base: Path, text_file: Path) -> None:
    first, again, other = (
        load(chat_base, text=text_file, num_tokens=512, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again
    assert first.fingerprint == again.fingerprint
    assert first.fingerprint != other.fingerprint
    assert set(flat(first.samples)) != set(flat(other.samples))


def test_a_mix_has_the_share_of_text_that_was_asked_for(
    chat_base: Path, rows_file: Path, text_file: Path, tmp_path: Path
) -> None:
    many = tmp_path / "many.jsonl"
    many.write_text(
        "".join(
            json.dumps({"instruction": f"Say {number}.", "output": f"{number} " * 20}) + "\n"
            for number in range(40)
        )
    )
    found = load(chat_base, rows=many, text=text_file, text_share=0.25, num_tokens=1000)
    assert found.num_text_tokens == 250
    assert found.num_row_tokens == 750
    assert sum(map(len, found.samples)) == 1000
    assert found.report()["num_tokens"] == 1000


def test_of_a_long_text_no_more_is_read_than_is_enough(
    chat_base: Path, tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corpus of a gigabyte would take minutes, and the memory of all its tokens."""
    path = tmp_path / "long.txt"
    path.write_text("\n\n".join(f"{number} goes before " * 4 for number in range(200)))
    whole = load(chat_base, text=path, num_tokens=512)
    read: list[str] = []

    def count(text: str) -> Any:
        read.append(text)
        return tokenizer(text)

    quick = SimpleNamespace(from_pretrained=lambda folder: count)
    monkeypatch.setattr(calibration, "AutoTokenizer", quick)
    assert load(chat_base, text=path, num_tokens=512) == whole
    assert len(read) == 200, "of a short one everything"
    monkeypatch.setattr(calibration, "_TEXT_TOKENS", 1)
    taken = []
    for seed in (1, 1, 2):
        read.clear()
        assert load(chat_base, text=path, num_tokens=512, seed=seed).num_text_tokens == 512
        last = len(tokenizer(read[-1])["input_ids"])
        assert 0 <= len(flat(tokenizer(text)["input_ids"] for text in read)) - 1024 < last
        taken.append(set(read))
    assert taken[0] == taken[1] != taken[2]


def test_text_alone_holds_some_of_itself_out(chat_base: Path, text_file: Path) -> None:
    found = load(chat_base, text=text_file)
    assert len(found.held_out) == 8
    assert all(all(example.is_learned) for example in found.held_out)
    assert is_kept_apart(found)


def test_documents_lie_end_to_end_in_samples_of_one_length(
    chat_base: Path, rows_file: Path, tmp_path: Path
) -> None:
    path = tmp_path / "text.txt"
    path.write_text("word " * 2000 + "\n\n" + "end")
    found = load(chat_base, text=path, num_tokens=1300)
    assert [len(sample) for sample in found.samples] == [512, 512, 276]
    short = load(chat_base, rows=rows_file)
    assert [len(sample) for sample in short.samples] == [short.num_row_tokens]


def test_the_adapters_own_chat_template_renders_the_rows(chat_base: Path, rows_file: Path) -> None:
    options = CalibrationOptions(rows=rows_file)
    template = "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}"
    own, theirs = (load_calibration(options, chat_base, given) for given in (template, None))
    assert sum(map(len, own.samples)) < sum(map(len, theirs.samples))


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({}, "nothing to calibrate on"),
        ({"rows": Path("gone.jsonl")}, "--rows is 'gone.jsonl', which is not there"),
        ({"text": Path("gone.txt")}, "--text is 'gone.txt', which is not there"),
        ({"text": Path(__file__), "eval_rows": Path(__file__)}, "--eval-rows without --rows"),
        ({"text": Path(__file__), "text_share": 1.0}, "--text-share is 1.0"),
        ({"text": Path(__file__), "num_tokens": 100}, "--tokens is 100; it must be 512"),
    ],
)
def test_what_cannot_be_calibrated_on_is_refused(options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        CalibrationOptions(**options)


def test_files_that_hold_too_little_are_refused(
    chat_base: Path, tiny_base: Path, tmp_path: Path
) -> None:
    short, one = tmp_path / "short.txt", tmp_path / "one.jsonl"
    short.write_text("a\n\nb")
    one.write_text(json.dumps({"instruction": "Say it.", "output": "it"}) + "\n")
    with pytest.raises(ValueError, match="holds no text of 8 tokens"):
        load(chat_base, text=short)
    with pytest.raises(ValueError, match="too few different rows"):
        load(chat_base, rows=one)
    with pytest.raises(ValueError, match=r"holds no tokenizer\.json"):
        load(tiny_base, text=short)
