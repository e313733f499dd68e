"""What `turnout adapters` does: through the server that holds the store, else on the store itself.

Both ways return the JSON objects of the HTTP routes; the store alone knows nothing of residence.
"""

import contextlib
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import httpx
from rich.console import Console
from rich.progress import Progress

from adapters.catalog import Adapter, Revision
from adapters.folder import CONFIG_FILE, SIDECAR_FILE, WEIGHTS_FILE
from adapters.manifest import BaseShape, BaseText, Limits, StoreBusy
from adapters.registry import Registry
from adapters.store import Store
from server.base_digest import base_digest
from server.config import AdapterConfig, ModelConfig

EXAMPLES = Path(__file__).parent.parent / "adapters" / "examples"
_TIMEOUT_S = 60.0  # for any answer: a push validates and syncs before it answers

Card = dict[str, Any]
ReadText = Callable[[Path], BaseText]  # of a checkpoint folder


class Admin(Protocol):
    """One operator's view of a store."""

    def list_all(self) -> list[Card]: ...

    def show(self, name: str) -> tuple[Card, list[Card]]:
        """The adapter and its revisions."""
        ...

    def push(self, name: str, folder: Path, *, publish: bool, allow_mismatch: bool = False) -> Card:
        """Register a revision and return it, with `mismatches` beside it."""
        ...

    def change(self, name: str, action: str, revision: int | None = None) -> Card:
        """Do `action`: publish (a revision), rollback, pin or unpin."""
        ...

    def delete(self, name: str, revision: int | None = None) -> None:
        """Forget one revision, or the name."""
        ...


class LocalAdmin:
    """Works on a store that this process holds."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry

    def list_all(self) -> list[Card]:
        return [adapter_card(adapter) for adapter in self._registry.list()]

    def show(self, name: str) -> tuple[Card, list[Card]]:
        revisions = [revision_card(revision) for revision in self._registry.revisions(name)]
        return adapter_card(self._registry.get(name)), revisions

    def push(self, name: str, folder: Path, *, publish: bool, allow_mismatch: bool = False) -> Card:
        revision = self._registry.push(name, folder, publish=publish, allow_mismatch=allow_mismatch)
        return {**revision_card(revision), "mismatches": revision.source["mismatches"]}

    def change(self, name: str, action: str, revision: int | None = None) -> Card:
        if action == "publish":
            assert revision is not None, "publish names a revision"
            self._registry.publish(name, revision)
        elif action == "rollback":
            self._registry.rollback(name)
        elif action == "pin":
            self._registry.pin(name)
        else:
            assert action == "unpin", action
            self._registry.unpin(name)
        return adapter_card(self._registry.get(name))

    def delete(self, name: str, revision: int | None = None) -> None:
        if revision is None:
            self._registry.delete(name)
        else:
            self._registry.delete_revision(name, revision)


class RemoteAdmin:
    """Works through a server. What it answers with an error is raised as ValueError."""

    def __init__(self, client: httpx.Client, console: Console) -> None:
        self._client, self._console = client, console

    def list_all(self) -> list[Card]:
        return list(self._call("GET", "")["data"])

    def show(self, name: str) -> tuple[Card, list[Card]]:
        card, revisions = self._call("GET", _at(name)), self._call("GET", f"{_at(name)}/revisions")
        return card, list(revisions["data"])

    def push(self, name: str, folder: Path, *, publish: bool, allow_mismatch: bool = False) -> Card:
        fields = {"name": name, "publish": "true" if publish else "false"}
        if allow_mismatch:
            fields["allow_mismatch"] = "true"
        with contextlib.ExitStack() as stack:
            progress = stack.enter_context(_progress(self._console))
            files = {}
            for file in (CONFIG_FILE, WEIGHTS_FILE, SIDECAR_FILE):
                if (folder / file).is_file():
                    opened = progress.open(folder / file, "rb", description=f"Sending {file}")
                    files[file] = (file, stack.enter_context(opened))
            if CONFIG_FILE not in files:
                raise ValueError(f"{folder} holds no {CONFIG_FILE}")
            reply = self._call("POST", "", data=fields, files=files)
            return {**reply["revision"], "mismatches": reply.get("mismatches", {})}

    def change(self, name: str, action: str, revision: int | None = None) -> Card:
        body = {} if revision is None else {"revision": revision}
        return self._call("POST", f"{_at(name)}/{action}", json=body)

    def delete(self, name: str, revision: int | None = None) -> None:
        self._call("DELETE", _at(name) if revision is None else f"{_at(name)}/revisions/{revision}")

    def _call(self, method: str, path: str, **content: Any) -> Card:
        try:
            response = self._client.request(method, f"/v1/adapters{path}", **content)
        except httpx.TransportError as error:
            raise ValueError(f"{self._client.base_url} does not answer: {error}") from None
        if not response.is_success:
            raise ValueError(error_text(response))
        return dict(response.json()) if response.content else {}


@contextlib.contextmanager
def open_admin(
    adapters: AdapterConfig,
    console: Console,
    *,
    base: Callable[[], ModelConfig] | None = None,
    text: ReadText | None = None,
    url: str | None = None,
    api_key: str | None = None,
) -> Iterator[Admin]:
    """Work through `url`, or the server that holds the store, or on the store itself.

    Only work on the store itself calls `base` and `text`, which reads that base's tokenizer.
    Raises StoreBusy while a process that serves nothing holds the store.
    """
    if url is None:
        try:
            registry = open_registry(adapters, base, text)
        except StoreBusy as busy:
            if busy.url is None:
                raise
            url = busy.url
        else:
            with contextlib.closing(registry):
                yield LocalAdmin(registry)
            return
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    try:
        client = httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S, trust_env=False)
    except httpx.InvalidURL as error:
        raise ValueError(f"--url is {url!r}: {error}") from None
    with client:
        yield RemoteAdmin(client, console)


def open_registry(
    adapters: AdapterConfig,
    base: Callable[[], ModelConfig] | None = None,
    text: ReadText | None = None,
) -> Registry:
    """Open the store. Raises StoreBusy, before the base is read, while another process holds it."""
    store = Store.open(adapters.store)
    try:
        shape = base_shape(base(), text) if base else None
        return Registry(store, shape, limits(adapters))
    except BaseException:
        store.close()
        raise


def base_shape(model: ModelConfig, text: ReadText | None = None) -> BaseShape:
    """What adapters for this base are checked against. Reads the whole checkpoint.

    Without `text`, prompts are not compared with those that adapters were trained on.
    """
    return BaseShape.from_config(
        model.path, model.name, base_digest(model.path), text=text(model.path) if text else None
    )


def limits(adapters: AdapterConfig) -> Limits:
    """What an adapter may need at most, by these options."""
    return Limits(
        max_rank=adapters.max_rank,
        max_bank_rows=adapters.bank_rows,
        page_rows=adapters.page_rows,
        max_bytes=adapters.max_upload_bytes,
        allow_other_base=adapters.allow_other_base,
    )


def register_examples(registry: Registry) -> None:
    """Register the example adapters under their folders' names, where those are not taken."""
    taken = {adapter.name for adapter in registry.list()}
    for config in sorted(EXAMPLES.glob(f"*/{CONFIG_FILE}")):
        if config.parent.name not in taken:
            registry.push(config.parent.name, config.parent)


def adapter_card(adapter: Adapter) -> Card:
    """An adapter as GET /v1/adapters/{name} shows it."""
    return {
        "name": adapter.name,
        "created": int(adapter.created),
        "pinned": adapter.pinned,
        "num_revisions": adapter.num_revisions,
        "current": None if adapter.current is None else revision_card(adapter.current),
    }


def revision_card(revision: Revision) -> Card:
    """A revision as GET /v1/adapters/{name}/revisions lists it."""
    return {
        "id": revision.id,
        "revision": revision.number,
        "digest": revision.digest,
        "created": int(revision.created),
        "max_rank": revision.max_rank,
        "num_bytes": revision.num_bytes,
    }


def _progress(console: Console) -> Progress:
    """A bar that is gone when done, and is never there where nobody watches."""
    return Progress(console=console, transient=True, disable=not console.is_terminal)


def _at(name: str) -> str:
    """The adapter's path below /v1/adapters, whatever was typed as its name."""
    return "/" + urllib.parse.quote(name, safe="")


def error_text(response: httpx.Response) -> str:
    """The server's own message where there is one."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        said = str(response.json()["error"]["message"])
        hint = " (--api-key, or TURNOUT_API_KEY)" if response.status_code == 401 else ""
        return said + hint
    return f"{response.request.url} answered {response.status_code}"
