"""The models that clients see: the base model, and each tenant of the bank as a model of its own."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ..adapters.bank import AdapterBank, Entry
from ..adapters.loading_bank import LoadingBank
from ..adapters.names import nearest_names
from ..config import BASE
from ..io.checks import printable, shorten
from ..io.messages import warn
from ..io.untrusted import require_unicode, safe_name
from .api_keys import Access
from .errors import ApiError, retry_later


class Models:
    """Names to adapters. Any thread may use it. Tenants that come and go in the bank need no other notice; `sources`
    says where the adapters of the names came from."""

    def __init__(self, bank: AdapterBank | None, base: str = BASE, sources: Mapping[str, str] | None = None):
        """
        Args:
            base: the base model's name; BASE works too.
            sources: the folder or hub id of each tenant that has one.

        Raises ValueError for a tenant that has a name of the base model.
        """
        self.bank, self.base = bank, base
        self.sources = dict(sources or {})
        self._created = int(time.time())
        self._times: dict[str, int] = {}
        """when a tenant was added, if that was later"""
        for name in self.names:
            require_unicode(f"the tenant {shorten(name)}", name)  # JSON can't name it
            self.require_free(name)

    @property
    def names(self) -> tuple[str, ...]:
        """All tenants."""
        return self.bank.names if self.bank is not None else ()

    @property
    def all_names(self) -> tuple[str, ...]:
        """All tenants, and the names of the base model."""
        return *self.names, self.base, BASE

    def require_free(self, name: str) -> None:
        """Raises ValueError for a name that a tenant cannot have, because it is the base model's."""
        if name in (self.base, BASE):
            raise ValueError(f"the name {shorten(name)} belongs to the base model; choose another")

    def note(self, name: str, source: str) -> None:
        """Records where a tenant that was just added or replaced came from."""
        self.sources[name], self._times[name] = source, int(time.time())

    def forget(self, name: str) -> None:
        """Forgets a tenant that was removed."""
        self.sources.pop(name, None)
        self._times.pop(name, None)

    def has(self, name: str) -> bool:
        """Whether this is a tenant now."""
        return self.bank is not None and name in self.bank

    def tenant(self, name: str, access: Access) -> str | None:
        """The tenant of a name; None for the base model. Raises ApiError 404 for a name that is unknown, or that this
        client may not use: both look the same."""
        if name in (self.base, BASE):
            return None
        if not self.has(name) or not access.may_use(name):
            raise ApiError(404, self._unknown(name, access), param="model", code="model_not_found")
        return name

    def must_load(self, name: str, access: Access) -> bool:
        """Whether `resolve` has to load an adapter first."""
        bank = self.bank
        return bank is not None and name in bank and access.may_use(name) and not bank.holds(name)

    def resolve(self, name: str, access: Access) -> tuple[str | None, Entry | None]:
        """The tenant and its adapter; (None, None) for the base model. Raises ApiError 404 as `tenant` does, and 429 if
        it would have to be loaded while open requests hold too many adapters."""
        tenant = self.tenant(name, access)
        if tenant is None or self.bank is None:
            return None, None
        if isinstance(self.bank, LoadingBank) and not self.bank.holds(tenant) and self.bank.crowded:
            message = "open requests hold as many adapters as the memory has room for; try again"
            raise retry_later(429, 1, message, "rate_limit_exceeded")
        try:
            return tenant, self.bank.entry(tenant)
        except (ValueError, OSError) as error:
            self.tenant(name, access)  # raises if it was removed meanwhile
            # a bank that loads adapters when they are asked for could not load this one
            warn(f"server: {shorten(name)}: {printable(str(error), 1000)}")
            message = f"the adapter of {shorten(name)} can't be loaded; the server's log has the reason"
            raise ApiError(500, message, param="model", code="adapter_failed") from None

    def visible(self, access: Access) -> list[str]:
        """The tenants that a client may use."""
        return [name for name in self.names if access.may_use(name)]

    def listed(self, access: Access) -> list[dict]:
        """The base model and the tenants that a client may use, as /v1/models has them."""
        return [self.card(None), *map(self.card, self.visible(access))]

    def card(self, name: str | None) -> dict:
        """A model as /v1/models has it; None is the base model."""
        created = self._created if name is None else self._times.get(name, self._created)
        card = {"id": self.base if name is None else name, "object": "model", "created": created}
        card |= {"owned_by": "para_jax", "root": self.base, "parent": None}
        return card if name is None else card | {"root": self.sources.get(name, name), "parent": self.base}

    def _unknown(self, name: str, access: Access) -> str:
        """Says that a model does not exist. Only the holder of a key learns of similar names, and only of its own."""
        text = f"the model {shorten(name)} does not exist"
        if not access.keyed:
            return f"{text}; GET /v1/models lists those there are"
        nearest = nearest_names(name, [self.base, *self.visible(access)])
        return f"{text}; the nearest are {', '.join(map(safe_name, nearest))}" if nearest else text
