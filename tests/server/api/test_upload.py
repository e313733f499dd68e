"""Multipart uploads: bounded on the way, and refused where they are not an adapter's."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.config import AdapterConfig
from tests.server.api.harness import Server, serving, wait_until

BOUNDARY = "xyz"
TYPE = {"content-type": f"multipart/form-data; boundary={BOUNDARY}"}
END = f"--{BOUNDARY}--\r\n".encode()


def part(name: str, value: bytes, filename: str | None = None) -> bytes:
    file = "" if filename is None else f'; filename="{filename}"'
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
    return head.encode() + value + b"\r\n"


CONFIG = part("a", b"{}", "adapter_config.json")


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (part("a", b"x", "pytorch_model.bin") + END, "pytorch_model.bin"),
        (part("a", b"x", "../adapter_config.json") + END, "adapter_config.json"),
        (part("a", b"x", "/etc/passwd") + END, "passwd"),
        (CONFIG + CONFIG + END, "twice"),
        (part("name", b"a") + part("name", b"b") + CONFIG + END, "'name' twice"),
        (part("name", b"x" * 5000) + END, "longer than 4096"),
        (b"".join(part(f"f{i}", b"x") for i in range(20)) + END, "more than 16 parts"),
        (part("name", b"bot") + CONFIG + END, "lacks adapter_model.safetensors"),
        (CONFIG + part("b", b"x", "adapter_model.safetensors") + END, "name is required"),
        (CONFIG, "ends before its last boundary"),
        (b"", "ends before its last boundary"),
        (b"nonsense", "not valid multipart"),
        (f"--{BOUNDARY}\r\n{'h' * 5000}: 1\r\n\r\n".encode(), "header size"),
    ],
)
def test_a_form_that_is_not_an_adapter_s_is_refused(server: Server, body: bytes, says: str) -> None:
    reply = server.http().post("/v1/adapters", content=body, headers=TYPE)
    assert reply.status_code == 400, reply.text
    assert says in reply.json()["error"]["message"]
    assert server.registry.list() == []


@pytest.mark.parametrize("boundary", ["", "; boundary=", "; boundary=" + "b" * 71])
def test_a_boundary_that_is_missing_or_too_long_is_refused(server: Server, boundary: str) -> None:
    headers = {"content-type": f"multipart/form-data{boundary}"}
    reply = server.http().post("/v1/adapters", content=b"x", headers=headers)
    assert "boundary" in reply.json()["error"]["message"]


@pytest.mark.parametrize("has_length", [True, False])
def test_an_upload_past_the_limit_is_413(server: Server, has_length: bool) -> None:
    store = server.services.config.adapters.store
    small = AdapterConfig(store=store, max_upload_bytes=1000)
    object.__setattr__(server.services.config, "adapters", small)

    def body() -> Iterator[bytes]:
        yield f"--{BOUNDARY}\r\nContent-Disposition: form-data; ".encode()
        yield b'name="a"; filename="adapter_model.safetensors"\r\n\r\n'
        for _ in range(5 << 4):
            yield b"x" * (1 << 16)

    content = b"".join(body()) if has_length else body()
    reply = server.http().post("/v1/adapters", content=content, headers=TYPE)
    assert reply.status_code == 413
    wait_until(lambda: not list((store / "uploads").iterdir()), 10.0)


def test_an_upload_without_end_is_refused_while_it_still_comes(server: Server) -> None:
    small = AdapterConfig(store=server.services.config.adapters.store, max_upload_bytes=1000)
    object.__setattr__(server.services.config, "adapters", small)
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/adapters HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n"
            + f"content-type: {TYPE['content-type']}\r\n\r\n".encode()
        )
        part_of_file = part("a", b"x" * (1 << 16), "adapter_model.safetensors")
        chunk = b"%x\r\n%s\r\n" % (len(part_of_file), part_of_file)
        connection.sendall(chunk)
        rest = b"%x\r\n%s\r\n" % (1 << 16, b"x" * (1 << 16))
        for _ in range(5 << 4):
            connection.sendall(rest)
        assert b" 413 " in connection.recv(4096)  # though the last chunk has not been sent


def test_a_client_that_goes_away_leaves_nothing(server: Server, tmp_path: Path) -> None:
    def body() -> Iterator[bytes]:
        yield CONFIG
        raise RuntimeError("the client is gone")

    with pytest.raises(RuntimeError, match="gone"):
        server.http().post("/v1/adapters", content=body(), headers=TYPE)
    uploads = server.services.config.adapters.store / "uploads"
    assert server.http().get("/health").status_code == 200
    wait_until(uploads.exists, 10.0)  # the server begins, and notices, in its own time
    wait_until(lambda: not list(uploads.iterdir()), 10.0)


@pytest.mark.parametrize(
    ("path", "kind", "body"),
    [
        ("/v1/adapters", TYPE["content-type"], CONFIG),
        ("/v1/adapters", "application/json", b"{"),
        ("/v1/completions", "application/json", b"{"),
    ],
)
def test_a_client_that_sends_nothing_more_is_told_and_holds_nothing(
    tiny_base: Path, tmp_path: Path, path: str, kind: str, body: bytes
) -> None:
    with serving(tiny_base, tmp_path / "store", stall_s=0.2) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=10) as connection:
            head = f"POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {kind}\r\n"
            connection.sendall(f"{head}content-length: 1000\r\n\r\n".encode() + body)
            reply = b""
            while b"body_stalled" not in reply:
                received = connection.recv(4096)
                assert received, reply
                reply += received
        assert b" 408 " in reply.splitlines()[0]
        uploads = server.services.config.adapters.store / "uploads"
        wait_until(lambda: not list(uploads.glob("*")))
