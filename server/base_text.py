"""The base's tokenizer and chat template, for comparing what an adapter was trained on."""

from functools import cached_property
from pathlib import Path

from adapters.manifest import AdapterRefused
from server.api.tokenizer import TextCodec
from server.errors import ServeError


class CheckpointText:
    """Reads a checkpoint's tokenizer when it is first asked for anything."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @property
    def chat_template(self) -> str | None:
        """The base's own. Raises ValueError where the checkpoint has no tokenizer.json."""
        return self._codec.chat_template

    def prompt_ids(self, messages: list[dict[str, str]], template: str | None) -> list[int]:
        """What a chat request with these messages comes to; `template` replaces the base's.

        Raises AdapterRefused where the template does not take them.
        """
        try:
            return self._codec.encode_chat(messages, template=template)
        except ServeError as error:
            raise AdapterRefused("training.probe", error.message) from None

    @cached_property
    def _codec(self) -> TextCodec:
        return TextCodec.load(self._folder)
