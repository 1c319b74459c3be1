"""Traffic: what each tenant has asked for and got, for the metrics and the page."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass, field

from .models import Models
from .outcome import Outcome

#: The name of all tenants without counts of their own.
OTHER = "other"


@dataclass
class Counts:
    """Of one tenant, since the server started or the tenant was loaded."""

    requests: Counter[str] = field(default_factory=Counter)
    """requests that have ended, by how: completed, or the code of an error"""
    prompt_tokens: int = 0
    new_tokens: int = 0

    def add_tokens(self, outcome: Outcome) -> None:
        """Adds the tokens of a request, so far."""
        if outcome.started is not None:
            self.prompt_tokens += outcome.prompt_tokens
        self.new_tokens += outcome.new_tokens

    def add(self, other: Counts) -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.new_tokens += other.new_tokens

    def copy(self) -> Counts:
        return Counts(self.requests.copy(), self.prompt_tokens, self.new_tokens)


class Traffic:
    """Counts by tenant. Any thread may use it.

    At most `limit` tenants have counts of their own, and the others share those of OTHER. A tenant that has left the
    bank loses its counts at once. If it comes back, they begin at zero.
    """

    def __init__(self, models: Models, limit: int = 1000):
        self._models, self._limit = models, limit
        self._counts: dict[str | None, Counts] = {None: Counts()}
        """None: the base model"""
        self._other, self._all = Counts(), Counts()
        self._open: dict[int, tuple[Outcome, Counts]] = {}
        """what goes on, and whose counts it will be added to"""
        self._lock = threading.Lock()
        models.on_forget = self.forget

    def begin(self, outcome: Outcome) -> None:
        """Counts the tokens of a request, which the engine has taken, while they come."""
        with self._lock:
            self._open[id(outcome)] = outcome, self._of(outcome.tenant)

    def end(self, outcome: Outcome) -> None:
        """Counts a request that has ended."""
        with self._lock:
            _, counts = self._open.pop(id(outcome), None) or (outcome, self._of(outcome.tenant))
            if self._counts.get(outcome.tenant) is not counts:  # unloaded meanwhile
                counts = self._other
            for one in (counts, self._all):
                one.requests[outcome.error or "completed"] += 1
                one.add_tokens(outcome)

    def forget(self, name: str) -> None:
        """Drops the counts of a tenant that was removed."""
        with self._lock:
            self._counts.pop(name, None)

    def by_tenant(self) -> dict[str | None, Counts]:
        """Of the base model (None), and of each tenant that has sent a request. The last are those of OTHER, if there
        are any."""
        with self._lock:
            for name in set(self._counts) - set(self._models.names) - {None}:
                del self._counts[name]
            found = {name: counts.copy() for name, counts in self._counts.items()}
            other = found.pop(OTHER, Counts())
            other.add(self._other)
            for outcome, counts in self._open.values():
                known = self._counts.get(outcome.tenant) is counts and outcome.tenant != OTHER
                (found[outcome.tenant] if known else other).add_tokens(outcome)
        return found if other == Counts() else found | {OTHER: other}

    def total(self) -> Counts:
        """Of all, also of tenants that were unloaded."""
        with self._lock:
            summed = self._all.copy()
            for outcome, _ in self._open.values():
                summed.add_tokens(outcome)
        return summed

    def _of(self, tenant: str | None) -> Counts:
        if tenant not in self._counts and len(self._counts) <= self._limit and tenant in self._models.names:
            self._counts[tenant] = Counts()
        return self._counts.get(tenant, self._other)
