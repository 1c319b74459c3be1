"""Who may use which model: the keys of --api-key-file."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from ..io.checks import shorten
from ..io.messages import warn
from .errors import ApiError


class Access(NamedTuple):
    """What a client may use. The base model is open to every client."""

    tenants: frozenset[str] | None = None
    """None: all"""
    keyed: bool = False
    """whether the client has shown a key; only then it learns the names of other models"""
    salt: str | None = None
    """Keeps its prompts apart in the prefix cache. A limited key has a salt of its own: else times and cached_tokens
    would tell what others have sent"""

    def may_use(self, tenant: str | None) -> bool:
        """Whether the client may use a tenant; None is the base model."""
        return tenant is None or self.tenants is None or tenant in self.tenants


class ApiKeys:
    """The keys, as digests. Without any, every client may use everything."""

    def __init__(self, lines: list[str]):
        """
        Args:
            lines: `KEY`, for everything, or `KEY TENANT TENANT ...`, for these tenants and the base model.
        """
        self._keys: list[tuple[bytes, Access]] = []
        for line in lines:
            key, *tenants = line.split()
            known = key_digest(key)
            self._keys.append((known, Access(frozenset(tenants), True, known.hex()) if tenants else Access(keyed=True)))
        if len({known for known, _ in self._keys}) < len(self._keys):
            raise ValueError("a key is there twice; write its tenants on one line")

    def __bool__(self) -> bool:
        return bool(self._keys)

    @property
    def tenants(self) -> frozenset[str]:
        """All tenants to which keys are limited."""
        return frozenset().union(*(access.tenants or () for _, access in self._keys))

    def access(self, authorization: str | None) -> Access:
        """What the holder of a key may use. Raises ApiError 401 for a wrong or missing key.

        The time it takes depends on the number of keys, not on which of them is near: all digests are compared.

        Args:
            authorization: the request's header, "Bearer KEY".
        """
        if not self._keys:
            return Access()
        scheme, _, key = (authorization or "").partition(" ")
        given, found = key_digest(key.strip()), None
        for known, access in self._keys:
            if hmac.compare_digest(given, known):
                found = access
        if found is None or scheme.lower() != "bearer":
            problem = "the API key is wrong" if authorization else "an API key is missing"
            message = f"{problem}; send the header `Authorization: Bearer KEY`"
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return found


def key_digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def require_unlimited(access: Access) -> None:
    """Raises ApiError 403 for a key that is limited to some tenants."""
    if access.tenants is not None:
        raise ApiError(403, "this needs a key that is not limited to some tenants", code="limited_key")


def warn_of_missing(keys: ApiKeys, names: Iterable[str]) -> None:
    """Warns of tenants of the keys that are not among these names: a misspelt one would only be a 404 for clients."""
    missing = sorted(keys.tenants - set(names))
    if missing:
        shown = ", ".join(map(shorten, missing[:5])) + (" ..." if len(missing) > 5 else "")
        warn(f"--api-key-file has keys for tenants that are not served: {shown}; check their names")


def read_keys(file: str | Path) -> ApiKeys:
    """The keys of a file: one per line, perhaps with tenants. Lines that begin with # are left out.

    Raises ValueError for a file that has no key or can't be read. Warns of one that every user of the machine can read.
    """
    path = Path(file).expanduser()
    try:
        lines = [line.strip() for line in path.read_text("utf-8-sig").splitlines()]
        keys = ApiKeys([line for line in lines if line and not line.startswith("#")])
    except (OSError, ValueError) as error:
        raise ValueError(f"--api-key-file {file}: {error}\ngive a file with one key per line") from None
    if not keys:
        raise ValueError(f"--api-key-file {file}: it has no key\nwrite one key per line")
    if path.stat().st_mode & 0o004:
        warn_of_readers(str(file))
    return keys


@lru_cache(16)  # a server reads its keys before it loads anything, and once more when it starts
def warn_of_readers(file: str) -> None:
    warn(f"--api-key-file {shorten(file)} can be read by every user of this machine; run chmod 600")
