"""Multipart uploads, streamed to a folder as they come and bounded on the way."""

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import parse_options_header
from starlette.requests import Request

from server.api.services import body_chunks
from server.config import AdapterConfig
from server.errors import ServeError, bad_request

FILES = ("adapter_config.json", "adapter_model.safetensors", "turnout.json")
_MAX_FIELD_BYTES = 4096
_MAX_FIELDS = 16
_OVERHEAD_BYTES = 4 << 20  # of the small files, the fields, and what multipart puts around them


@dataclass(slots=True)
class _Part:
    disposition: bytes = b""
    name: str = ""
    file: BinaryIO | None = None
    value: bytearray = field(default_factory=bytearray)


class _Receiver:
    """Takes the parser's callbacks. Owns the open files; `close` closes them."""

    def __init__(self, folder: Path) -> None:
        self.fields: dict[str, str] = {}
        self._folder = folder
        self._part = _Part()
        self._header = b""
        self._header_value = b""
        self._files: dict[str, BinaryIO] = {}
        self.is_whole = False

    def on_part_begin(self) -> None:
        if len(self.fields) + len(self._files) >= _MAX_FIELDS:
            raise bad_request(f"The form has more than {_MAX_FIELDS} parts.")
        self._part = _Part()

    def on_header_begin(self) -> None:
        self._header = self._header_value = b""

    def on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]  # the parser bounds it

    def on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def on_header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._part.disposition = self._header_value

    def on_headers_finished(self) -> None:
        _, options = parse_options_header(self._part.disposition)
        self._part.name = options.get(b"name", b"").decode("utf-8", "replace")
        filename = options.get(b"filename")
        if filename is None:
            return
        name = filename.decode("utf-8", "replace")
        if name not in FILES:
            raise bad_request(
                f"The upload has a file {name[:64]!r}; it may have {', '.join(FILES)}.",
                param=self._part.name[:64],
            )
        if name in self._files:
            raise bad_request(f"The upload has {name} twice.", param=name)
        self._part.file = self._files[name] = (self._folder / name).open("wb")

    def on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part.file is not None:
            self._part.file.write(data[start:end])
            return
        self._part.value += data[start:end]
        if len(self._part.value) > _MAX_FIELD_BYTES:
            raise bad_request(f"A form field is longer than {_MAX_FIELD_BYTES} bytes.")

    def on_part_end(self) -> None:
        if self._part.file is None:
            name = self._part.name
            if name in self.fields:
                raise bad_request(f"The form has {name[:64]!r} twice.", param=name[:64])
            self.fields[name] = self._part.value.decode("utf-8", "replace")

    def on_end(self) -> None:
        self.is_whole = True

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def upload_root(config: AdapterConfig) -> Path:
    """Where uploads are put while they come: beside the store, on its disk."""
    return config.store / "uploads"


async def receive_upload(request: Request, folder: Path, max_bytes: int) -> dict[str, str]:
    """Write the upload's files into `folder` and return its other fields.

    Raises ServeError 400 for a form that is not an adapter's, 413 past `max_bytes` of weights, and
    what `body_chunks` raises.
    """
    _, options = parse_options_header(request.headers.get("content-type", ""))
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= 70:  # RFC 2046
        raise bad_request("The multipart boundary is missing or longer than 70 characters.")
    receiver = _Receiver(folder)
    try:
        parser = MultipartParser(boundary, {  # type: ignore[arg-type]  # bound methods, as it wants
            name: getattr(receiver, name) for name in dir(_Receiver) if name.startswith("on_")
        })  # fmt: skip
        await _feed(parser, request, max_bytes + _OVERHEAD_BYTES)
    except FormParserError as error:
        raise bad_request(f"The body is not valid multipart: {error}") from None
    finally:
        receiver.close()
    if not receiver.is_whole:
        raise bad_request("The multipart body ends before its last boundary.")
    return receiver.fields


async def _feed(parser: MultipartParser, request: Request, limit: int) -> None:
    declared = request.headers.get("content-length", "")
    received = int(declared) if declared.isdigit() else 0
    if received <= limit:
        received = 0
        async for chunk in body_chunks(request):
            received += len(chunk)
            if received > limit:
                break
            await asyncio.to_thread(parser.write, chunk)  # it writes to disk
    if received > limit:
        raise ServeError(413, "body_too_large", f"The upload is over the limit of {limit} bytes.")
    parser.finalize()
