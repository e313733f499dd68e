"""What `turnout promote`, `demote` and `candidates` do: through the server, or on the store itself.

Without a server a promotion is only made; the next server that opens the store serves it.
"""

import contextlib
import hashlib
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import httpx

from adapters.catalog import Revision
from adapters.manifest import AdapterConflict, AdapterNotFound, StoreBusy
from adapters.promotions import JobFolder, PromotionRequest
from adapters.registry import Registry
from adapters.store import file_sha256
from server.adapter_admin import Card, error_text, open_registry
from server.base_digest import base_digest
from server.config import AdapterConfig, ModelConfig
from server.promotion.jobs import Jobs

_TIMEOUT_S = 60.0
_MAX_INLINE = 3 << 20  # bytes of rows that are sent; of more the server is told the path

MakeBase = Callable[[], ModelConfig]
Files = Mapping[str, Path]  # rows, eval_rows


class PromotionAdmin(Protocol):
    """One operator's view of a store's promotions."""

    def promote(self, name: str, revision: int | None, files: Files, options: Card) -> bool:
        """Start a promotion. False: the revision has just such an artifact already."""
        ...

    def job(self, name: str, revision: int | None) -> Card:
        """How far the promotion is: status, stage, fraction, message, result."""
        ...

    def cancel(self, name: str) -> Card: ...

    def demote(self, name: str, revision: int | None, *, keep: bool) -> Card: ...

    def candidates(self, batch: int | None) -> Card:
        """Raises ValueError where no server counts tokens."""
        ...


class RemotePromotions:
    """Works through a server. What it answers with an error is raised as ValueError."""

    def __init__(self, client: httpx.Client) -> None:
        self._client = client

    def promote(self, name: str, revision: int | None, files: Files, options: Card) -> bool:
        body = {**options, "revision": revision}
        for field, path in files.items():
            if _fits_inline(path):
                body[f"{field}_jsonl"] = path.read_text(encoding="utf-8")
            else:
                body[field] = str(path.resolve())
        reply = self._call("POST", f"{_at(name)}/promote", json=body)
        return reply.get("object") == "adapter.promotion"

    def job(self, name: str, revision: int | None) -> Card:
        query = {} if revision is None else {"revision": revision}
        card = self._call("GET", f"{_at(name)}/promotion", params=query)
        if card["job"] is None:
            raise ValueError(f"There is no promotion of {name}.")
        return {**card["job"], "path": card["path"], "why": card["message"]}

    def cancel(self, name: str) -> Card:
        return self._call("DELETE", f"{_at(name)}/promotion")

    def demote(self, name: str, revision: int | None, *, keep: bool) -> Card:
        body = {"revision": revision, "keep": keep}
        return self._call("POST", f"{_at(name)}/demote", json=body)

    def candidates(self, batch: int | None) -> Card:
        query = {} if batch is None else {"batch": batch}
        return self._call("GET", "/v1/candidates", params=query)

    def _call(self, method: str, path: str, **content: Any) -> Card:
        try:
            response = self._client.request(method, path, **content)
        except httpx.TransportError as error:
            raise ValueError(f"{self._client.base_url} does not answer: {error}") from None
        if response.is_error:
            raise ValueError(error_text(response))
        return dict(response.json())


class LocalPromotions:
    """Works on a store that nobody serves, and holds it only while it changes something."""

    def __init__(self, adapters: AdapterConfig, make_base: MakeBase) -> None:
        self._adapters, self._make_base = adapters, make_base
        self._folder: JobFolder | None = None  # of the promotion that is followed

    def promote(self, name: str, revision: int | None, files: Files, options: Card) -> bool:
        model = self._make_base()
        digest = base_digest(model.path)
        with self._open() as registry:
            found = _revision(registry, name, revision)
            if found.base_digest != digest:
                raise AdapterConflict(
                    f"The adapter {found.id} was registered for base {found.base_digest[:12]}; "
                    f"--base is {digest[:12]}."
                )
            contents = {field: path.read_bytes() for field, path in files.items()}
            rows: dict[str, Any] = {}
            for field, path in files.items():
                rows[field] = str(path.resolve())
                rows[f"{field}_sha256"] = hashlib.sha256(contents[field]).hexdigest()
            if (text := options.get("text")) is not None:
                rows["text_sha256"] = file_sha256(text)
            request = PromotionRequest(
                job=uuid.uuid4().hex,
                adapter_digest=found.digest,
                revision=found.id,
                store=str(registry.root.resolve()),
                base=str(model.path.resolve()),
                base_name=model.name,
                base_digest=digest,
                **rows,
                **options,
            )
            if registry.artifacts.reuse(found.digest, request.settings):
                return False
            kept = {field: contents[field] for field, path in files.items() if _fits_inline(path)}
            Jobs(registry.root).start(request, kept)
            self._folder = JobFolder.of(registry.root, found.digest)
        return True

    def job(self, name: str, revision: int | None) -> Card:
        if self._folder is None:
            with self._open() as registry:
                digest = _revision(registry, name, revision).digest
                self._folder = JobFolder.of(registry.root, digest)
        is_running = self._folder.is_running()  # before the state, which its end writes
        state, request = self._folder.state(), self._folder.request()
        if state is None or request is None:
            raise ValueError(f"There is no promotion of {name}.")
        if not state.has_ended and not is_running:
            raise ValueError(f"the promotion of {request.revision} died; see {self._folder.log}")
        return {
            "id": request.revision,
            "status": state.status,
            "stage": state.stage,
            "fraction": state.fraction,
            "message": state.message,
            "result": state.result,
            "path": "adapter",
            "why": "no server runs; the next one that starts on this store loads it",
        }

    def cancel(self, name: str) -> Card:
        with self._open() as registry:
            jobs = Jobs(registry.root)
            under_way = set(jobs.running())
            for revision in registry.revisions(name):
                if revision.digest in under_way:
                    return {"id": revision.id, "status": jobs.cancel(revision.digest).status}
        raise AdapterNotFound(f"No promotion of {name} is under way.")

    def demote(self, name: str, revision: int | None, *, keep: bool) -> Card:
        with self._open() as registry:
            found = _revision(registry, name, revision)
            if JobFolder.of(registry.root, found.digest).is_running():
                raise AdapterConflict(f"A promotion of {found.id} is under way; cancel it first.")
            artifact = registry.artifacts.find(found.digest)
            if artifact is None:
                raise AdapterConflict(f"The adapter {found.id} is not promoted.")
            if keep:
                registry.artifacts.demote(artifact.digest)
            else:
                registry.artifacts.remove_of(found.digest)
        return {"id": found.id, "artifact": artifact.digest, "kept": keep}

    def candidates(self, batch: int | None) -> Card:
        raise ValueError("no server holds this store; estimates need one that serves")

    @contextlib.contextmanager
    def _open(self) -> Iterator[Registry]:
        with contextlib.closing(open_registry(self._adapters)) as registry:
            yield registry


@contextlib.contextmanager
def open_promotions(
    adapters: AdapterConfig,
    make_base: MakeBase,
    *,
    url: str | None = None,
    api_key: str | None = None,
) -> Iterator[PromotionAdmin]:
    """Work through `url`, or the server that holds the store, or on the store itself.

    Raises StoreBusy while a process that serves nothing holds the store.
    """
    if url is None:
        try:
            open_registry(adapters).close()
        except StoreBusy as busy:
            if busy.url is None:
                raise
            url = busy.url
    if url is None:
        yield LocalPromotions(adapters, make_base)
        return
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=_TIMEOUT_S, trust_env=False) as client:
        yield RemotePromotions(client)


def _revision(registry: Registry, name: str, number: int | None) -> Revision:
    if number is not None:
        return registry.resolve(f"{name}@{number}")
    return registry.resolve(name)


def _fits_inline(rows: Path) -> bool:
    return rows.suffix == ".jsonl" and rows.stat().st_size <= _MAX_INLINE


def _at(name: str) -> str:
    return "/v1/adapters/" + urllib.parse.quote(name, safe="")
