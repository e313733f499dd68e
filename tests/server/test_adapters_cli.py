"""`turnout adapters`: on the store itself, and through a server."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from adapters.store import Store
from server.adapter_admin import RemoteAdmin
from tests.conftest import MakeAdapter
from tests.server.api.harness import Server, serving
from tests.server.conftest import Turnout


@pytest.fixture
def server(tiny_base: Path, tmp_path: Path) -> Iterator[Server]:
    with serving(tiny_base, tmp_path / "served") as handle:
        yield handle


@pytest.fixture(params=["store", "url", "lock"])
def way(
    request: pytest.FixtureRequest, tiny_base: Path, tmp_path: Path
) -> Iterator[tuple[object, ...]]:
    """Options that reach a store: itself, a server by URL, or the server that the lock names."""
    if request.param == "store":
        yield "--store", tmp_path / "own"
        return
    server: Server = request.getfixturevalue("server")
    if request.param == "url":
        yield "--url", server.url
        return
    held = Store.open(tmp_path / "held", server.url)
    yield "--store", tmp_path / "held"
    held.close()


def base_of(way: tuple[object, ...], tiny_base: Path) -> tuple[object, ...]:
    """Options that name the base, where no URL is given whose server knows it."""
    return () if way[0] == "--url" else ("--base", tiny_base)


def is_unserved(way: tuple[object, ...]) -> bool:
    return Path(str(way[1])).name == "own"


def test_an_adapter_lives_from_push_to_delete(
    turnout: Turnout,
    refused: Turnout,
    way: tuple[object, ...],
    make_adapter: MakeAdapter,
    tiny_base: Path,
) -> None:
    """The same commands say the same, whichever way they go."""
    base = () if way[0] == "--url" else ("--base", tiny_base, "--base-name", "tiny")
    allow = ("--allow-other-base",) if is_unserved(way) else ()
    first, second = make_adapter(seed=1), make_adapter(seed=2, r=16)

    def adapters(*args: object) -> str:
        return turnout("adapters", *args, *way)

    assert adapters("list") == "No adapters are registered.\n"
    assert adapters("push", "bot", first, *base, *allow).startswith("bot@1 registered, digest ")
    assert adapters("push", "bot", second, "--no-publish", *base, *allow).startswith("bot@2 ")
    assert adapters("show", "bot").startswith("bot means bot@1\n")
    assert adapters("publish", "bot", 2) == "bot means bot@2\n"
    assert adapters("rollback", "bot") == "bot means bot@1\n"
    assert adapters("pin", "bot") == "bot means bot@1, pinned\n"
    shown = adapters("show", "bot")
    assert shown.startswith("bot means bot@1, pinned\n")
    numbers = [line.split()[0] for line in shown.splitlines() if line.strip()]
    assert [number for number in numbers if number.isdigit()] == ["1", "2"]
    assert adapters("unpin", "bot") == "bot means bot@1\n"
    (row,) = [line for line in adapters("list").splitlines() if "bot" in line]
    assert row.split()[:4] == ["bot", "1", "2", "8"]
    assert "no revision 7" in refused("adapters", "publish", "bot", 7, *way)
    assert "no earlier publication" in refused("adapters", "rollback", "bot", *way)
    assert "does not exist" in refused("adapters", "delete", "bot?x", *way)
    assert "bot@1 is published" in refused("adapters", "delete", "bot@1", *way)
    for wrong in ("bot@", "bot@x", "bot@-2"):
        assert "names no revision" in refused("adapters", "delete", wrong, *way)
    assert adapters("delete", "bot@2") == "bot@2 deleted\n"
    assert "no revision 2" in refused("adapters", "delete", "bot@2", *way)
    assert adapters("delete", "bot") == "bot deleted\n"
    assert "does not exist" in refused("adapters", "show", "bot", *way)


def test_a_refused_adapter_is_said_with_the_field(
    refused: Turnout, way: tuple[object, ...], make_adapter: MakeAdapter, tiny_base: Path
) -> None:
    folder = make_adapter(seed=3)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "bias": "all"}))
    base = base_of(way, tiny_base)
    assert "bias" in refused("adapters", "push", "bot", folder, *base, *way)


def test_an_adapter_trained_on_another_base_is_pushed_only_on_request(
    turnout: Turnout,
    refused: Turnout,
    way: tuple[object, ...],
    make_adapter: MakeAdapter,
    tiny_base: Path,
) -> None:
    base = base_of(way, tiny_base)
    folder = make_adapter(seed=3)
    notes = {"format": 1, "training": {"base_digest": "c" * 64}}
    (folder / "turnout.json").write_text(json.dumps(notes))

    assert "trained on base cccccccccccc" in refused("adapters", "push", "bot", folder, *base, *way)
    said = turnout("adapters", "push", "bot", folder, "--allow-mismatch", *base, *way)
    assert "bot@1 registered" in said


def test_another_bases_adapter_is_asked_of_the_server_that_holds_the_store(
    turnout: Turnout,
    refused: Turnout,
    way: tuple[object, ...],
    make_adapter: MakeAdapter,
    tiny_base: Path,
) -> None:
    base = base_of(way, tiny_base)
    words = ("adapters", "push", "bot", make_adapter(), "--allow-other-base", *base, *way)
    if is_unserved(way):
        assert "bot@1 registered" in turnout(*words)
    else:
        assert "when it was started with that option" in refused(*words)


def test_a_long_name_is_never_cut_in_a_list(
    turnout: Turnout, make_adapter: MakeAdapter, tiny_base: Path, tmp_path: Path
) -> None:
    name, store = "n" * 64, ("--store", tmp_path / "own")
    allow = ("--base", tiny_base, "--allow-other-base")
    said = turnout("adapters", "push", name, make_adapter(), *allow, *store)
    digest = said.split()[-1]
    (row,) = (line for line in turnout("adapters", "list", *store).splitlines() if name in line)
    assert digest in row


def test_a_list_says_who_is_served_merged_if_anybody_is(
    turnout: Turnout, server: Server, make_adapter: MakeAdapter
) -> None:
    for seed, name in enumerate(("bot", "n" * 64)):
        server.registry.push(name, make_adapter(seed=seed, r=2))
    way = ("--url", server.url)
    assert "path" not in turnout("adapters", "list", *way)
    digest = server.registry.resolve("bot").digest
    server.run(server.services.merged.load(digest, "artifact", Path("artifact")))
    heading, _, *rows = turnout("adapters", "list", *way).strip().splitlines()
    assert "path" in heading.split()
    assert {row.split()[0]: row.split()[-2] for row in rows} == {
        "bot": "merged",
        "n" * 64: "adapter",
    }
    assert "merged" in turnout("adapters", "show", "bot", *way)
    server.registry.push("bot", make_adapter(seed=5, r=2))
    assert "path" not in turnout("adapters", "list", *way)
    old, new = turnout("adapters", "show", "bot", *way).strip().splitlines()[-2:]
    assert (old.split()[-2], new.split()[-2]) == ("merged", "adapter")


def test_a_folder_without_an_adapter_is_refused(
    refused: Turnout, way: tuple[object, ...], tiny_base: Path, tmp_path: Path
) -> None:
    base = base_of(way, tiny_base)
    assert "adapter_config.json" in refused("adapters", "push", "bot", tmp_path, *base, *way)


def test_a_store_held_by_nobody_who_serves_is_said_to_be_held(
    refused: Turnout, tmp_path: Path
) -> None:
    held = Store.open(tmp_path / "held")
    assert "held by another process" in refused("adapters", "list", "--store", tmp_path / "held")
    held.close()


def test_a_server_that_does_not_answer_is_named(refused: Turnout) -> None:
    url = "http://127.0.0.1:9"
    assert f"{url} does not answer" in refused("adapters", "list", "--url", url)
    said = refused("adapters", "list", "--url", "http://127.0.0.1:port")
    assert said == "turnout: --url is 'http://127.0.0.1:port': Invalid port: 'port'\n"


def test_no_name_is_no_adapter_and_nothing_is_said_to_be_deleted(
    refused: Turnout, way: tuple[object, ...]
) -> None:
    for command in ("show", "delete"):
        assert refused("adapters", command, "", *way).startswith("turnout: ")


def test_an_answer_that_is_none_is_not_taken_for_success() -> None:
    redirect = httpx.MockTransport(lambda request: httpx.Response(307))
    with httpx.Client(base_url="http://proxy", transport=redirect) as client:
        admin = RemoteAdmin(client, Console())
        with pytest.raises(ValueError, match="http://proxy/v1/adapters/bot answered 307"):
            admin.delete("bot")


def test_the_api_key_opens_a_server_that_wants_one(
    turnout: Turnout, refused: Turnout, tiny_base: Path, tmp_path: Path
) -> None:
    keys = tmp_path / "keys"
    secret = turnout("keys", "new", "ops", "--file", keys, "--scope", "adapters").strip()
    with serving(tiny_base, tmp_path / "served", api_keys=keys) as server:
        assert "API key" in refused("adapters", "list", "--url", server.url)
        turnout("adapters", "list", "--url", server.url, "--api-key", secret)


def test_a_held_store_is_reached_without_reading_the_base(
    turnout: Turnout, server: Server, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    held = Store.open(tmp_path / "held", server.url)
    said = turnout("adapters", "push", "bot", make_adapter(), "--store", tmp_path / "held")
    held.close()
    assert said.startswith("bot@1 registered")
    assert not (tmp_path / "state" / "base").exists()  # where the default base would be made
