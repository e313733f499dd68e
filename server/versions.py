"""Versions of installed packages, for reports and provenance."""

import importlib.metadata


def version_of(package: str) -> str:
    """Its version; "not installed" where it has none, as Turnout in a bare checkout."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
