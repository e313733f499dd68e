"""Registration under kill -9: what was answered is there, what is there is whole, nothing else."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from adapters.manifest import BaseShape
from adapters.registry import Registry
from adapters.store import Store

NUM_CONTENTS = 5
BASE = BaseShape(name="base", digest="b", num_layers=1, linears={"self_attn.q_proj": (512, 512)})
State = dict[str, list[str]]  # name -> digests of its revisions; the last one pushed is current

# Writes a line before each operation and one after it, and never stops.
CHILD = """
import json, random, sys
from pathlib import Path
from adapters.manifest import BaseShape
from adapters.registry import Registry

root, seed = Path(sys.argv[1]), int(sys.argv[2])
linears = {"self_attn.q_proj": (512, 512)}
base = BaseShape(name="base", digest="b", num_layers=1, linears=linears)
registry = Registry.open(root / "store", base)
chance = random.Random(seed)

def say(*words):
    print(json.dumps(words), flush=True)

say("open")
while True:
    name = f"adapter-{chance.randrange(4)}"
    names = {adapter.name: adapter.current for adapter in registry.list()}
    others = [r for r in registry.revisions(name) if r != names[name]] if name in names else []
    if name in names and chance.random() < 0.2:
        say("delete", name)
        registry.delete(name)
    elif others and chance.random() < 0.3:
        say("delete revision", name, others[0].digest)
        registry.delete_revision(name, others[0].number)
    else:
        content = chance.randrange(5)
        say("push", name, content)
        registry.push(name, root / f"content-{content}")
    say("done")
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    for content in range(NUM_CONTENTS):
        folder = tmp_path / f"content-{content}"
        folder.mkdir()
        config = {"peft_type": "LORA", "r": 64, "target_modules": ["q_proj"]}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        prefix = "base_model.model.model.layers.0.self_attn.q_proj"
        tensors = {
            f"{prefix}.lora_A.weight": np.full((64, 512), content, np.float32),
            f"{prefix}.lora_B.weight": np.full((512, 64), content, np.float32),
        }
        save_file(tensors, folder / "adapter_model.safetensors")
    return tmp_path


def run_and_kill(root: Path, seed: int, after_s: float) -> list[list[str]]:
    """Let a child register adapters, kill it, return what it said."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(root), str(seed)], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    first = child.stdout.readline()
    assert first, "the child could not open the store that the last one left"
    time.sleep(after_s)
    child.kill()
    lines = child.stdout.read().split(b"\n")[:-1]  # the last one may be cut
    child.stdout.close()
    assert child.wait() == -9
    return [json.loads(line) for line in lines]


def possible_states(before: State, said: list[list[str]], digests: list[str]) -> list[State]:
    """The state after every finished operation, and after the one that the kill caught."""
    state = {name: list(revisions) for name, revisions in before.items()}
    states = [state]
    for words in said:
        if words == ["done"]:
            states = states[-1:]
            continue
        state = {name: list(revisions) for name, revisions in states[-1].items()}
        if words[0] == "delete":
            del state[words[1]]
        elif words[0] == "delete revision":
            state[words[1]].remove(words[2])
        else:
            digest = digests[int(words[2])]
            revisions = [known for known in state.get(words[1], []) if known != digest]
            state[words[1]] = [*revisions, digest]
        states.append(state)
    return states


def found_state(root: Path) -> State:
    """What a registry finds on opening: revisions by name, the current one last."""
    registry = Registry.open(root / "store", BASE)
    state = {}
    for adapter in registry.list():
        assert adapter.current is not None
        others = {revision.digest for revision in registry.revisions(adapter.name)}
        state[adapter.name] = [*sorted(others - {adapter.current.digest}), adapter.current.digest]
    registry.close()
    return state


def normal(state: State) -> State:
    return {name: [*sorted(digests[:-1]), digests[-1]] for name, digests in state.items()}


def check_store(root: Path, state: State) -> None:
    """Each row's object is there with every byte, and nothing else is."""
    needed = {digest for digests in state.values() for digest in digests}
    files = {path.name for path in (root / "store" / "objects").iterdir()}
    assert files == {f"{digest}.safetensors" for digest in needed}
    assert not list((root / "store" / "tmp").iterdir())
    assert {path.name for path in (root / "store").iterdir()} == {
        "lock",
        "objects",
        "registry.sqlite",
        "tmp",
    }
    store = Store.open(root / "store")
    assert all(store.is_whole(digest) for digest in needed)
    store.close()


def survive_kills(root: Path, num_kills: int) -> None:
    registry = Registry.open(root / "store", BASE)
    folders = [root / f"content-{content}" for content in range(NUM_CONTENTS)]
    digests = [registry.push("warm-up", folder).digest for folder in folders]
    registry.delete("warm-up")
    registry.close()
    chance = random.Random(num_kills)
    state: State = {}
    num_caught = 0
    for kill in range(num_kills):
        said = run_and_kill(root, seed=kill, after_s=chance.uniform(0, 0.1))
        num_caught += said[-1:] not in ([], [["done"]])
        found = found_state(root)
        expected = [normal(possible) for possible in possible_states(state, said, digests)]
        assert found in expected, f"kill {kill}"
        check_store(root, found)
        state = found
    assert num_caught, "no kill landed inside an operation"


def test_fifty_kills_tear_nothing(root: Path) -> None:
    survive_kills(root, 50)


@pytest.mark.slow
def test_three_hundred_kills_tear_nothing(root: Path) -> None:
    survive_kills(root, 300)
