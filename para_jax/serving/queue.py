"""FairQueue: tenants take turns; within a tenant, first come, first served."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from itertools import islice
from typing import Generic, TypeVar

T = TypeVar("T")

#: Tenants among which an item that fits is looked for, at most: a look costs the same however many wait.
LOOKED_AT = 32


class FairQueue(Generic[T]):
    """A queue per tenant, served in turn: however long one queue is, the first item of another waits for at most one
    item of every other tenant. Every operation takes constant time, but `head` looks at the first items of at most
    LOOKED_AT tenants."""

    def __init__(self):
        self._lines: OrderedDict[Hashable, OrderedDict[int, T]] = OrderedDict()
        self._count = 0

    def put(self, tenant: Hashable, number: int, item: T, *, first: bool = False) -> None:
        """Adds an item to the end of its tenant's queue, or to its beginning. `number` identifies it."""
        line = self._lines.setdefault(tenant, OrderedDict())
        self._count += number not in line
        line[number] = item
        line.move_to_end(number, last=not first)

    def head(self, fits: Callable[[T], bool] = lambda item: True) -> T | None:
        """The first item of the tenant whose turn it is, or of the next one whose first item fits; None if none of the
        first LOOKED_AT does."""
        lines = islice(self._lines.values(), LOOKED_AT)
        return next((item for line in lines if fits(item := next(iter(line.values())))), None)

    def take(self, tenant: Hashable) -> T:
        """Removes and returns a tenant's first item. Its next turn comes after all other tenants'."""
        line = self._lines[tenant]
        _, item = line.popitem(last=False)
        self._lines.move_to_end(tenant)  # its turn is over, even if it waits with more
        if not line:
            del self._lines[tenant]
        self._count -= 1
        return item

    def remove(self, tenant: Hashable, number: int) -> None:
        """Removes an item from anywhere in the queue; does nothing if it is not there."""
        line = self._lines.get(tenant)
        if line is not None and number in line:
            del line[number]
            self._count -= 1
            if not line:
                del self._lines[tenant]

    def waiting(self, tenant: Hashable) -> int:
        """The number of a tenant's items."""
        return len(self._lines.get(tenant, ()))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[T]:
        return (item for line in self._lines.values() for item in line.values())
