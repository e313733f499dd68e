"""API keys: files, scopes, and who may listen where."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from server.api.app import create_app
from server.api.auth import ApiKey, Authenticator, check_listen, load_keys, new_key
from server.config import Config, ModelConfig, ServerConfig
from server.errors import ServeError
from tests.server.api.harness import BASE, Server, serving

CHAT = {"model": BASE, "messages": [{"role": "user", "content": "hello"}]}


def bearer(secret: str) -> dict[str, str]:
    return {"authorization": f"Bearer {secret}"}


def test_a_key_has_256_random_bits_and_only_its_hash_is_kept() -> None:
    (first, key), (second, _) = new_key("a", frozenset({"infer"})), new_key("a", frozenset())
    assert first != second
    assert len(first) >= 43
    assert first not in key.line()


def test_a_keys_file_is_read_back_with_comments_and_blank_lines(tmp_path: Path) -> None:
    _, one = new_key("one", frozenset({"infer"}))
    _, two = new_key("two", frozenset({"adapters", "admin"}))
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n{one.line()}\n  # theirs\n{two.line()}\n")
    assert load_keys(file) == [one, two]


@pytest.mark.parametrize(
    "line",
    [
        "{", "[]", '{"name": "a"}',
        '{"name": "", "sha256": "%s", "scopes": ["infer"]}' % ("0" * 64),
        '{"name": "a", "sha256": "00", "scopes": ["infer"]}',
        '{"name": "a", "sha256": "%s", "scopes": ["infer"]}' % ("A" * 64),
        '{"name": "a", "sha256": "%s", "scopes": ["infer"]}' % ("\u00e9" * 64),
        '{"name": "a", "sha256": "%s", "scopes": []}' % ("0" * 64),
        '{"name": "a", "sha256": "%s", "scopes": ["root"]}' % ("0" * 64),
        '{"name": "a", "sha256": "%s", "scopes": 5}' % ("0" * 64),
    ],
)  # fmt: skip
def test_a_line_that_is_wrong_is_told_by_its_number(tmp_path: Path, line: str) -> None:
    (tmp_path / "keys").write_text(f"# first\n{line}\n")
    with pytest.raises(ValueError, match="line 2"):
        load_keys(tmp_path / "keys")


def test_a_file_without_keys_or_with_one_name_twice_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    line = new_key("one", frozenset({"infer"}))[1].line()
    for text in ("# none\n", f"{line}\n{line}\n"):
        file.write_text(text)
        with pytest.raises(ValueError, match="each with its own name"):
            load_keys(file)


@pytest.mark.parametrize("host", ["0.0.0.0", "10.0.0.1", "::", "example.com", ""])
def test_strangers_are_not_served_without_keys(host: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"server\.api_keys"):
        check_listen(ServerConfig(host=host))
    check_listen(ServerConfig(host=host, api_keys=tmp_path / "keys"))


def test_no_application_is_built_for_strangers_without_keys(tiny_base: Path) -> None:
    nothing: Any = None
    config = Config(model=ModelConfig(path=tiny_base), server=ServerConfig(host="0.0.0.0"))
    with pytest.raises(ValueError, match=r"server\.api_keys"):
        create_app(config, nothing, nothing, nothing, nothing)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_keys(host: str) -> None:
    check_listen(ServerConfig(host=host))
    assert Authenticator(None).check(None, "admin") == ""


@pytest.mark.parametrize("header", [None, "", "Bearer", "Bearer wrong", "Basic x", "Bearer \udcff"])
def test_a_wrong_key_is_401(header: str | None) -> None:
    _, key = new_key("one", frozenset({"infer"}))
    with pytest.raises(ServeError) as caught:
        Authenticator([key]).check(header, "infer")
    assert caught.value.status == 401


def test_scopes_are_apart_and_admin_has_them_all() -> None:
    keys = {scope: new_key(scope, frozenset({scope})) for scope in ("infer", "adapters", "admin")}
    authenticator = Authenticator([key for _, key in keys.values()])
    for name, (secret, _) in keys.items():
        for scope in ("infer", "adapters", "admin"):
            header = f"bearer {secret}"
            if name in (scope, "admin"):
                assert authenticator.check(header, scope) == name
            else:
                with pytest.raises(ServeError) as caught:
                    authenticator.check(header, scope)
                assert caught.value.status == 403


@pytest.fixture
def secrets(tmp_path: Path) -> dict[str, str]:
    """Secrets of a keys file at `tmp_path / "keys"`."""
    made = {name: new_key(name, frozenset({name})) for name in ("infer", "adapters")}
    lines = [json.dumps(json.loads(key.line())) for _, key in made.values()]
    (tmp_path / "keys").write_text("\n".join(lines))
    return {name: secret for name, (secret, _) in made.items()}


@pytest.fixture
def locked(tiny_base: Path, tmp_path: Path, secrets: dict[str, str]) -> Iterator[Server]:
    with serving(tiny_base, tmp_path / "store", api_keys=tmp_path / "keys") as handle:
        yield handle


def test_every_route_but_the_operational_ones_wants_a_key(locked: Server) -> None:
    http = locked.http()
    open_paths = {"/health", "/ready", "/version", "/metrics"}
    for route in locked.app.routes:
        path = route.path.replace("{name}", "x").replace("{model:path}", "x")  # type: ignore[attr-defined]
        method = next(iter(route.methods - {"HEAD"}))  # type: ignore[attr-defined]
        reply = http.request(method, path)
        if path in open_paths:
            assert reply.status_code == 200, path
        else:
            assert reply.status_code == 401, path
            assert reply.headers["www-authenticate"] == "Bearer"


def test_a_key_opens_its_own_routes_and_names_the_tenant(
    locked: Server, secrets: dict[str, str]
) -> None:
    http = locked.http()
    infer, adapters = bearer(secrets["infer"]), bearer(secrets["adapters"])
    assert http.post("/v1/chat/completions", json=CHAT, headers=infer).status_code == 200
    assert locked.engine.requests[0].tenant == "infer"
    assert http.post("/v1/chat/completions", json=CHAT, headers=adapters).status_code == 403
    assert http.get("/v1/adapters", headers=adapters).status_code == 200
    assert http.get("/v1/adapters", headers=infer).status_code == 403


def test_the_official_client_s_key_is_understood(locked: Server, secrets: dict[str, str]) -> None:
    assert locked.client(secrets["infer"]).models.list().data[0].id == BASE


def test_a_key_that_is_not_valid_ends_before_the_body_is_read(locked: Server) -> None:
    reply = locked.http().post("/v1/completions", content=b"not json at all")
    assert reply.status_code == 401


def test_an_api_key_is_never_shown(secrets: dict[str, str]) -> None:
    key = ApiKey("a", "0" * 64, frozenset({"infer"}))
    assert secrets["infer"] not in repr(key)
