"""The API process's end of the socket to the engine process, on an asyncio loop."""

import asyncio
import logging
from collections.abc import Callable

import zmq

logger = logging.getLogger(__name__)


class Channel:
    """A ZeroMQ PAIR socket that never blocks and calls back for every message.

    ZeroMQ's descriptor is edge-triggered: it turns readable once for all that has arrived, and a
    send takes that edge away unseen. So each look reads all there is, and a look follows each send
    (zmq_getsockopt(3), ZMQ_FD).
    """

    def __init__(
        self, context: "zmq.Context[zmq.Socket[bytes]]", on_message: Callable[[bytes], None]
    ) -> None:
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._socket = context.socket(zmq.PAIR)
        self._socket.set_hwm(0)  # a send never waits for its reader
        self._loop.add_reader(self._socket, self.read_all)

    def bind(self, endpoint: str) -> None:
        """Wait for the other end there. ZMQError if it cannot."""
        self._socket.bind(endpoint)

    def send(self, message: bytes) -> None:
        """Hand a message over. ZMQError if the other end has not connected yet."""
        self._socket.send(message, zmq.DONTWAIT)
        self._loop.call_soon(self.read_all)

    def read_all(self) -> None:
        """Call back for every message that is there. Does nothing once closed."""
        while not self._socket.closed:
            try:
                message = self._socket.recv(zmq.DONTWAIT)
            except zmq.Again:
                return
            try:
                self._on_message(message)
            except Exception:  # the messages after it are others' answers
                logger.exception("a message of %d bytes could not be handled", len(message))

    def close(self) -> None:
        """Drop what is unsent, and read no more. Idempotent."""
        if not self._socket.closed:
            self._loop.remove_reader(self._socket)
            self._socket.close(linger=0)
