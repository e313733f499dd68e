"""uvicorn's HTTP protocol, with an end to heads that are too long or never complete.

uvicorn bounds neither, and both come before any key is looked at: one connection could take all
memory, or a thousand of them every file handle.
"""

import asyncio

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD_BYTES = 1 << 16


class BoundedHead(HttpToolsProtocol):
    """Answers a head (request line and headers, trailers too) past MAX_HEAD_BYTES with 400.

    A connection that waits for a head to complete for longer than `head_s` is closed.
    """

    head_s = 30.0
    _num_head_bytes = 0  # received since the last complete head, or piece of a body
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._wait_no_more()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._wait()

    def on_headers_complete(self) -> None:
        self._num_head_bytes = 0
        self._wait_no_more()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._num_head_bytes = 0
        super().on_body(body)

    def data_received(self, data: bytes) -> None:
        self._num_head_bytes += len(data)
        super().data_received(data)
        if self._num_head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
            self.send_400_response(f"The head is over the limit of {MAX_HEAD_BYTES} bytes.")
        elif self.cycle is not None and self.cycle.response_complete:
            self._wait()  # for the next head: uvicorn's own limit ended with this data

    def _wait(self) -> None:
        if self._timer is None:
            self._timer = self.loop.call_later(self.head_s, self.transport.close)

    def _wait_no_more(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
