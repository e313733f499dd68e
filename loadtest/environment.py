"""The environment's fingerprint: what a figure must be read beside."""

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

import msgspec

_PACKAGES = ("httptools", "msgspec", "numpy", "uvloop")


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """The machine that sent the load, and what the server said of itself."""

    cpu: str
    num_cores: int
    kernel: str
    python: str
    packages: dict[str, str]
    load_average: tuple[float, float]  # over a minute, before and after
    num_workers: int
    server: dict[str, str]  # of GET /version


def fingerprint(*, load_before: float, num_workers: int, server: dict[str, str]) -> Environment:
    """Look at this machine, after a run."""
    return Environment(
        cpu=cpu_model(),
        num_cores=os.cpu_count() or 1,
        kernel=platform.release(),
        python=platform.python_version(),
        packages={name: metadata.version(name) for name in _PACKAGES},
        load_average=(load_before, load_now()),
        num_workers=num_workers,
        server=server,
    )


def load_now() -> float:
    """Processes that ran or wanted to, over the last minute."""
    return round(os.getloadavg()[0], 2)


def cpu_model(file: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's name, or what Python calls it."""
    if file.is_file():
        for line in file.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def differences(a: Environment, b: Environment) -> Sequence[str]:
    """What differs between two environments, a line each; load averages are not compared."""
    ignored = {"load_average", "server"}
    named = [
        (name, getattr(a, name), getattr(b, name))
        for name in a.__struct_fields__
        if name not in ignored
    ]
    named += [
        (f"server {name}", a.server.get(name), b.server.get(name))
        for name in sorted({*a.server, *b.server})
    ]
    return [f"{name}: {old} -> {new}" for name, old, new in named if old != new]
