"""What an adapter was trained on, beside what it will be served on: base, template, tokens."""

import hashlib
from collections.abc import Mapping
from typing import Any

from adapters.manifest import AdapterRefused, BaseShape, BaseText, show

Messages = list[dict[str, str]]


def find_mismatches(
    training: Mapping[str, Any], chat_template: str | None, base: BaseShape
) -> dict[str, str]:
    """Field of turnout.json -> what differs, in words; empty where all that is noted agrees.

    `chat_template` is the adapter's own, served in place of the base's. Without `base.text`, which
    who serves no text may lack, template and tokens are not compared. Raises AdapterRefused for
    notes that cannot be read.
    """
    found = {}
    trained_on = _text(training, "base_digest")
    if trained_on is not None and trained_on != base.digest:
        found["training.base_digest"] = (
            f"it was trained on base {trained_on[:12]}; this one is {base.digest[:12]}"
        )
    if base.text is None:
        return found
    template_hash = _text(training, "template_sha256")
    if "template_sha256" in training:
        served = _template_hash(chat_template or base.text.chat_template)
        if template_hash != served:
            found["training.template_sha256"] = (
                f"it was trained with chat template {_short(template_hash)}; "
                f"it would be served with {_short(served)}"
            )
    probe = _probe(training)
    if probe is not None:
        difference = _difference(*probe, chat_template, base.text)
        if difference is not None:
            found["training.probe"] = difference
    return found


def _difference(
    messages: Messages, trained_ids: list[int], template: str | None, text: BaseText
) -> str | None:
    """Where the probe's tokens part from those it had in training; None if they do not."""
    if template is None and text.chat_template is None:
        return "it was trained with a chat template; this base has none"
    served_ids = text.prompt_ids(messages, template)
    if served_ids == trained_ids:
        return None
    pairs = zip(served_ids, trained_ids, strict=False)
    same = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    if same is None:
        return f"it came to {len(trained_ids)} tokens in training, to {len(served_ids)} here"
    return (
        f"its token {same} was {trained_ids[same]} in training and is {served_ids[same]} here, "
        "so the prompt would not be the one that the adapter learned"
    )


def _probe(training: Mapping[str, Any]) -> tuple[Messages, list[int]] | None:
    probe = training.get("probe")
    if probe is None:
        return None
    messages, ids = (
        (probe.get("messages"), probe.get("ids")) if isinstance(probe, dict) else (None, None)
    )
    is_chat = isinstance(messages, list) and all(
        isinstance(message, dict)
        and all(isinstance(value, str) for value in message.values())
        and message.keys() == {"role", "content"}
        for message in messages
    )
    is_ids = isinstance(ids, list) and all(
        isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids
    )
    if not (is_chat and is_ids):
        raise AdapterRefused(
            "training.probe", f"{show(probe)} does not hold messages and their token ids"
        )
    return messages, ids  # type: ignore[return-value]  # checked above


def _text(training: Mapping[str, Any], field: str) -> str | None:
    value = training.get(field)
    if not isinstance(value, str | None):
        raise AdapterRefused(f"training.{field}", f"{show(value)} is not a text")
    return value


def _template_hash(template: str | None) -> str | None:
    return None if template is None else hashlib.sha256(template.encode()).hexdigest()


def _short(digest: str | None) -> str:
    return "none" if digest is None else show(digest[:12])[1:-1]
