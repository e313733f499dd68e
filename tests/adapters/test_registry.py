"""The registry, one behaviour at a time."""

import dataclasses
import logging
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from adapters.manifest import (
    AdapterConflict,
    AdapterNotFound,
    AdapterRefused,
    BaseShape,
    Limits,
    StoreBusy,
)
from adapters.promotions import JobFolder
from adapters.registry import Registry
from adapters.store import object_path

WriteFolder = Callable[..., Path]
Reopen = Callable[..., Registry]


@pytest.fixture
def freed() -> list[str]:
    """Digests that `on_free` was told of."""
    return []


@pytest.fixture
def reopen(tmp_path: Path, one_linear: BaseShape, freed: list[str]) -> Iterator[Reopen]:
    """Open the same registry, after closing the one before."""
    held: list[Registry] = []

    def reopen(base: BaseShape | None = one_linear, limits: Limits | None = None) -> Registry:
        while held:
            held.pop().close()
        held.append(Registry.open(tmp_path / "store", base, limits, on_free=freed.append))
        return held[0]

    yield reopen
    while held:
        held.pop().close()


@pytest.fixture
def registry(reopen: Reopen) -> Registry:
    return reopen()


@pytest.fixture
def folders(write_folder: WriteFolder) -> list[Path]:
    """Four adapters that differ."""
    return [write_folder(f"adapter-{number}", value=float(number)) for number in range(4)]


def objects(tmp_path: Path) -> set[str]:
    return {path.stem for path in (tmp_path / "store" / "objects").iterdir()}


def test_a_pushed_adapter_is_published_and_survives_a_restart(
    registry: Registry, reopen: Reopen, folders: list[Path]
) -> None:
    pushed = registry.push("bot", folders[0])
    registry.pin("bot")

    registry = reopen()

    assert registry.resolve("bot") == registry.resolve("bot@1") == pushed
    adapter = registry.get("bot")
    assert (adapter.current, adapter.pinned, adapter.num_revisions) == (pushed, True, 1)
    assert registry.list() == [adapter]
    assert pushed.id == "bot@1"
    assert (pushed.max_rank, pushed.num_rank_rows, pushed.num_bytes) == (2, 2, 256)
    assert registry.manifest(pushed.digest).num_parameters == pushed.num_parameters == 64
    assert registry.unpin("bot").pinned is False


def test_a_second_push_moves_the_name_and_keeps_the_first_revision(
    registry: Registry, folders: list[Path]
) -> None:
    first = registry.push("bot", folders[0])
    lease = registry.lease("bot")

    second = registry.push("bot", folders[1])

    assert registry.resolve("bot") == second
    assert registry.resolve("bot@1") == lease.revision == first
    assert registry.revisions("bot") == (first, second)
    lease.release()
    assert registry.resolve("bot@1") == first


def test_an_unpublished_push_is_reached_by_its_number_alone(
    registry: Registry, reopen: Reopen, folders: list[Path]
) -> None:
    revision = registry.push("bot", folders[0], publish=False)
    for current in (registry, reopen()):
        with pytest.raises(AdapterNotFound, match="no published revision"):
            current.resolve("bot")
        assert current.resolve("bot@1") == revision
        registry = current
    assert registry.get("bot").current is None

    registry.publish("bot", 1)

    assert registry.resolve("bot") == revision


def test_the_same_content_again_is_the_same_revision_and_is_published(
    registry: Registry, folders: list[Path], tmp_path: Path
) -> None:
    first = registry.push("bot", folders[0])
    registry.push("bot", folders[1])

    again = registry.push("bot", folders[0])

    assert again == first
    assert len(registry.revisions("bot")) == 2
    assert registry.resolve("bot") == first
    assert registry.rollback("bot").number == 2
    assert len(objects(tmp_path)) == 2


def test_rollback_walks_back_through_what_was_published(
    registry: Registry, reopen: Reopen, folders: list[Path]
) -> None:
    for folder in folders[:3]:
        registry.push("bot", folder)
    registry.publish("bot", 1)
    registry.publish("bot", 1)  # already current: nothing to roll back to

    registry = reopen()

    assert [registry.rollback("bot").number for _ in range(3)] == [3, 2, 1]
    with pytest.raises(AdapterConflict, match="no earlier publication"):
        registry.rollback("bot")
    registry.publish("bot", 3)
    assert reopen().resolve("bot").number == 3


@pytest.mark.parametrize(
    "model",
    [
        *("", "nobody", "base", "bot@2", "bot@0", "bot@01", "bot@", "@1", "bot@1@1", "bot@-1"),
        *("bot@9999999999", "bot\n", "bot@1\n", "bot@\u0661"),
    ],
)
def test_a_model_that_does_not_exist_is_not_found(
    registry: Registry, folders: list[Path], model: str
) -> None:
    registry.push("bot", folders[0])

    with pytest.raises(AdapterNotFound):
        registry.resolve(model)
    with pytest.raises(AdapterNotFound):
        registry.lease(model)


def test_every_call_on_an_unknown_name_is_not_found(
    registry: Registry, folders: list[Path]
) -> None:
    registry.push("bot", folders[0])
    calls: list[Callable[[], object]] = [
        lambda: registry.get("x"),
        lambda: registry.revisions("x"),
        lambda: registry.publish("x", 1),
        lambda: registry.publish("bot", 2),
        lambda: registry.rollback("x"),
        lambda: registry.pin("x"),
        lambda: registry.unpin("x"),
        lambda: registry.delete("x"),
        lambda: registry.delete_revision("x", 1),
        lambda: registry.delete_revision("bot", 2),
    ]
    for call in calls:
        with pytest.raises(AdapterNotFound):
            call()


@pytest.mark.parametrize(
    "name", ["", ".", "-a", "a b", "a,b", 'a"', "a/b", "a@1", "a\n", "é", "a" * 65, "base", "../a"]
)
def test_a_name_that_cannot_be_is_refused(
    registry: Registry, folders: list[Path], name: str
) -> None:
    with pytest.raises(AdapterRefused) as caught:
        registry.push(name, folders[0])

    assert caught.value.field == "name"
    assert registry.list() == []


@pytest.mark.parametrize("name", ["a", "A.b_c-9", "0", "a" * 64])
def test_a_name_that_can_be_is_taken(registry: Registry, folders: list[Path], name: str) -> None:
    assert registry.push(name, folders[0]).name == name


def test_a_refused_push_changes_nothing(
    registry: Registry, write_folder: WriteFolder, tmp_path: Path
) -> None:
    with pytest.raises(AdapterRefused):
        registry.push("bot", write_folder(value=float("nan")))

    assert registry.list() == []
    assert objects(tmp_path) == set()


def test_without_a_base_nothing_can_be_pushed_and_all_else_works(
    registry: Registry, reopen: Reopen, folders: list[Path]
) -> None:
    registry.push("bot", folders[0])

    registry = reopen(None)

    with pytest.raises(AdapterRefused, match="base"):
        registry.push("other", folders[1])
    assert registry.get("bot").num_revisions == 1
    registry.delete("bot")


def test_replace_off_refuses_a_name_that_exists(registry: Registry, folders: list[Path]) -> None:
    first = registry.push("bot", folders[0], replace=False)

    with pytest.raises(AdapterConflict, match="bot exists already"):
        registry.push("bot", folders[1], replace=False)

    assert registry.revisions("bot") == (first,)


class TestIdempotencyKeys:
    def test_a_repeated_request_gets_the_first_answer(
        self, registry: Registry, reopen: Reopen, folders: list[Path]
    ) -> None:
        first = registry.push("bot", folders[0], idempotency_key="k", replace=False)
        registry.push("bot", folders[1])

        registry = reopen()
        again = registry.push("bot", folders[0], idempotency_key="k", replace=False)

        assert again == first
        assert registry.resolve("bot").number == 2  # the repeat published nothing

    def test_a_key_used_for_anything_else_is_a_conflict(
        self, registry: Registry, folders: list[Path], tmp_path: Path
    ) -> None:
        registry.push("bot", folders[0], idempotency_key="k")

        with pytest.raises(AdapterConflict, match="Idempotency-Key"):
            registry.push("bot", folders[1], idempotency_key="k")
        with pytest.raises(AdapterConflict):
            registry.push("other", folders[0], idempotency_key="k")
        with pytest.raises(AdapterConflict):
            registry.push("bot", folders[0], publish=False, idempotency_key="k")

        assert len(objects(tmp_path)) == 1
        assert not list((tmp_path / "store" / "tmp").iterdir())

    def test_a_key_ends_with_its_adapter(self, registry: Registry, folders: list[Path]) -> None:
        registry.push("bot", folders[0], idempotency_key="k")
        registry.delete("bot")

        assert registry.push("other", folders[1], idempotency_key="k").number == 1

    def test_a_key_is_forgotten_after_a_day(
        self, registry: Registry, folders: list[Path], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        registry.push("bot", folders[0], idempotency_key="k")
        monkeypatch.setattr("adapters.registry.KEY_LIFE_S", -1.0)

        assert registry.push("bot", folders[1], idempotency_key="k").number == 2

    @pytest.mark.parametrize("key", ["", "a b", "é", "x" * 256, "a\n"])
    def test_a_key_that_cannot_be_is_refused(
        self, registry: Registry, folders: list[Path], key: str
    ) -> None:
        with pytest.raises(AdapterRefused, match="Idempotency-Key"):
            registry.push("bot", folders[0], idempotency_key=key)


class TestDelete:
    def test_an_idle_adapter_is_freed_at_once(
        self, registry: Registry, folders: list[Path], tmp_path: Path, freed: list[str]
    ) -> None:
        digests = [registry.push("bot", folder).digest for folder in folders[:2]]

        deletion = registry.delete("bot")

        assert deletion.freed == tuple(sorted(digests)) == tuple(sorted(freed))
        assert deletion.draining == ()
        assert objects(tmp_path) == set()
        with pytest.raises(AdapterNotFound):
            registry.resolve("bot")

    def test_a_leased_digest_is_freed_by_its_last_release(
        self, registry: Registry, folders: list[Path], tmp_path: Path, freed: list[str]
    ) -> None:
        digest = registry.push("bot", folders[0]).digest
        leases = [registry.lease("bot"), registry.lease("bot@1")]
        assert registry.num_leases(digest) == 2

        deletion = registry.delete("bot")

        assert (deletion.freed, deletion.draining) == ((), (digest,))
        with pytest.raises(AdapterNotFound):
            registry.lease("bot@1")
        leases[0].release()
        leases[0].release()  # once counts
        assert objects(tmp_path) == {digest}
        assert freed == []
        with leases[1]:
            pass
        assert objects(tmp_path) == set()
        assert freed == [digest]

    def test_a_digest_under_another_name_stays(
        self, registry: Registry, folders: list[Path], tmp_path: Path, freed: list[str]
    ) -> None:
        digest = registry.push("one", folders[0]).digest
        registry.push("two", folders[0])

        deletion = registry.delete("one")

        assert (deletion.freed, deletion.draining) == ((), ())
        assert objects(tmp_path) == {digest}
        registry.delete("two")
        assert freed == [digest]

    def test_a_draining_digest_pushed_again_stays(
        self, registry: Registry, folders: list[Path], tmp_path: Path, freed: list[str]
    ) -> None:
        digest = registry.push("bot", folders[0]).digest
        lease = registry.lease("bot")
        registry.delete("bot")
        registry.push("bot", folders[0])

        lease.release()

        assert objects(tmp_path) == {digest}
        assert freed == []

    def test_a_deleted_name_starts_again_at_one(
        self, registry: Registry, folders: list[Path]
    ) -> None:
        registry.push("bot", folders[0])
        registry.push("bot", folders[1])
        registry.pin("bot")
        registry.delete("bot")

        assert registry.push("bot", folders[2]).number == 1
        assert registry.get("bot").pinned is False
        with pytest.raises(AdapterConflict):
            registry.rollback("bot")


class TestDeleteRevision:
    def test_an_idle_one_is_freed_at_once_and_the_others_stay(
        self,
        registry: Registry,
        reopen: Reopen,
        folders: list[Path],
        tmp_path: Path,
        freed: list[str],
    ) -> None:
        first, second, third = [registry.push("bot", folder) for folder in folders[:3]]

        deletion = registry.delete_revision("bot", 2)

        assert (deletion.freed, deletion.draining) == ((second.digest,), ())
        assert freed == [second.digest]
        for current in (registry, reopen()):
            assert current.revisions("bot") == (first, third)
            assert current.resolve("bot") == third
            assert objects(tmp_path) == {first.digest, third.digest}
            with pytest.raises(AdapterNotFound, match="no revision 2"):
                current.resolve("bot@2")

    def test_the_published_one_and_the_only_one_are_refused(
        self, registry: Registry, folders: list[Path]
    ) -> None:
        registry.push("bot", folders[0])
        registry.push("bot", folders[1])
        with pytest.raises(AdapterConflict, match=r"bot@2 is published; publish another"):
            registry.delete_revision("bot", 2)
        registry.push("draft", folders[0], publish=False)
        with pytest.raises(AdapterConflict, match=r"draft@1 is the only revision; delete the ad"):
            registry.delete_revision("draft", 1)
        assert [len(registry.revisions(name)) for name in ("bot", "draft")] == [2, 1]

    def test_a_leased_one_is_freed_by_its_last_release(
        self, registry: Registry, folders: list[Path], tmp_path: Path, freed: list[str]
    ) -> None:
        digest = registry.push("bot", folders[0]).digest
        lease = registry.lease("bot")
        registry.push("bot", folders[1])

        deletion = registry.delete_revision("bot", 1)

        assert (deletion.freed, deletion.draining) == ((), (digest,))
        assert digest in objects(tmp_path)
        lease.release()
        assert digest not in objects(tmp_path)
        assert freed == [digest]

    def test_content_under_another_name_stays(
        self, registry: Registry, folders: list[Path], tmp_path: Path, freed: list[str]
    ) -> None:
        digest = registry.push("one", folders[0]).digest
        registry.push("one", folders[1])
        registry.push("two", folders[0])

        deletion = registry.delete_revision("one", 1)

        assert (deletion.freed, deletion.draining, freed) == ((), (), [])
        assert registry.resolve("two").digest == digest
        assert digest in objects(tmp_path)

    def test_its_number_is_never_given_again(
        self, registry: Registry, reopen: Reopen, folders: list[Path]
    ) -> None:
        for folder in folders[:3]:
            registry.push("bot", folder)
        registry.publish("bot", 1)
        registry.delete_revision("bot", 3)
        registry.delete_revision("bot", 2)

        registry = reopen()

        assert [registry.push("bot", folder).number for folder in folders[2:]] == [4, 5]
        registry.publish("bot", 1)
        registry.delete_revision("bot", 5)
        registry.delete_revision("bot", 4)
        assert registry.push("bot", folders[1]).number == 6

    def test_rolling_back_passes_it_over(
        self, registry: Registry, reopen: Reopen, folders: list[Path]
    ) -> None:
        for folder in folders[:2]:
            registry.push("bot", folder)
        registry.publish("bot", 1)
        registry.push("bot", folders[2])
        registry.delete_revision("bot", 2)
        registry.push("bot", folders[3])

        for current in (registry, reopen()):
            assert current.resolve("bot").number == 4
            registry = current
        assert [registry.rollback("bot").number for _ in range(2)] == [3, 1]
        with pytest.raises(AdapterConflict, match="no earlier publication"):
            registry.rollback("bot")

    def test_its_keys_and_its_usage_go_with_it(
        self, registry: Registry, folders: list[Path]
    ) -> None:
        gone = registry.push("bot", folders[0], idempotency_key="k").digest
        kept = registry.push("bot", folders[1]).digest
        registry.add_usage({gone: 3, kept: 4})

        registry.delete_revision("bot", 1)

        assert registry.usage() == {kept: 4}
        assert registry.push("other", folders[2], idempotency_key="k").number == 1

    def test_a_lost_one_can_be_deleted(
        self,
        registry: Registry,
        reopen: Reopen,
        folders: list[Path],
        tmp_path: Path,
        freed: list[str],
    ) -> None:
        digest = registry.push("bot", folders[0]).digest
        registry.push("bot", folders[1])
        object_path(tmp_path / "store", digest).unlink()

        assert reopen().delete_revision("bot", 1).freed == (digest,)
        assert freed == [digest]

    def test_a_failed_transaction_deletes_nothing(
        self,
        registry: Registry,
        reopen: Reopen,
        folders: list[Path],
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        revisions = tuple(registry.push("bot", folder) for folder in folders[:2])

        def fail(*arguments: object) -> None:
            raise sqlite3.OperationalError("database or disk is full")

        monkeypatch.setattr(registry._rows, "add_publication", fail)
        with pytest.raises(sqlite3.OperationalError):
            registry.delete_revision("bot", 1)
        monkeypatch.undo()

        for current in (registry, reopen()):
            assert current.revisions("bot") == revisions
            assert objects(tmp_path) == {revision.digest for revision in revisions}
            registry = current
        assert registry.rollback("bot").number == 1


class TestUsage:
    def test_tokens_add_up_and_survive(
        self, registry: Registry, reopen: Reopen, folders: list[Path]
    ) -> None:
        digest = registry.push("bot", folders[0]).digest
        registry.add_usage({digest: 5, "unknown": 7})
        registry.add_usage({digest: 3})

        assert reopen().usage() == {digest: 8}

    def test_usage_goes_with_the_last_name(self, registry: Registry, folders: list[Path]) -> None:
        digest = registry.push("one", folders[0]).digest
        registry.push("two", folders[0])
        registry.add_usage({digest: 1})

        registry.delete("one")
        assert registry.usage() == {digest: 1}
        registry.delete("two")
        assert registry.usage() == {}


class TestAnotherBase:
    @pytest.fixture
    def twin(self, one_linear: BaseShape) -> BaseShape:
        """The same shapes, other weights."""
        return BaseShape(
            name="base", digest="c" * 64, num_layers=2, linears=dict(one_linear.linears)
        )

    def test_its_adapters_are_not_served_until_pushed_again(
        self, registry: Registry, reopen: Reopen, folders: list[Path], twin: BaseShape
    ) -> None:
        registry.push("bot", folders[0])
        registry = reopen(twin)

        with pytest.raises(AdapterConflict, match="registered for base bbbbbbbbbbbb"):
            registry.resolve("bot")
        with pytest.raises(AdapterConflict):
            registry.lease("bot")
        assert registry.num_leases(registry.get("bot").current.digest) == 0  # type: ignore[union-attr]  # it is published

        assert registry.push("bot", folders[0]).number == 1
        assert registry.resolve("bot").base_digest == twin.digest
        assert reopen(twin).resolve("bot").base_digest == twin.digest

    def test_its_adapters_are_served_where_allowed_and_fitting(
        self, registry: Registry, reopen: Reopen, folders: list[Path], twin: BaseShape
    ) -> None:
        registry.push("bot", folders[0])
        allow = Limits(allow_other_base=True)
        assert reopen(twin, allow).resolve("bot").number == 1

        deeper = BaseShape(name="base", digest="c", num_layers=3, linears=twin.linears)
        with pytest.raises(AdapterConflict):
            reopen(deeper, allow).resolve("bot")


def test_open_sweeps_objects_that_no_row_names(
    registry: Registry, reopen: Reopen, folders: list[Path], tmp_path: Path
) -> None:
    kept = registry.push("bot", folders[0]).digest
    gone = registry.push("other", folders[1]).digest
    lease = registry.lease("other")
    registry.delete("other")
    assert objects(tmp_path) == {kept, gone}

    reopen()

    assert objects(tmp_path) == {kept}
    assert lease.revision.digest == gone


def test_a_lost_object_is_reported_and_repaired_by_a_push(
    registry: Registry,
    reopen: Reopen,
    folders: list[Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    digest = registry.push("bot", folders[0]).digest
    object_path(tmp_path / "store", digest).unlink()

    with caplog.at_level(logging.ERROR):
        registry = reopen()

    assert digest in caplog.text
    with pytest.raises(AdapterNotFound, match="push it again"):
        registry.lease("bot")
    registry.push("bot", folders[0])
    assert registry.resolve("bot").number == 1
    assert objects(tmp_path) == {digest}


def test_a_lost_object_can_be_deleted(
    registry: Registry, reopen: Reopen, folders: list[Path], tmp_path: Path, freed: list[str]
) -> None:
    digest = registry.push("bot", folders[0]).digest
    object_path(tmp_path / "store", digest).unlink()
    registry = reopen()

    assert registry.delete("bot").freed == (digest,)
    assert freed == [digest]


def test_a_base_that_has_come_to_be_called_like_an_adapter_is_refused(
    registry: Registry, reopen: Reopen, folders: list[Path], one_linear: BaseShape
) -> None:
    registry.push("bot", folders[0])
    renamed = dataclasses.replace(one_linear, name="bot")

    for _ in range(2):  # and not StoreBusy
        with pytest.raises(ValueError, match="an adapter is named bot, as the base is"):
            reopen(renamed)

    reopen(None).delete("bot")
    assert reopen(renamed).list() == []


def test_a_failed_transaction_takes_its_object_and_rows_back(
    registry: Registry,
    reopen: Reopen,
    folders: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kept = registry.push("bot", folders[0])

    def fail(*arguments: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(registry._rows, "add_publication", fail)
    with pytest.raises(sqlite3.OperationalError):
        registry.push("bot", folders[1])
    with pytest.raises(sqlite3.OperationalError):
        registry.push("new", folders[0])
    monkeypatch.undo()

    for current in (registry, reopen()):
        assert current.revisions("bot") == (kept,)
        assert [adapter.name for adapter in current.list()] == ["bot"]
        assert objects(tmp_path) == {kept.digest}
        registry = current
    assert registry.push("bot", folders[1]).number == 2


def test_the_database_is_durable_at_each_commit(registry: Registry) -> None:
    settings = {
        name: registry._rows._db.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "foreign_keys")
    }

    assert settings == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}


def test_a_database_of_a_later_version_is_refused_and_let_go(
    registry: Registry, reopen: Reopen, tmp_path: Path
) -> None:
    registry._rows._db.execute("PRAGMA user_version = 9")

    with pytest.raises(ValueError, match="has version 9; this Turnout reads 3"):
        reopen()
    with pytest.raises(ValueError, match="has version 9"):  # not StoreBusy
        reopen()


def test_a_database_that_is_none_is_told_by_its_path_and_let_go(
    registry: Registry, reopen: Reopen, tmp_path: Path
) -> None:
    registry.close()
    path = tmp_path / "store" / "registry.sqlite"
    path.write_bytes(b"no database" * 100)

    for _ in range(2):
        with pytest.raises(ValueError, match=r"registry\.sqlite cannot be opened: file is not a d"):
            reopen()


def test_a_held_registry_is_busy(registry: Registry, tmp_path: Path) -> None:
    with pytest.raises(StoreBusy):
        Registry.open(tmp_path / "store")


def test_what_is_left_of_a_promotion_goes_with_its_adapter_unless_a_job_works_on_it(
    registry: Registry, folders: list[Path]
) -> None:
    revisions = [registry.push(f"a{each}", folders[each]) for each in range(2)]
    ended, running = (JobFolder.of(registry.root, revision.digest) for revision in revisions)
    for promotion in (ended, running):
        promotion.path.mkdir(parents=True)
    lock = running.take_lock()
    assert lock is not None
    for revision in revisions:
        registry.delete(revision.name)
    os.close(lock)
    assert not ended.path.exists()
    assert running.path.exists()


def test_threads_that_push_lease_and_delete_leave_nothing_behind(
    registry: Registry, folders: list[Path], tmp_path: Path, freed: list[str]
) -> None:
    errors: list[BaseException] = []

    def work(number: int) -> None:
        try:
            for turn in range(8):
                registry.push("shared", folders[(number + turn) % 4])
                own = f"own-{number}"
                registry.push(own, folders[turn % 4])
                with registry.lease(own) as lease:
                    registry.delete(own)
                    assert object_path(tmp_path / "store", lease.revision.digest).exists()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert errors == []
    assert len(registry.revisions("shared")) == 4
    assert objects(tmp_path) == {r.digest for r in registry.revisions("shared")}
    registry.delete("shared")
    assert objects(tmp_path) == set()
