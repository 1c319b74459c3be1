"""AdapterBank: the named store of all tenants' adapters. It lives in host memory. At prefill only the adapters of a
batch's rows go to the device.

Adapters that differ in rank and sites only form a group: they are padded to one shape as they are stacked (padding.py).
Rows hold one stack per group, with room for the distinct adapters of the batch, rounded up to a power of two. The
compiled programs depend on that number, the size of the batch and the groups alone: tenants come, go and mix without a
new one.
"""

from __future__ import annotations

import hashlib
import itertools
import threading
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from ..config import SITES, ModelConfig, listed
from ..io.checks import require
from ..io.storage.bucket import BucketPath
from ..runtime.sharding import place
from .adapter import Adapter, named_leaves
from .files import load_adapter, require_finite
from .methods import METHODS, method_of
from .names import unknown
from .padding import Held, group_template, held_leaves, host_leaves, stacked
from .rows import Rows, Stack, check_fits
from .scope import scope_of

Bank = TypeVar("Bank", bound="AdapterBank")

#: The versions of entries. Banks share them, so a batch may have entries of several banks.
VERSIONS = itertools.count(1)


class Entry(NamedTuple):
    """A tenant of the bank."""

    method: str
    """the name of its method, such as para"""
    config: Any
    """the adapter's own config"""
    version: int
    """a number that no other adapter of any bank in this process ever had"""
    content: str
    """sha256 of the config and the weights, the same for equal adapters only"""
    group: Any
    """the config that it is padded to"""
    weights: dict[str, Held]
    """its arrays by name; never changed in place"""

    @property
    def nbytes(self) -> int:
        return sum(held.nbytes for held in self.weights.values())


class AdapterBank:
    """Adapters by name. All methods may be called from several threads. Rows that were handed out keep their adapters,
    whatever happens to the names.

    >>> bank = AdapterBank(model.config, max_r=16)
    >>> bank.add("acme", "runs/a/adapter")
    >>> "acme" in bank
    True
    """

    def __init__(
        self,
        model_config: ModelConfig,
        *,
        capacity: int = 1024,
        max_r: int = 16,
        methods: tuple[str, ...] = ("para", "ia3"),
        sites: tuple[str, ...] = ("q_proj", "v_proj", "up_proj"),
        dtype: str = "float32",
    ):
        """An empty bank.

        Args:
            capacity: the largest number of tenants.
            max_r: the largest rank. Smaller ones are padded to it with zeros in a batch's rows, and not in memory.
            methods: the methods that may join. With lora, every row carries matrices of rank max_r into decode and pays
                two small matrix products per site and token, whatever its own method.
            sites: the sites that an adapter may change. An (IA)^3 factor on down_proj's input counts as up_proj.
            dtype: of the matrices, here and on the device: float32 or bfloat16. Vectors stay float32, because those of
                (IA)^3 are close to one.
        """
        self.methods = names_among("methods", methods, tuple(method.name for method in METHODS))
        self.sites = names_among("sites", sites, SITES)
        self.model_config, self.capacity, self.max_r, self.dtype = model_config, capacity, max_r, dtype
        self.fingerprint: str | None = None
        """of the backbone of the last engine: adapters that were trained on other weights give a warning"""
        self._entries: dict[str, Entry] = {}
        self._held: Counter[Any] = Counter()
        """how many entries each group has"""
        self._templates: dict[Any, Adapter] = {}
        self.expected: tuple[Any, ...] = ()
        """configs of adapters that this bank was made for, whether it holds them or not"""
        self.digests: dict[str, str] = {}
        """hashes of tenants' files (preview.py), where they are known"""
        self._lock = threading.Lock()

    @classmethod
    def holding(cls, adapters: dict[str, Adapter], model_config: ModelConfig, *, dtype: str = "float32") -> AdapterBank:
        """A bank of these adapters, made for their methods, sites and largest rank only."""
        configs = [adapter.normal(model_config).config for adapter in adapters.values()]
        bank = cls.fitting(configs, model_config, capacity=len(adapters), dtype=dtype)
        bank.expected = ()  # a removed adapter's group goes with it
        for name, adapter in adapters.items():
            bank.add(name, adapter)
        return bank

    @classmethod
    def fitting(
        cls: type[Bank], configs: Iterable[Any], model_config: ModelConfig, *, capacity: int, dtype: str = "float32"
    ) -> Bank:
        """An empty bank for adapters of these configs, as `Adapter.normal` gives them. Whichever adapters it holds, its
        programs are those of a bank with all of them, so a row has the same bits."""
        configs = tuple(dict.fromkeys(configs))
        bank = cls(
            model_config,
            capacity=capacity,
            max_r=max(method_of(config).rank(config) for config in configs),
            methods=tuple({method_of(config).name for config in configs}),
            sites=tuple({site for config in configs for site in config.target_modules}),
            dtype=dtype,
        )
        bank.expected = configs
        return bank

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    @property
    def entries(self) -> tuple[Entry, ...]:
        """All tenants, as `entry` gives them."""
        return tuple(self._entries.values())

    @property
    def configs(self) -> list[Any]:
        """The configs of the adapters that are held or expected."""
        return [*(entry.config for entry in self.entries), *self.expected]

    @property
    def nbytes(self) -> int:
        """Host memory of all weights, in bytes."""
        return sum(entry.nbytes for entry in self.entries)

    def identities(self) -> list[tuple[str, str]]:
        """Each tenant's name, and a hash that tells its adapter from others."""
        return [(name, self.digests.get(name, entry.content)) for name, entry in list(self._entries.items())]

    def holds(self, name: str) -> bool:
        """Whether the adapter of a name is in host memory."""
        with self._lock:
            return name in self._entries

    def entry(self, name: str) -> Entry:
        """The tenant of a name. Raises ValueError, with the nearest names, for an unknown one."""
        found = self._entries.get(name) if isinstance(name, str) else None
        if found is None:
            raise ValueError(unknown(name, self.names))
        return found

    def add(self, name: str, adapter: Adapter | str | Path | BucketPath) -> None:
        """Adds an adapter, or that of a folder or hub id, under a new name.

        Raises ValueError, and changes nothing, for a name that is taken, a full bank, and an adapter of a backbone,
        method, site or rank that the bank was not made for.
        """
        entry = self._new_entry(name, adapter)
        with self._lock:
            self._check_room(name)
            self._put(name, entry)

    def replace(self, name: str, adapter: Adapter | str | Path | BucketPath) -> None:
        """Replaces the adapter of a name that is held. Errors as in add."""
        self.entry(name)
        entry = self._new_entry(name, adapter)
        with self._lock:
            self.entry(name)  # raises if another thread removed it
            self._put(name, entry)

    def remove(self, name: str) -> None:
        """Removes a tenant. Raises ValueError for an unknown name."""
        self.entry(name)
        with self._lock:
            if (entry := self._entries.pop(name, None)) is not None:  # else another thread removed it
                self.digests.pop(name, None)
                self._forget(entry.group)

    def rows(self, names: Iterable[str | None]) -> Rows:
        """One tenant per batch row, by name; None is the base model.

        Raises ValueError for an unknown name, with the nearest known ones, before anything is copied.
        """
        return self.rows_of(self._entries_of([names] if isinstance(names, str) else list(names)))

    def _entries_of(self, names: Sequence[str | None]) -> list[Entry | None]:
        """The entries of these tenants at one moment. Raises ValueError for an unknown name."""
        with self._lock:  # not during the slow search for similar names
            entries = [self._entries.get(name) if isinstance(name, str) else None for name in names]
        for name, entry in zip(names, entries, strict=True):
            if entry is None and name is not None:
                raise ValueError(unknown(name, self.names))
        return entries

    def blanks(self) -> list[Entry]:
        """An entry of zeros for each group of adapters that are held or expected, to compile programs with."""

        def blank(group: Any) -> Entry:
            shapes = named_leaves(self._template(group))
            weights = {name: Held(shape.shape, shape.dtype) for name, shape in shapes.items()}
            return Entry(method_of(group).name, group, 0, "", group, weights)

        return [blank(group) for group in sorted(self._known_groups(), key=repr)]

    def takes(self, entry: Entry) -> bool:
        """Whether an entry, perhaps of an adapter that has left, has the form of this bank's."""
        if entry.method not in self.methods or self._group(entry.group) != entry.group:
            return False
        own = named_leaves(self._template(entry.group))
        return all(leaf.shape == entry.weights[name].shape for name, leaf in own.items())  # else of another backbone

    def depends_on_prompt_end(self, entry: Entry) -> bool:
        """Whether what an adapter computes for given tokens depends on how many of them are its prompt."""
        return scope_of(entry.config)[0] != "all" or self._template(entry.group).reads_prompt

    def rows_of(self, entries: list[Entry | None], places: int | None = None) -> Rows:
        """One tenant per batch row, as entry() gave it, even if the name now has another adapter; None is the base
        model.

        Args:
            places: adapters that each stack has room for, so that all batches share their programs. None: a power of
                two that has room for the distinct ones of each group, at most the number of rows.
        """
        groups = self._groups(entries)
        index = np.full((len(groups), len(entries)), -1, np.int32)
        distinct = {group: {} for group in groups}
        for row, entry in enumerate(entries):
            if entry is not None:
                members = distinct[entry.group]
                members.setdefault(entry.version, (len(members), entry.weights))
                index[groups.index(entry.group), row] = members[entry.version][0]
        most = max([1, *map(len, distinct.values())])
        # A power of two makes few shapes, and so few programs.
        places = min(1 << (most - 1).bit_length(), len(entries)) if places is None else max(places, most)
        stacks = [
            Stack(stacked(self._template(group), [weights for _, weights in members.values()], places))
            for group, members in distinct.items()
        ]
        mesh = jax.sharding.get_mesh()
        stacks = jax.device_put(stacks) if mesh.empty else place(stacks, mesh, self.model_config)
        return Rows(tuple(stacks), jnp.asarray(index))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __repr__(self) -> str:
        held = Counter(entry.method for entry in list(self._entries.values()))
        counted = ", ".join(f"{count} {method}" for method, count in held.items()) or "none yet"
        return f"{len(self)} of {self.capacity} tenants ({counted}), {self.nbytes / 1e6:.1f} MB of host memory" + (
            f"; {self.carried}" if self.carried else ""
        )

    @property
    def carried(self) -> str:
        """What every row decodes with, if it is more than vectors."""
        return "; ".join(
            f"every row decodes with {method.label} matrices of rank {self.max_r} on {', '.join(self.sites)}"
            for method in METHODS
            if method.name in self.methods and method.carries == "matrices"
        )

    # --------------------------------------------------------------------------------------------------- private

    def _check_room(self, name: str) -> None:
        if name in self._entries:
            raise ValueError(f"bank: {name!r} is held already; replace it, or choose another name")
        if len(self._entries) >= self.capacity:
            raise ValueError(
                f"bank: full with {self.capacity} tenants, {name!r} was not added; remove a tenant, or make the bank "
                "with a larger capacity"
            )

    def _put(self, name: str, entry: Entry) -> None:
        replaced = self._entries.get(name)
        self._held[entry.group] += 1
        self._entries[name] = entry._replace(version=next(VERSIONS))
        if replaced is not None:
            self.digests.pop(name, None)
            self._forget(replaced.group)

    def _forget(self, group: Any) -> None:
        """Counts one entry less in a group. A group without entries is dropped, unless more of it are expected."""
        self._held[group] -= 1
        if not self._held[group]:
            del self._held[group]
            if group not in map(self._group, self.expected):
                self._templates.pop(group, None)

    def _new_entry(self, name: str, adapter: Adapter | str | Path | BucketPath) -> Entry:
        """The entry of an adapter, not yet numbered."""
        if not isinstance(adapter, Adapter):
            adapter = load_adapter(adapter, self.model_config, model=self)  # of a model, its fingerprint is read
        check_fits(adapter, self.model_config)
        method, normal = method_of(adapter.config), adapter.normal(self.model_config)
        self._require_room_for(name, method, normal.config)
        require_finite(f"bank: {name}", host_leaves(normal))
        group = self._group(normal.config)
        weights = held_leaves(normal, self._template(group))
        return Entry(method.name, adapter.config, 0, content_hash(adapter), group, weights)

    def _require_room_for(self, name: str, method: Any, config: Any) -> None:
        """Raises ValueError, with all that the bank must be made with, for a method, sites or a rank that it lacks."""
        r, needed = method.rank(config), {}
        if method.name not in self.methods:
            needed["methods"] = tuple(one.name for one in METHODS if one.name in (*self.methods, method.name))
        if not set(config.target_modules) <= set(self.sites):
            needed["sites"] = tuple(site for site in SITES if site in (*self.sites, *config.target_modules))
        if r > self.max_r:
            needed["max_r"] = r
        if needed:
            arguments = ", ".join(f"{key}={value!r}" for key, value in needed.items())
            rank = f" of r {r}" if hasattr(config, "r") else ""
            raise ValueError(
                f"bank: {name}: {method.label}{rank} on {', '.join(config.target_modules)} does not fit this bank "
                f"of {' and '.join(self.methods)} of r {self.max_r} on {', '.join(self.sites)}; make it with "
                f"{arguments} (serve has options of these names, with --adapter-root)"
            )

    def _group(self, config: Any) -> Any:
        return method_of(config).group_config(config, self.sites, self.max_r)

    def _template(self, group: Any) -> Adapter:
        found = self._templates.get(group)  # another thread may drop it meanwhile
        if found is None:
            found = self._templates[group] = group_template(group, self.model_config, self.dtype)
        return found

    def _known_groups(self) -> set[Any]:
        """The groups that are held or expected."""
        with self._lock:
            groups = set(self._held)
        return groups | {self._group(config) for config in self.expected}

    def _groups(self, entries: list[Entry | None]) -> list[Any]:
        """The groups that Rows hold, always in this order: those of the bank and of these entries, and at least one
        per method that decodes adapted. What decode carries is then the same for all tenants and at any time."""
        groups = self._known_groups() | {entry.group for entry in entries if entry is not None}
        for method in METHODS:
            own = [group for group in groups if type(group) is method.config]
            if method.name in self.methods and all(scope_of(group)[0] == "prompt" for group in own):
                groups.add(method.group_config(method.config(), self.sites, self.max_r))
        return sorted(groups, key=repr)


def names_among(name: str, given: Any, choices: tuple[str, ...]) -> tuple[str, ...]:
    """The given names in the order of the choices. Raises ValueError for none, and for one that is no choice."""
    names = listed(given) or ()
    known = len(names) > 0 and all(one in choices for one in names)
    require(known, f"AdapterBank: {name}", given, f"a list of some of {', '.join(choices)}")
    return tuple(choice for choice in choices if choice in names)


def content_hash(adapter: Adapter) -> str:
    """A hash of an adapter's config, backbone and weights."""
    return with_weights(hashlib.sha256(f"({adapter.config!r}, {adapter.backbone!r})".encode()), adapter)


def weights_hash(adapter: Adapter) -> str:
    """A hash of an adapter's weights alone. PEFT's format does not say what else is in `content_hash`."""
    return with_weights(hashlib.sha256(), adapter)


def with_weights(digest, adapter: Adapter) -> str:
    for name, leaf in sorted(host_leaves(adapter).items()):
        digest.update(name.encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()
