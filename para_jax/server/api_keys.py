"""Who may use which model: the keys of --api-key-file."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import NamedTuple

from .errors import ApiError


class Access(NamedTuple):
    """What a client may use. The base model is open to every client."""

    tenants: frozenset[str] | None = None
    """None: all"""
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
            self._keys.append((known, Access(frozenset(tenants), known.hex()) if tenants else Access()))

    def __bool__(self) -> bool:
        return bool(self._keys)

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


def read_keys(file: str | Path) -> ApiKeys:
    """The keys of a file: one per line, perhaps with tenants. Lines that begin with # are left out.

    Raises ValueError for a file that has no key or can't be read.
    """
    try:
        lines = [line.strip() for line in Path(file).expanduser().read_text("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise ValueError(f"--api-key-file {file}: {error}\ngive a file with one key per line") from None
    keys = ApiKeys([line for line in lines if line and not line.startswith("#")])
    if not keys:  # a server without keys is open to everyone
        raise ValueError(f"--api-key-file {file}: it has no key\nwrite one key per line")
    return keys
