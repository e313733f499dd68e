"""The drift that a merge reports is the drift of the whole models, run by transformers and PEFT."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.conftest import MakeAdapter
from tests.training.test_merge_oracle import merge, options, peft_over
from training.merge_checkpoint import Checkpoint
from training.merge_drift import (
    CONVERSATIONS,
    MAX_PROBE_TOKENS,
    MAX_PROBES,
    DriftMeter,
    Probe,
    read_probes,
)

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


@pytest.fixture
def base16(tiny_base: Path, tmp_path: Path) -> Path:
    """The tiny base in bf16, where a merge does round, with a sliding window of 12."""
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_base, dtype=torch.bfloat16)
    model.config.sliding_window = 12
    model.save_pretrained(tmp_path / "base16")
    return tmp_path / "base16"


def add_tokenizer(folder: Path, template: str | None = None) -> None:
    """A tokenizer of single characters."""
    vocab = {chr(32 + index): index for index in range(95)} | {"[UNK]": 95}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")
    fast.chat_template = template
    fast.save_pretrained(folder)


@torch.inference_mode()
def expected_drift(unmerged: Any, merged: Any, token_ids: list[int]) -> tuple[torch.Tensor, float]:
    """KL of each position, and the share of equal top tokens, from whole models."""
    p, q = (
        model(torch.tensor([token_ids])).logits[0].double().log_softmax(-1)
        for model in (unmerged, merged)
    )
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
    return (p.exp() * (p - q)).sum(-1), float(agreement)


@pytest.mark.parametrize("merge_base", ["original", "dequantized"])
@pytest.mark.parametrize("kind", [{}, {"target_modules": "all-linear", "use_dora": True}])
def test_the_drift_is_that_of_the_whole_models(
    kind: dict[str, Any],
    merge_base: str,
    base16: Path,
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    adapter, out = make_adapter(base=base16, **kind), tmp_path / "merged"

    found = merge(options(base16, adapter, out, merge_base=merge_base))["drift"]

    unmerged = peft_over(base16, merge_base, adapter)
    merged = transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    probes = read_probes(base16, None, 256)
    every_kl = []
    for probe, row in zip(probes, found[:-1], strict=True):
        kl, agreement = expected_drift(unmerged, merged, probe.token_ids)
        assert row["probe"] == probe.name
        assert row["num_tokens"] == 32
        assert row["mean_kl"] == pytest.approx(float(kl.mean()), rel=0.01)
        assert row["max_kl"] == pytest.approx(float(kl.max()), rel=0.01)
        assert row["top1_agreement"] == pytest.approx(agreement)
        every_kl.append(kl)
    assert found[-1]["probe"] == "all"
    assert found[-1]["num_tokens"] == 128
    assert found[-1]["mean_kl"] == pytest.approx(float(torch.cat(every_kl).mean()), rel=0.01)
    assert found[-1]["mean_kl"] > 1e-7, "bf16 rounds, so there is a drift to measure"


def test_a_broken_merge_shows_in_the_drift(tiny_base: Path) -> None:
    checkpoint = Checkpoint(tiny_base)
    meter = DriftMeter(checkpoint, [Probe("a", [1, 2, 3, 4, 5])], torch.device("cpu"))
    for layer in range(2):
        prefix = f"model.layers.{layer}."
        for name in (name for name in checkpoint if name.startswith(prefix)):
            weight = checkpoint.tensor(name)
            meter.set_unmerged(name.removeprefix(prefix), weight)
            meter.set_merged(name.removeprefix(prefix), weight.flip(0))
        meter.run_layer({})
    one, every = meter.drifts()
    assert one.mean_kl > 0.1
    assert one.top1_agreement < 1
    assert (every.mean_kl, every.num_tokens) == (one.mean_kl, 5)


def test_built_in_probes_are_conversations_in_the_chat_templates_words(tmp_path: Path) -> None:
    add_tokenizer(tmp_path, TEMPLATE)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)

    probes = read_probes(tmp_path, None, 96)

    question, answer = CONVERSATIONS[0]
    assert [probe.name for probe in probes] == [question for question, _ in CONVERSATIONS]
    expected = tokenizer(f"<user>{question}<assistant>{answer}")["input_ids"]
    assert probes[0].token_ids == expected


@pytest.mark.parametrize("template", [None, "{{ raise_exception('users only') }}"])
def test_without_a_template_that_takes_them_conversations_are_plain_text(
    template: str | None, tmp_path: Path
) -> None:
    add_tokenizer(tmp_path, template)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    expected = tokenizer("\n".join(CONVERSATIONS[0]))["input_ids"]
    assert read_probes(tmp_path, None, 96)[0].token_ids == expected


def test_a_probe_file_holds_texts_with_blank_lines_between(tmp_path: Path) -> None:
    add_tokenizer(tmp_path)
    file = tmp_path / "probes.txt"
    file.write_text("one\nstill one\n\n\n  \n\ntwo\r\n\r\n" + "x" * 999, newline="")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)

    probes = read_probes(tmp_path, file, 96)

    assert [probe.name for probe in probes] == ["one still one", "two", "x" * 47 + "…"]
    assert probes[0].token_ids == tokenizer("one\nstill one")["input_ids"]
    assert len(probes[2].token_ids) == MAX_PROBE_TOKENS


def test_the_number_of_probes_is_bounded(tmp_path: Path) -> None:
    add_tokenizer(tmp_path)
    (tmp_path / "probes.txt").write_text("a\n\n" * (MAX_PROBES + 9))
    assert len(read_probes(tmp_path, tmp_path / "probes.txt", 96)) == MAX_PROBES


def test_without_a_tokenizer_the_probes_are_seeded_token_ids(tiny_base: Path) -> None:
    probes = read_probes(tiny_base, None, 256)
    assert [len(probe.token_ids) for probe in probes] == [32] * 4
    assert probes == read_probes(tiny_base, None, 256)
    assert max(max(probe.token_ids) for probe in probes) < 256


def test_a_probe_file_that_cannot_be_read_is_refused(tiny_base: Path, tmp_path: Path) -> None:
    file = tmp_path / "probes.txt"
    file.write_text(" \n\n ")
    with pytest.raises(ValueError, match="no tokenizer"):
        read_probes(tiny_base, file, 256)
    add_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="holds no text"):
        read_probes(tmp_path, file, 96)
