"""The API process's end of the socket: whatever the timing, every message arrives."""

import asyncio
import contextlib
import random
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import zmq

from server.engine.channel import Channel

# Sends `count` numbered messages at random moments, meanwhile reads what comes, then echoes.
PEER = """
import random, sys, time, zmq
endpoint, count = sys.argv[1], int(sys.argv[2])
socket = zmq.Context().socket(zmq.PAIR)
socket.set_hwm(0)
socket.connect(endpoint)
for number in range(count):
    while socket.poll(0):
        socket.recv()
    socket.send(b"%d" % number)
    time.sleep(random.random() * 4e-4)
while (message := socket.recv()) != b"end":
    if message != b"noise":
        socket.send(message)
"""


@dataclass
class Wire:
    """A channel with another process at its other end."""

    channel: Channel
    received: list[bytes]

    async def receive(self, count: int) -> None:
        async with asyncio.timeout(60):
            while len(self.received) < count:
                await asyncio.sleep(0.001)


@contextlib.asynccontextmanager
async def wired(folder: Path, num_messages: int) -> AsyncIterator[Wire]:
    """A channel whose peer has said its first message; the peer must have ended by itself."""
    received: list[bytes] = []
    with zmq.Context() as context:
        channel = Channel(context, received.append)
        endpoint = f"ipc://{folder / 'wire'}"
        channel.bind(endpoint)
        peer = subprocess.Popen([sys.executable, "-c", PEER, endpoint, str(num_messages)])
        try:
            wire = Wire(channel, received)
            await wire.receive(1)
            yield wire
            channel.send(b"end")
            assert peer.wait(10) == 0
        finally:
            peer.kill()
            peer.wait()
            channel.close()


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("w")  # short: a Unix socket's path has 107 bytes


async def test_no_message_is_lost_while_both_ends_send(folder: Path) -> None:
    async with wired(folder, num_messages=4_000) as wire, asyncio.timeout(60):
        while len(wire.received) < 4_000:
            wire.channel.send(b"noise")
            await asyncio.sleep(random.random() * 5e-4)
        assert wire.received == [b"%d" % number for number in range(4_000)]


async def test_an_answer_to_each_of_many_messages_in_order(folder: Path) -> None:
    async with wired(folder, num_messages=1) as wire:
        for number in range(300):
            wire.channel.send(b"a%d" % number)
        await wire.receive(301)
        assert wire.received[1:] == [b"a%d" % number for number in range(300)]


async def test_a_callback_that_fails_costs_its_own_message_only(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with wired(folder, num_messages=1) as wire:

        def fail_once(message: bytes) -> None:
            wire.received.append(message)
            if message == b"bad":
                raise ValueError("cannot be read")

        wire.channel._on_message = fail_once
        wire.channel.send(b"bad")
        wire.channel.send(b"good")
        await wire.receive(3)
        assert wire.received[1:] == [b"bad", b"good"]
        assert caplog.messages == ["a message of 3 bytes could not be handled"]


async def test_nobody_at_the_other_end_is_an_error_and_closing_twice_is_none(folder: Path) -> None:
    received: list[bytes] = []
    with zmq.Context() as context:
        channel = Channel(context, received.append)
        channel.bind(f"ipc://{folder / 'wire'}")
        with pytest.raises(zmq.ZMQError):
            channel.send(b"early")
        channel.close()
        channel.close()
        channel.read_all()
    assert received == []
