"""The registry's rows as they stand in memory, and who leases what.

Resolving a name for a request touches no disk and waits for no writer.
"""

import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Protocol

from adapters.manifest import AdapterNotFound, show
from adapters.rope import RopeScaling

HALF_LIFE_S = 6 * 3600.0  # of popularity
_MODEL = re.compile(r"(?P<name>[^@]+)(?:@(?P<number>[1-9][0-9]{0,8}))?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Revision:
    """One immutable upload of an adapter."""

    name: str
    number: int  # 1 is the first
    digest: str
    created: float  # unix seconds
    max_rank: int
    num_rank_rows: int  # bank rows it takes, the gain row of DoRA included
    num_parameters: int
    num_bytes: int
    chat_template: str | None  # to use in place of the base's
    base_digest: str  # of the base it was checked against
    base_fingerprint: str  # of that base's shapes
    source: dict[str, Any]  # where it came from; changes no answer
    rope: RopeScaling | None = None  # None: the base's own

    @property
    def id(self) -> str:
        """`name@number`, which resolves to this revision for as long as the name exists."""
        return f"{self.name}@{self.number}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """A name and what it points to."""

    name: str
    current: Revision | None  # None: nothing is published yet
    pinned: bool
    created: float  # unix seconds
    num_revisions: int


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens that a digest has served."""

    tokens: int = 0  # ever
    recent: float = 0.0  # each counted less the longer ago it was: half after HALF_LIFE_S
    as_of: float = 0.0  # unix seconds; what `recent` was then

    def recent_at(self, now: float) -> float:
        """`recent` as it has come to be by now."""
        age_s = max(now - self.as_of, 0.0)  # a clock that was set back makes nothing grow
        return float(self.recent * 0.5 ** (age_s / HALF_LIFE_S))

    def plus(self, tokens: int, now: float) -> "Usage":
        """The same with tokens served now."""
        return Usage(self.tokens + tokens, self.recent_at(now) + tokens, now)


@dataclass(slots=True)
class Entry:
    """A name, its revisions, and its stack of publications."""

    name: str
    created: float
    pinned: bool = False
    revisions: dict[int, Revision] = field(default_factory=dict)
    published: list[int] = field(default_factory=list)  # the last is current
    last_deleted: int = 0  # the highest number that a deleted revision had

    def revision(self, number: int) -> Revision:
        """Look up a revision. Raises AdapterNotFound."""
        if number not in self.revisions:
            raise AdapterNotFound(f"The adapter {self.name} has no revision {number}.")
        return self.revisions[number]

    def current(self) -> Revision | None:
        """What the bare name means."""
        return self.revisions[self.published[-1]] if self.published else None

    def view(self) -> Adapter:
        """This entry as it is now."""
        return Adapter(
            name=self.name,
            current=self.current(),
            pinned=self.pinned,
            created=self.created,
            num_revisions=len(self.revisions),
        )


class Releases(Protocol):
    """Whoever gave a lease takes it back."""

    def release(self, lease: "Lease") -> None:
        """End the lease."""


class Lease:
    """Keeps one revision's object in the store until released. Releasing twice is harmless."""

    def __init__(self, owner: Releases, revision: Revision) -> None:
        self.revision = revision
        self._owner: Releases | None = owner
        self._once = threading.Lock()

    def release(self) -> None:
        """Give the digest back; the last lease of a deleted adapter frees it."""
        with self._once:
            owner, self._owner = self._owner, None
        if owner is not None:
            owner.release(self)

    def __enter__(self) -> "Lease":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()


class Catalog:
    """Names, digests and leases. Safe from any thread; no method waits for anything but a look.

    Invariant: `_named[digest]` are the adapters that have a revision with the digest, at most one
    each; `_leased[digest]` counts its leases.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._entries: dict[str, Entry] = {}
        self._named: dict[str, set[str]] = {}
        self._leased: Counter[str] = Counter()

    def views(self) -> list[Adapter]:
        """Every adapter, by name."""
        with self._lock:
            return [self._entries[name].view() for name in sorted(self._entries)]

    def has(self, name: str) -> bool:
        """Whether the name exists."""
        with self._lock:
            return name in self._entries

    def view(self, name: str) -> Adapter:
        """One adapter. Raises AdapterNotFound."""
        with self._lock:
            return self._entry(name).view()

    def revisions(self, name: str) -> tuple[Revision, ...]:
        """An adapter's revisions, oldest first. Raises AdapterNotFound."""
        with self._lock:
            revisions = self._entry(name).revisions
            return tuple(revisions[number] for number in sorted(revisions))

    def revision(self, name: str, number: int) -> Revision:
        """One revision. Raises AdapterNotFound."""
        with self._lock:
            return self._entry(name).revision(number)

    def published(self, name: str) -> tuple[int, ...]:
        """The stack of publications; the last is current. Raises AdapterNotFound."""
        with self._lock:
            return tuple(self._entry(name).published)

    def next_number(self, name: str) -> int:
        """What a new revision is called: a number that none of the name has had."""
        with self._lock:
            entry = self._entries.get(name)
            return 1 if entry is None else max(entry.last_deleted, *entry.revisions) + 1

    def resolve(self, model: str) -> Revision:
        """What `name` or `name@number` means now. Raises AdapterNotFound."""
        with self._lock:
            return self._resolve(model)

    def lease(self, model: str) -> Revision:
        """Resolve, and count a lease on the digest in the same look."""
        with self._lock:
            revision = self._resolve(model)
            self._leased[revision.digest] += 1
            return revision

    def unlease(self, digest: str) -> bool:
        """End one lease; True when nothing needs the digest any more."""
        with self._lock:
            self._leased[digest] -= 1
            assert self._leased[digest] >= 0, f"{digest} was released more often than leased"
            return self._is_unused(digest)

    def num_leases(self, digest: str) -> int:
        """How many leases hold the digest."""
        with self._lock:
            return self._leased[digest]

    def is_unused(self, digest: str) -> bool:
        """Whether neither a revision nor a lease has the digest."""
        with self._lock:
            return self._is_unused(digest)

    def digests(self) -> frozenset[str]:
        """Digests that revisions have."""
        with self._lock:
            return frozenset(self._named)

    def names_of(self, digest: str) -> tuple[str, ...]:
        """The adapters that have a revision with the digest, by name."""
        with self._lock:
            return tuple(sorted(self._named.get(digest, ())))

    def add_entry(self, entry: Entry) -> None:
        """Add a new name."""
        with self._lock:
            self._entries[entry.name] = entry
            for revision in entry.revisions.values():
                self._named.setdefault(revision.digest, set()).add(entry.name)

    def put_revision(self, revision: Revision, *, publish: bool) -> None:
        """Add a revision or replace what is known of it, and publish it in the same look."""
        with self._lock:
            entry = self._entry(revision.name)
            self._named.setdefault(revision.digest, set()).add(entry.name)
            entry.revisions[revision.number] = revision
            if publish:
                entry.published.append(revision.number)

    def unpublish(self, name: str) -> Revision:
        """Take the last publication off the stack and return what is current then."""
        with self._lock:
            entry = self._entry(name)
            entry.published.pop()
            return entry.revisions[entry.published[-1]]

    def set_pinned(self, name: str, pinned: bool) -> Adapter:
        """Change the pin."""
        with self._lock:
            entry = self._entry(name)
            entry.pinned = pinned
            return entry.view()

    def remove_entry(self, name: str) -> set[str]:
        """Forget a name; return the digests that no other revision has."""
        with self._lock:
            entry = self._entries.pop(name)
            return self._unname(name, {revision.digest for revision in entry.revisions.values()})

    def remove_revision(self, revision: Revision, published: list[int]) -> set[str]:
        """Forget a revision, leave these publications; return its digest if no other one has it."""
        with self._lock:
            entry = self._entry(revision.name)
            entry.published = published
            del entry.revisions[revision.number]
            entry.last_deleted = max(entry.last_deleted, revision.number)
            return self._unname(revision.name, {revision.digest})

    def _unname(self, name: str, digests: set[str]) -> set[str]:
        """Take the name's revisions with these digests away; return the digests without any now."""
        for digest in digests:
            self._named[digest].remove(name)
            if not self._named[digest]:
                del self._named[digest]
        return digests - self._named.keys()

    def _is_unused(self, digest: str) -> bool:
        if self._leased[digest] or digest in self._named:
            return False
        del self._leased[digest]
        return True

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise AdapterNotFound(f"The adapter {show(name)} does not exist.")
        return self._entries[name]

    def _resolve(self, model: str) -> Revision:
        match = _MODEL.fullmatch(model)
        if match is None:
            raise AdapterNotFound(f"The adapter {show(model)} does not exist.")
        entry = self._entry(match["name"])
        if match["number"]:
            return entry.revision(int(match["number"]))
        current = entry.current()
        if current is None:
            raise AdapterNotFound(f"The adapter {entry.name} has no published revision.")
        return current
