"""API keys: who calls, and what the key lets them do."""

import hashlib
import hmac
import ipaddress
import json
import re
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from server.config import ServerConfig
from server.errors import ServeError

Scope = Literal["infer", "adapters", "admin"]  # admin may do everything

_PREFIX = "tk-"
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One line of the keys file. The key itself is nowhere: 256 random bits need no slow hash."""

    name: str  # the tenant: of admission's share and of the prefix cache's salt
    sha256: str
    scopes: frozenset[Scope]

    def line(self) -> str:
        """As the keys file holds it."""
        fields = {"name": self.name, "sha256": self.sha256, "scopes": sorted(self.scopes)}
        return json.dumps(fields)


def new_key(name: str, scopes: frozenset[Scope]) -> tuple[str, ApiKey]:
    """Make a key: the secret, to be shown once, and what the keys file holds of it."""
    secret = _PREFIX + secrets.token_urlsafe(32)
    return secret, ApiKey(name, _hash(secret), scopes)


def parse_keys(text: str, path: Path) -> list[ApiKey]:
    """Read a keys file's text: one JSON object a line; blank lines and # comments are skipped.

    Raises ValueError naming the line that is wrong.
    """
    return [
        _parse(line, f"server.api_keys is {path}, line {number}")
        for number, line in enumerate(text.splitlines(), start=1)
        if line.strip() and not line.lstrip().startswith("#")
    ]


def load_keys(path: Path) -> list[ApiKey]:
    """Read a keys file to serve with. Raises ValueError for one that is wrong or has no keys."""
    keys = parse_keys(path.read_text(encoding="utf-8"), path)
    names = [key.name for key in keys]
    if not keys or len(set(names)) != len(names):
        raise ValueError(f"server.api_keys is {path}; it must hold keys, each with its own name")
    return keys


def check_listen(config: ServerConfig) -> None:
    """Refuse to serve strangers without keys. Raises ValueError."""
    if config.api_keys is None and not _is_loopback(config.host):
        raise ValueError(
            f"server.host is {config.host!r}, which others can reach; it needs server.api_keys: "
            "`turnout keys new`, then serve --api-keys FILE"
        )


class Authenticator:
    """Checks the bearer token of a request. Without keys everybody may do everything."""

    def __init__(self, keys: list[ApiKey] | None) -> None:
        self._keys = keys

    def check(self, authorization: str | None, scope: Scope) -> str:
        """Return the tenant: the key's name, or "" without keys. Raises ServeError 401 or 403."""
        if self._keys is None:
            return ""
        kind, _, secret = (authorization or "").partition(" ")
        key = self._find(secret.strip()) if kind.lower() == "bearer" else None
        if key is None:
            raise ServeError(
                401, "invalid_api_key", "A valid API key is needed: Authorization: Bearer …"
            )
        if not key.scopes & {scope, "admin"}:
            raise ServeError(
                403,
                "insufficient_scope",
                f"The key {key.name!r} does not have the scope {scope!r}.",
            )
        return key.name

    def _find(self, secret: str) -> ApiKey | None:
        digest = _hash(secret)
        found = None
        for key in self._keys or ():  # all of them, so that time tells nothing
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()


def _parse(line: str, where: str) -> ApiKey:
    try:
        fields = json.loads(line)
        key = ApiKey(fields["name"], fields["sha256"], frozenset(fields["scopes"]))
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{where}: must be JSON with name, sha256 and scopes") from None
    if not isinstance(key.name, str) or not key.name:
        raise ValueError(f"{where}: name must be a text")
    if not isinstance(key.sha256, str) or not _SHA256.fullmatch(key.sha256):
        raise ValueError(f"{where}: sha256 must be 64 hexadecimal digits, in lower case")
    unknown = key.scopes - set(get_args(Scope))
    if unknown or not key.scopes:
        raise ValueError(f"{where}: scopes must be among {', '.join(get_args(Scope))}")
    return key


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
