"""The base's text as registration sees it: what transformers makes of the same chat."""

from pathlib import Path
from typing import Any

import pytest
import transformers

from adapters.manifest import AdapterRefused
from server.base_text import CheckpointText
from server.default_base import ensure_default_base

CHAT = [{"role": "user", "content": "What is the capital of France?"}]


def test_a_chat_is_rendered_and_tokenized_as_transformers_does() -> None:
    folder = ensure_default_base()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder)
    text = CheckpointText(folder)
    expected = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_dict=True)
    assert text.prompt_ids(CHAT, None) == list(expected["input_ids"])
    assert text.chat_template == tokenizer.chat_template
    own = "{{ messages[0].content }}"
    assert text.prompt_ids(CHAT, own) == tokenizer(CHAT[0]["content"])["input_ids"]


def test_a_template_that_refuses_the_chat_refuses_the_adapter() -> None:
    text = CheckpointText(ensure_default_base())
    with pytest.raises(AdapterRefused, match=r"training\.probe: .*not today"):
        text.prompt_ids(CHAT, "{{ raise_exception('not today') }}")


def test_a_tokenizer_is_missed_only_when_it_is_asked_for(tmp_path: Path) -> None:
    text = CheckpointText(tmp_path)
    with pytest.raises(ValueError, match=r"must hold a tokenizer\.json"):
        _ = text.chat_template
