"""An engine process that loads nothing: `python -m tests.server.engine.stub_engine ENDPOINT WHAT`.

loads   it never says that it is ready, nor listens
idles   it says that it is ready, and waits to be told to end
leaves  it says that it is ready; with the first message it lets go of its end of the socket and
        lives on, as one does that has failed and whose interpreter takes its time to end
"""

import sys
import time
from pathlib import Path

import msgspec
import zmq

from server.engine.messages import EngineInfo, Ready, Shutdown, ToEngine

INFO = EngineInfo(
    base_digest="base",
    device="cpu",
    dtype="float32",
    quantization="none",
    num_blocks=8,
    block_size=16,
    max_model_len=128,
    bank_rows=8,
    page_rows=8,
    vocab_size=256,
    eos_token_ids=[0],
    kernels={},
)


def make_interpreter(folder: Path, what: str) -> Path:
    """What to put in the place of `sys.executable`, for every engine process to be this one."""
    root = Path(__file__).parents[3]
    script = folder / f"python-{what}"
    command = f'exec {sys.executable} -m tests.server.engine.stub_engine "$3" {what}'
    script.write_text(f"#!/bin/sh\ncd {root}\n{command}\n")
    script.chmod(0o755)
    return script


def main(endpoint: str, what: str) -> None:
    """Do what is said."""
    sys.stdin.buffer.read()
    if what != "loads":
        with zmq.Context() as context, context.socket(zmq.PAIR) as socket:
            socket.connect(endpoint)
            socket.send(msgspec.msgpack.encode(Ready(INFO)))
            while not isinstance(msgspec.msgpack.decode(socket.recv(), type=ToEngine), Shutdown):
                if what == "leaves":
                    break
            else:
                return
    time.sleep(600)


if __name__ == "__main__":
    main(*sys.argv[1:])
