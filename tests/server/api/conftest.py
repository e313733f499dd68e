"""A served app for each test, over a fake engine and a real registry."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.api.harness import Server, serving


@pytest.fixture
def server(tiny_base: Path, tmp_path: Path) -> Iterator[Server]:
    """The app with default limits; adapters may be loaded from beneath `tmp_path / "allowed"`."""
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    with serving(tiny_base, tmp_path / "store", allowed_roots=(allowed,)) as handle:
        yield handle
