"""The registry runs in the HTTP process, which holds no tensors."""

import subprocess
import sys


def test_the_registry_brings_in_neither_torch_nor_anything_else_of_ours() -> None:
    code = (
        "import sys, adapters.registry;print(*sorted({name.split('.')[0] for name in sys.modules}))"
    )

    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()

    assert "adapters" in loaded
    assert not {"torch", "transformers", "peft", "server", "training"} & set(loaded)
