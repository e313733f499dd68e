"""Which adapters there are: push, publish, roll back, pin, lease, delete.

Rows live in SQLite (rows.py) and, for reading, in memory (catalog.py). An object is in the store
before a row names it and leaves after its last row and its last lease have gone; `open` sweeps
what a crash left between.
"""

import hashlib
import itertools
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.artifacts import ArtifactStore
from adapters.catalog import Adapter, Catalog, Entry, Lease, Revision, Usage
from adapters.manifest import (
    AdapterConflict,
    AdapterLost,
    AdapterManifest,
    AdapterRefused,
    BaseShape,
    Limits,
    show,
)
from adapters.promotions import JobFolder
from adapters.rope import scaling_of
from adapters.rows import Rows
from adapters.store import StagedObject, Store

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
KEY = re.compile(r"[\x21-\x7e]{1,255}")
KEY_LIFE_S = 24 * 3600.0  # an idempotency key is remembered this long

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """What became of the digests that nothing names since a deletion."""

    freed: tuple[str, ...]
    draining: tuple[str, ...]  # still leased; freed, with `on_free`, when the last lease ends


def _ignore(digest: str) -> None:
    pass


class Registry:
    """Owns the store and its rows. Every method may be called from any thread.

    Invariant: each row's object is in the store, and each object has a row or a lease.
    `on_free(digest)` is called once a digest has neither, in the thread that ended the last one; it
    must return quickly and call nothing here.
    """

    def __init__(
        self,
        store: Store,
        base: BaseShape | None = None,
        limits: Limits | None = None,
        *,
        on_free: Callable[[str], None] = _ignore,
    ) -> None:
        self._store, self._base, self._limits = store, base, limits or Limits()
        self._on_free = on_free
        self._writing = threading.Lock()  # one writer of rows and objects
        self._catalog = Catalog()
        self._lost: set[str] = set()  # digests whose object somebody took out of the store
        self.artifacts = ArtifactStore(store.root)  # what revisions were promoted to
        self._rows = Rows(store.root / "registry.sqlite")
        try:
            self._load()
        except BaseException:
            self._rows.close()
            raise

    @classmethod
    def open(
        cls,
        root: Path,
        base: BaseShape | None = None,
        limits: Limits | None = None,
        *,
        url: str | None = None,
        on_free: Callable[[str], None] = _ignore,
    ) -> "Registry":
        """Open the store at `root` and its rows. Without a base nothing can be pushed.

        Raises StoreBusy, with the holder's url, while another process holds the store; ValueError
        for rows that cannot be read, and where an adapter has the base's name.
        """
        store = Store.open(root, url)
        try:
            return cls(store, base, limits, on_free=on_free)
        except BaseException:
            store.close()
            raise

    @property
    def root(self) -> Path:
        """The store's folder."""
        return self._store.root

    @property
    def base_digest(self) -> str | None:
        """What adapters are checked against; None where nothing can be pushed."""
        return None if self._base is None else self._base.digest

    def close(self) -> None:
        """Close rows and store. Objects that leases still hold are swept by the next open."""
        with self._writing:
            self._rows.close()
            self._store.close()

    def list(self) -> list[Adapter]:
        """Every adapter, by name."""
        return self._catalog.views()

    def get(self, name: str) -> Adapter:
        """One adapter. Raises AdapterNotFound."""
        return self._catalog.view(name)

    def has(self, name: str) -> bool:
        """Whether the name exists."""
        return self._catalog.has(name)

    def revisions(self, name: str) -> tuple[Revision, ...]:
        """An adapter's revisions, oldest first. Raises AdapterNotFound."""
        return self._catalog.revisions(name)

    def names_of(self, digest: str) -> tuple[str, ...]:
        """The adapters that have a revision with this digest, by name."""
        return self._catalog.names_of(digest)

    def resolve(self, model: str) -> Revision:
        """The revision that `name` or `name@number` means now.

        Raises AdapterNotFound, or AdapterConflict where it was registered for another base.
        """
        revision = self._catalog.resolve(model)
        self._check_servable(revision)
        return revision

    def lease(self, model: str) -> Lease:
        """Resolve and keep the revision's object until the lease is released."""
        lease = Lease(self, self._catalog.lease(model))
        try:
            self._check_servable(lease.revision)
        except BaseException:
            lease.release()
            raise
        return lease

    def release(self, lease: Lease) -> None:
        """End a lease: `Lease.release` calls this, once."""
        digest = lease.revision.digest
        if self._catalog.unlease(digest):
            with self._writing:
                self._free_if_unused(digest)

    def num_leases(self, digest: str) -> int:
        """How many leases hold this digest."""
        return self._catalog.num_leases(digest)

    def manifest(self, digest: str) -> AdapterManifest:
        """Read an object's manifest from disk."""
        return self._store.manifest(digest)

    def push(
        self,
        name: str,
        folder: Path,
        *,
        publish: bool = True,
        replace: bool = True,
        idempotency_key: str | None = None,
        allow_mismatch: bool = False,
    ) -> Revision:
        """Validate the adapter in `folder`, store it, register it as a revision of `name`.

        Content that `name` has had before gives that revision again. With `replace` off, a name
        that exists is an AdapterConflict; so is an idempotency key used for another request.
        `allow_mismatch` takes an adapter whose turnout.json names another base, chat template or
        tokens than this base's, and notes what differs.
        """
        self._check_name(name)
        if idempotency_key is not None and not KEY.fullmatch(idempotency_key):
            raise AdapterRefused("Idempotency-Key", "is not 1 to 255 printable ASCII characters")
        if self._base is None:
            raise AdapterRefused("base", "none was given, so no adapter can be checked")
        staged = self._store.stage(folder, self._base, self._limits, allow_mismatch=allow_mismatch)
        try:
            with self._writing:
                return self._register(name, staged, publish, replace, idempotency_key)
        finally:
            staged.discard()

    def publish(self, name: str, number: int) -> Revision:
        """Make revision `number` what `name` means. Requests under way keep theirs."""
        with self._writing:
            revision = self._catalog.revision(name, number)
            published = self._catalog.published(name)
            if published[-1:] != (number,):
                with self._rows.transaction():
                    self._rows.add_publication(name, len(published), number)
                self._catalog.put_revision(revision, publish=True)
                log.info("adapter published", extra={"adapter": revision.id})
            return revision

    def rollback(self, name: str) -> Revision:
        """Go back to what was published before the current revision. Raises AdapterConflict."""
        with self._writing:
            published = self._catalog.published(name)
            if len(published) < 2:
                raise AdapterConflict(f"The adapter {name} has no earlier publication.")
            with self._rows.transaction():
                self._rows.remove_publication(name, len(published) - 1)
            revision = self._catalog.unpublish(name)
            log.info("adapter rolled back", extra={"adapter": revision.id})
            return revision

    def pin(self, name: str) -> Adapter:
        """Ask that the adapter stay in the bank."""
        return self._set_pinned(name, True)

    def unpin(self, name: str) -> Adapter:
        """Take `pin` back."""
        return self._set_pinned(name, False)

    def delete(self, name: str) -> Deletion:
        """Forget the name at once; free each of its digests when the last lease ends."""
        with self._writing:
            self._catalog.view(name)  # raises AdapterNotFound
            with self._rows.transaction():
                self._rows.remove_adapter(name)
            unnamed = self._catalog.remove_entry(name)
            log.info("adapter deleted", extra={"adapter": name})
            return self._free(unnamed)

    def delete_revision(self, name: str, number: int) -> Deletion:
        """Forget a revision that `name` does not mean; free its digest when the last lease ends.

        Its number is not given again, and rolling back passes it over. Raises AdapterNotFound, and
        AdapterConflict for what is published and for the only revision.
        """
        with self._writing:
            revision = self._catalog.revision(name, number)
            published = self._catalog.published(name)
            if len(self._catalog.revisions(name)) == 1:
                raise AdapterConflict(f"{revision.id} is the only revision; delete the adapter.")
            if published[-1:] == (number,):
                raise AdapterConflict(
                    f"{revision.id} is published; publish another revision first."
                )
            left = [each for each, _ in itertools.groupby(n for n in published if n != number)]
            with self._rows.transaction():
                self._rows.remove_revision(name, number, left)
            unnamed = self._catalog.remove_revision(revision, left)
            log.info("revision deleted", extra={"adapter": revision.id})
            return self._free(unnamed)

    def usage(self) -> dict[str, int]:
        """Tokens served so far, by digest."""
        with self._writing:
            return {digest: usage.tokens for digest, usage in self._rows.usage().items()}

    def popularity(self) -> dict[str, Usage]:
        """Tokens served by digest, ever and lately."""
        with self._writing:
            return self._rows.usage()

    def add_usage(self, tokens: Mapping[str, int]) -> None:
        """Count tokens served per digest. One synced write: call it every few seconds."""
        now = time.time()
        with self._writing, self._rows.transaction():
            known = self._rows.usage()
            for digest in tokens.keys() & self._catalog.digests():
                before = known.get(digest, Usage())
                self._rows.put_usage(digest, before.plus(tokens[digest], now))

    def _load(self) -> None:
        """Fill memory from the rows, sweep the store, and tell of objects that are not there."""
        entries = {entry.name: entry for entry in self._rows.adapters()}
        for revision in self._rows.revisions():
            entries[revision.name].revisions[revision.number] = revision
        for name, number in self._rows.publications():
            entries[name].published.append(number)
        if self._base is not None and self._base.name in entries:
            raise ValueError(
                f"an adapter is named {self._base.name}, as the base is: give the base another "
                "name, or delete the adapter"
            )
        for entry in entries.values():
            self._catalog.add_entry(entry)
        named = self._catalog.digests()
        for stray in self._store.sweep(named):
            log.warning("swept %s, which no row names", stray)
        for stray in self.artifacts.sweep(named):
            log.warning("swept artifact %s, which serves no revision any more", stray)
        self._lost = {digest for digest in named if not self._store.has(digest)}
        for digest in self._lost:
            log.error("the store has lost object %s; push its adapter again", digest)

    def _register(
        self, name: str, staged: StagedObject, publish: bool, replace: bool, key: str | None
    ) -> Revision:
        """Put the object, write its rows in one transaction, then show it. The writer calls it."""
        fingerprint = _hash([name, staged.digest, publish])
        answered = self._answered(key, fingerprint)
        if answered is not None:
            return answered
        is_new = not self._catalog.has(name)
        if not is_new and not replace:
            raise AdapterConflict(f"The adapter {name} exists already.")
        known = () if is_new else self._catalog.revisions(name)
        published = () if is_new else self._catalog.published(name)
        revision = self._revision(name, staged, known)
        will_publish = publish and published[-1:] != (revision.number,)
        created = time.time()
        try:
            self._store.put(staged)
            with self._rows.transaction():
                if is_new:
                    self._rows.add_adapter(name, created)
                self._rows.put_revision(revision)
                if will_publish:
                    self._rows.add_publication(name, len(published), revision.number)
                if key is not None:
                    self._rows.add_key(key, fingerprint, revision, created)
        except BaseException:
            self._free_if_unused(staged.digest)
            raise
        if is_new:
            published = (revision.number,) if publish else ()
            revisions = {revision.number: revision}
            self._catalog.add_entry(Entry(name, created, False, revisions, list(published)))
        else:
            self._catalog.put_revision(revision, publish=will_publish)
        self._lost.discard(revision.digest)
        log.info("adapter registered", extra={"adapter": revision.id})
        for field, difference in staged.mismatches.items():
            log.warning("%s: %s", field, difference, extra={"adapter": revision.id})
        return revision

    def _answered(self, key: str | None, fingerprint: str) -> Revision | None:
        """What this idempotency key was answered with. Raises AdapterConflict on another use."""
        if key is None:
            return None
        self._rows.remove_keys(before=time.time() - KEY_LIFE_S)
        row = self._rows.key(key)
        if row is None:
            return None
        used_for, name, number = row
        if used_for != fingerprint:
            raise AdapterConflict("The Idempotency-Key was used for another request.")
        return self._catalog.revision(name, number)

    def _revision(self, name: str, staged: StagedObject, known: tuple[Revision, ...]) -> Revision:
        """The revision this object is: the one it was before under this name, or the next."""
        assert self._base is not None, "push checks it"
        same = [revision for revision in known if revision.digest == staged.digest]
        manifest = staged.manifest
        return Revision(
            name=name,
            number=same[0].number if same else self._catalog.next_number(name),
            digest=staged.digest,
            created=same[0].created if same else time.time(),
            max_rank=manifest.max_rank,
            num_rank_rows=manifest.num_rank_rows,
            num_parameters=manifest.num_parameters,
            num_bytes=manifest.num_bytes,
            chat_template=manifest.chat_template,
            base_digest=self._base.digest,
            base_fingerprint=_base_fingerprint(self._base),
            source={
                "base": staged.declared_base,
                "training": staged.training,
                "mismatches": staged.mismatches,
            },
            rope=scaling_of(manifest.rope),
        )

    def _set_pinned(self, name: str, pinned: bool) -> Adapter:
        with self._writing:
            self._catalog.view(name)  # raises AdapterNotFound
            with self._rows.transaction():
                self._rows.set_pinned(name, pinned)
            return self._catalog.set_pinned(name, pinned)

    def _free(self, unnamed: set[str]) -> Deletion:
        """Delete the objects that no lease needs. The writer calls it."""
        freed = {digest for digest in unnamed if self._free_if_unused(digest)}
        return Deletion(freed=tuple(sorted(freed)), draining=tuple(sorted(unnamed - freed)))

    def _free_if_unused(self, digest: str) -> bool:
        """Delete the object unless a row or a lease needs it. The writer calls it."""
        is_there = self._store.has(digest) or digest in self._lost
        if not is_there or not self._catalog.is_unused(digest):
            return False
        self._store.remove(digest)
        self.artifacts.remove_of(digest)
        promotion = JobFolder.of(self.root, digest)
        if not promotion.is_running():  # else it goes with the job, which its starter ends
            promotion.delete()
        self._lost.discard(digest)
        self._on_free(digest)
        return True

    def _check_name(self, name: str) -> None:
        if not NAME.fullmatch(name):
            raise AdapterRefused("name", f"{show(name)} does not match {NAME.pattern}")
        if self._base is not None and name == self._base.name:
            raise AdapterRefused("name", f"{name} is the base's own")

    def _check_servable(self, revision: Revision) -> None:
        """Refuse a revision whose object is lost, or that was checked against another base."""
        if revision.digest in self._lost:
            raise AdapterLost(f"The store has lost {revision.id}; push it again.")
        base = self._base
        if base is None or revision.base_digest == base.digest:
            return
        fits = revision.base_fingerprint == _base_fingerprint(base)
        if not (fits and self._limits.allow_other_base):
            raise AdapterConflict(
                f"The adapter {revision.id} was registered for base {revision.base_digest[:12]}; "
                f"this server's is {base.digest[:12]}. Push it again."
            )


def _base_fingerprint(base: BaseShape) -> str:
    """Which adapters' tensors fit the base."""
    return _hash([base.num_layers, {name: list(shape) for name, shape in base.linears.items()}])


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
