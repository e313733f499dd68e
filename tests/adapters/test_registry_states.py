"""The registry as a state machine: any moves in any order, and after each one the invariants."""

import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)
from safetensors.numpy import save_file

from adapters.catalog import Lease
from adapters.manifest import AdapterConflict, AdapterNotFound, BaseShape
from adapters.registry import Deletion, Registry

NAMES = st.sampled_from(["one", "two", "three"])
CONTENTS = st.integers(0, 3)
NUMBERS = st.integers(1, 6)
BASE = BaseShape(name="base", digest="b", num_layers=1, linears={"self_attn.q_proj": (4, 4)})


def write_contents(root: Path) -> None:
    for content in range(4):
        folder = root / f"content-{content}"
        folder.mkdir()
        (folder / "adapter_config.json").write_text(
            '{"peft_type": "LORA", "r": 1, "target_modules": ["q_proj"]}'
        )
        prefix = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{prefix}.lora_A.weight": np.full((1, 4), content, np.float32),
            f"{prefix}.lora_B.weight": np.full((4, 1), content, np.float32),
        }
        save_file(tensors, folder / "adapter_model.safetensors")


class Model:
    """A name, as the registry should see it: contents by revision, and the publications."""

    def __init__(self) -> None:
        self.contents: dict[int, int] = {}
        self.published: list[int] = []
        self.pinned = False
        self.num_given = 0  # numbers, also those of revisions that are no more

    def push(self, content: int) -> int:
        for number, known in self.contents.items():
            if known == content:
                return number
        self.num_given += 1
        self.contents[self.num_given] = content
        return self.num_given

    def publish(self, number: int) -> None:
        if self.published[-1:] != [number]:
            self.published.append(number)

    def forget(self, number: int) -> int:
        before, self.published = self.published, []
        for each in before:
            if each != number:
                self.publish(each)
        return self.contents.pop(number)


class RegistryMachine(RuleBasedStateMachine):
    leases: Bundle[tuple[Lease, int]] = Bundle("leases")

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="registry-"))
        write_contents(self.root)
        self.names: dict[str, Model] = {}
        self.digests: dict[int, str] = {}
        self.leased: Counter[int] = Counter()
        self.freed: list[str] = []
        self.registry = self.open()

    def open(self) -> Registry:
        return Registry.open(self.root / "store", BASE, on_free=self.freed.append)

    def teardown(self) -> None:
        self.registry.close()
        shutil.rmtree(self.root)

    @initialize()
    def learn_the_digests(self) -> None:
        for content in range(4):
            self.digests[content] = self.registry.push(
                "one", self.root / f"content-{content}"
            ).digest
        self.registry.delete("one")
        assert sorted(self.freed) == sorted(self.digests.values())
        self.freed.clear()

    def needed(self) -> set[int]:
        return self.named() | {content for content, count in self.leased.items() if count}

    def named(self) -> set[int]:
        return {content for model in self.names.values() for content in model.contents.values()}

    def expect_freed(self, before: set[int]) -> None:
        gone = {self.digests[content] for content in before - self.needed()}
        assert sorted(self.freed) == sorted(gone)
        self.freed.clear()

    @rule(name=NAMES, content=CONTENTS, publish=st.booleans())
    def push(self, name: str, content: int, publish: bool) -> None:
        model = self.names.setdefault(name, Model())
        number = model.push(content)
        if publish:
            model.publish(number)

        pushed = self.registry.push(name, self.root / f"content-{content}", publish=publish)

        assert (pushed.number, pushed.digest) == (number, self.digests[content])

    @rule(name=NAMES, number=NUMBERS)
    def publish(self, name: str, number: int) -> None:
        model = self.names.get(name)
        if model is None or number not in model.contents:
            with pytest.raises(AdapterNotFound):
                self.registry.publish(name, number)
        else:
            model.publish(number)
            self.registry.publish(name, number)

    @rule(name=NAMES)
    def rollback(self, name: str) -> None:
        model = self.names.get(name)
        if model is None or len(model.published) < 2:
            with pytest.raises((AdapterNotFound, AdapterConflict)):
                self.registry.rollback(name)
        else:
            model.published.pop()
            assert self.registry.rollback(name).number == model.published[-1]

    @rule(name=NAMES, pinned=st.booleans())
    def pin(self, name: str, pinned: bool) -> None:
        if name in self.names:
            self.names[name].pinned = pinned
            (self.registry.pin if pinned else self.registry.unpin)(name)

    @rule(target=leases, name=NAMES)
    def lease(self, name: str):  # type: ignore[no-untyped-def]  # hypothesis' MultipleResults is private
        model = self.names.get(name)
        if model is None or not model.published:
            with pytest.raises(AdapterNotFound):
                self.registry.lease(name)
            return multiple()
        content = model.contents[model.published[-1]]
        self.leased[content] += 1
        return (self.registry.lease(name), content)

    @rule(held=consumes(leases))
    def release(self, held: tuple[Lease, int]) -> None:
        lease, content = held
        before = self.needed()
        self.leased[content] -= 1
        lease.release()
        self.expect_freed(before)

    @rule(name=NAMES)
    def delete(self, name: str) -> None:
        if name not in self.names:
            with pytest.raises(AdapterNotFound):
                self.registry.delete(name)
            return
        before = self.needed()
        contents = set(self.names.pop(name).contents.values())

        deletion = self.registry.delete(name)

        self.expect_unnamed(contents, deletion)
        self.expect_freed(before)

    @rule(name=NAMES, number=NUMBERS)
    def delete_revision(self, name: str, number: int) -> None:
        model = self.names.get(name)
        if model is None or number not in model.contents:
            with pytest.raises(AdapterNotFound):
                self.registry.delete_revision(name, number)
            return
        if model.published[-1:] == [number] or len(model.contents) == 1:
            with pytest.raises(AdapterConflict):
                self.registry.delete_revision(name, number)
            return
        before = self.needed()
        content = model.forget(number)

        deletion = self.registry.delete_revision(name, number)

        self.expect_unnamed({content}, deletion)
        self.expect_freed(before)

    def expect_unnamed(self, contents: set[int], deletion: Deletion) -> None:
        unnamed = {self.digests[content] for content in contents - self.named()}
        assert set(deletion.freed) | set(deletion.draining) == unnamed

    @rule()
    def reopen(self) -> None:
        if any(self.leased.values()):
            return  # requests hold leases; a process that goes down takes them along
        self.registry.close()
        self.registry = self.open()

    @invariant()
    def objects_are_those_with_a_row_or_a_lease(self) -> None:
        if self.digests:
            found = {path.stem for path in (self.root / "store" / "objects").iterdir()}
            assert found == {self.digests[content] for content in self.needed()}
            assert not list((self.root / "store" / "tmp").iterdir())

    @invariant()
    def names_mean_what_the_model_says(self) -> None:
        assert [adapter.name for adapter in self.registry.list()] == sorted(self.names)
        for name, model in self.names.items():
            adapter = self.registry.get(name)
            assert (adapter.pinned, adapter.num_revisions) == (model.pinned, len(model.contents))
            there = {each.number: each.digest for each in self.registry.revisions(name)}
            assert there == {n: self.digests[content] for n, content in model.contents.items()}
            if model.published:
                assert self.registry.resolve(name).number == model.published[-1]
            else:
                assert adapter.current is None
        for content, digest in self.digests.items():
            having = (name for name, m in self.names.items() if content in m.contents.values())
            assert self.registry.names_of(digest) == tuple(sorted(having))


TestRegistry = RegistryMachine.TestCase
TestRegistry.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
