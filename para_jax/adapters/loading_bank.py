"""A bank of more adapters than fit in memory: each is loaded when it is needed, and the least recently used are
dropped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from weakref import WeakKeyDictionary

from ..config import ModelConfig
from .adapter import Adapter
from .bank import AdapterBank, Entry
from .padding import Held
from .preview import Preview

#: Adapters that open requests may hold, however small the memory is.
FEWEST = 16


class LoadingBank(AdapterBank):
    """An AdapterBank that seems to hold all its tenants. What an entry computes does not depend on which are loaded.
    Its tenants can't be replaced: the new adapter would be lost once it was dropped from memory."""

    memory: int
    """bytes for the adapters that are held. There is always one"""
    largest: int
    """bytes of the largest adapter"""
    _loaded: int
    """bytes of those that are held now"""
    _alive: WeakKeyDictionary[Held, int]
    """the bytes of each adapter that the bank or an open request holds, by one of its arrays"""
    _contents: dict[str, str]
    """a hash of each adapter that was loaded so far"""
    _found: dict[str, Preview]
    _load: Callable[[str], Adapter]
    _loading: threading.Lock
    """held while an adapter is loaded: one at a time"""

    @classmethod
    def of(
        cls, found: Mapping[str, Preview], model_config: ModelConfig, load: Callable[[str], Adapter], memory: int
    ) -> LoadingBank:
        """
        Args:
            found: the tenants, as `previews` gives them.
            load: gives the adapter of a name; a ValueError is raised where the tenant is asked for.
            memory: bytes of host memory for adapters. Those of open requests are held in addition.
        """
        bank = cls.fitting([one.config for one in found.values()], model_config, capacity=len(found))
        bank._found, bank._load, bank._loading = dict(found), load, threading.Lock()
        bank._alive, bank._contents = WeakKeyDictionary(), {}
        bank.memory, bank._loaded = memory, 0
        bank.largest = max((one.nbytes for one in found.values()), default=0)
        return bank

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._found)

    def identities(self) -> list[tuple[str, str]]:
        return [(name, one.digest) for name, one in self._found.items()]

    def entry(self, name: str) -> Entry:
        entry = self._used(name)
        if entry is None and name in self:
            with self._loading:  # those who ask for an adapter that is held need not wait
                entry = self._used(name)
                if entry is None:
                    super().add(name, self._load(name))
                    entry = self._used(name)
                    assert entry is not None
                    with self._lock:
                        # An entry is a tuple, to which nothing can refer weakly, so this refers to one of its arrays.
                        self._alive[next(iter(entry.weights.values()))] = entry.nbytes
                    self._loaded += entry.nbytes
                    self._drop_others()
        found = super().entry(name) if entry is None else entry
        self._contents[name] = found.content
        return found

    def content(self, name: str) -> str:
        """A hash of a tenant's adapter, which is loaded for it only once. Raises ValueError as `entry` does."""
        found = self._contents.get(name) if isinstance(name, str) else None
        return self.entry(name).content if found is None else found

    @property
    def crowded(self) -> bool:
        """Whether open requests hold too many adapters for one more: with the largest there would be more than twice
        what the memory is for."""
        with self._lock:
            alive = list(self._alive.values())
        return len(alive) >= FEWEST and sum(alive) + self.largest > 2 * self.memory

    def _drop_others(self) -> None:
        """Drops the least recently used adapters until the memory has room for the others."""
        while self._loaded > self.memory and len(self._entries) > 1:
            with self._lock:
                oldest, entry = next(iter(self._entries.items()))
            super().remove(oldest)
            self._loaded -= entry.nbytes

    def _used(self, name: str) -> Entry | None:
        """The entry of an adapter that is held, which is now the most recently used."""
        with self._lock:
            entry = self._entries.pop(name, None) if isinstance(name, str) else None
            if entry is not None:
                self._entries[name] = entry
        return entry

    def add(self, name: str, adapter: object) -> None:
        raise ValueError(f"bank: {name!r}: the tenants of a bank that loads adapters stay the same; make another bank")

    replace = add

    def remove(self, name: str) -> None:
        self.add(name, None)  # raises

    def _entries_of(self, names: Sequence[str | None]) -> list[Entry | None]:
        return [None if name is None else self.entry(name) for name in names]

    def __contains__(self, name: object) -> bool:
        return name in self._found

    def __str__(self) -> str:
        needed, held = (count / 1e6 for count in (sum(one.nbytes for one in self._found.values()), self.memory))
        text = f"{len(self._found)} tenants, {needed:.1f} MB, loaded when they are asked for; "
        text += f"{held:.1f} MB of them are in host memory at a time"
        return f"{text}; {self.carried}" if self.carried else text


def bank_of(
    found: Mapping[str, Preview], model_config: ModelConfig, load: Callable[[str], Adapter], memory: int
) -> AdapterBank:
    """A bank of these adapters, all loaded if the memory has room for them."""
    loading = LoadingBank.of(found, model_config, load, memory)
    if sum(one.nbytes for one in found.values()) > memory:
        return loading
    bank = AdapterBank.fitting(loading.expected, model_config, capacity=len(found))
    for name in found:
        bank.add(name, load(name))
    bank.digests = dict(loading.identities())
    return bank
