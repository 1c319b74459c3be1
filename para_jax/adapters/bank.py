"""AdapterBank: the named store of all tenants' adapters. It lives in host memory; at prefill the adapters of a batch's
rows go to the device, and nothing else.

Adapters that differ in rank and sites only are padded to one shape, a group. Rows hold a stack for every group with as
many places as the batch has rows, whoever is in it, so that the compiled programs depend on the batch's size and the
groups alone: tenants come, go and mix without a new one.
"""

from __future__ import annotations

import bisect
import difflib
import hashlib
import threading
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..config import ADAPTER_CONFIGS, SITES, LoraConfig, ModelConfig, adapter_method, one_of, require, shorten
from ..sharding import place
from ..storage.bucket import BucketPath
from ..untrusted import shown
from .adapter import Adapter, AdapterParam, init, is_variable, named_leaves, with_leaves
from .files import load_adapter, require_finite
from .methods import METHODS
from .rows import Rows, Stack, check_fits


class Entry(NamedTuple):
    """A tenant of the bank."""

    method: str
    """para | ia3 | lora"""
    config: Any
    """the adapter's own config"""
    version: int
    """a number that no other adapter of this bank ever had"""
    content: str
    """sha256 of the config and the weights: equal for equal adapters only"""
    group: Any
    """the config to which it is padded"""
    weights: dict[str, np.ndarray]
    """by name, [layers, ...], padded; never changed"""


class AdapterBank:
    """Adapters by name. All methods may be called from several threads; Rows that were handed out keep their adapters
    whatever happens to the names."""

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
            capacity: the most tenants.
            max_r: the largest rank; smaller ones are padded to it with zeros.
            methods: which methods may join. With lora, every row carries matrices of rank max_r into decode and pays
                two small matrix products a site and token, whatever its own method.
            sites: whose outputs an adapter may change. An (IA)^3 factor on down_proj's input counts as up_proj.
            dtype: of the matrices, here and on the device: float32 or bfloat16. Vectors stay float32, for those of
                (IA)^3 lie close to one.
        """
        for name, value in (("capacity", capacity), ("max_r", max_r)):
            require(type(value) is int and value >= 1, name, value, "a whole number of at least 1")
        known = bool(methods) and set(methods) <= set(ADAPTER_CONFIGS)
        require(known, "methods", methods, "some of " + ", ".join(ADAPTER_CONFIGS))
        require(bool(sites) and set(sites) <= set(SITES), "sites", sites, "a non-empty part of " + ", ".join(SITES))
        require(dtype in ("float32", "bfloat16"), "dtype", dtype, "float32 or bfloat16")
        self.model_config, self.capacity, self.max_r, self.dtype = model_config, capacity, max_r, dtype
        self.methods = tuple(method for method in ADAPTER_CONFIGS if method in methods)
        self.sites = tuple(site for site in SITES if site in sites)
        self._entries: dict[str, Entry] = {}
        self._held: Counter[Any] = Counter()
        """how many entries each group has"""
        self._templates: dict[Any, Adapter] = {}
        self._versions = 0
        self._lock = threading.Lock()

    @classmethod
    def holding(cls, adapters: dict[str, Adapter], model_config: ModelConfig, *, dtype: str = "float32") -> AdapterBank:
        """A bank of these adapters, made for their methods, sites and largest rank and no more."""
        require(bool(adapters), "bank: adapters", adapters, "at least one")
        normal = [adapter.normal(model_config).config for adapter in adapters.values()]
        bank = cls(
            model_config,
            capacity=len(adapters),
            max_r=max(getattr(config, "r", 1) for config in normal),
            methods=tuple({adapter_method(config) for config in normal}),
            sites=tuple({site for config in normal for site in config.target_modules}),
            dtype=dtype,
        )
        for name, adapter in adapters.items():
            bank.add(name, adapter)
        return bank

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._entries)

    @property
    def nbytes(self) -> int:
        """Host memory of all weights, in bytes."""
        return sum(weights.nbytes for entry in list(self._entries.values()) for weights in entry.weights.values())

    def entry(self, name: str) -> Entry:
        """What the bank holds under a name. Raises ValueError, with the nearest names, for an unknown one."""
        found = self._entries.get(name) if isinstance(name, str) else None
        if found is None:
            raise ValueError(unknown(name, self.names))
        return found

    def add(self, name: str, adapter: Adapter | str | Path | BucketPath) -> None:
        """Takes in an adapter, or that of a folder or hub id, under a new name.

        Raises ValueError, and keeps what it holds, for a name that is taken, a full bank, and an adapter of another
        backbone, method, site or rank than the bank was made for.
        """
        require(isinstance(name, str) and bool(name), "bank: name", name, "a text that is not empty")
        self._check_room(name)
        entry = self._made(name, adapter)
        with self._lock:
            self._check_room(name)
            self._put(name, entry)

    def replace(self, name: str, adapter: Adapter | str | Path | BucketPath) -> None:
        """Puts another adapter under a name that is held; errors as in add."""
        self.entry(name)
        entry = self._made(name, adapter)
        with self._lock:
            held = name in self._entries
            if held:
                self._put(name, entry)
        if not held:
            self.entry(name)  # removed meanwhile: raises

    def remove(self, name: str) -> None:
        """Forgets a tenant. Raises ValueError for an unknown name."""
        with self._lock:
            entry = self._entries.pop(name, None) if isinstance(name, str) else None
            if entry is not None:
                self._forget(entry.group)
        if entry is None:
            raise ValueError(unknown(name, self.names))

    def rows(self, names: Iterable[str | None]) -> Rows:
        """One tenant a batch row, by name; None is the base model.

        Raises ValueError, before anything is copied, for an unknown name, with the nearest known ones.
        """
        names = [names] if isinstance(names, str) else list(names)
        require(bool(names), "bank.rows: names", names, "a tenant's name or None for each row")
        with self._lock:  # all of one moment; what is missing is looked for after it
            entries = [self._entries.get(name) if isinstance(name, str) else None for name in names]
        for name, entry in zip(names, entries, strict=True):
            if entry is None and name is not None:
                raise ValueError(unknown(name, self.names))
        return self.rows_of(entries)

    def rows_of(self, entries: list[Entry | None]) -> Rows:
        """One tenant a batch row, by what entry() gave, whatever has become of its name; None is the base model."""
        groups = self._groups(entries)
        index = np.full((len(groups), len(entries)), -1, np.int32)
        stacks = []
        for of_rows, group in zip(index, groups, strict=True):
            members = [entry for entry in entries if entry is not None and entry.group == group]
            distinct = list({entry.version: entry for entry in members}.values())
            place_of = {entry.version: i for i, entry in enumerate(distinct)}
            of_rows[:] = [-1 if entry is None else place_of.get(entry.version, -1) for entry in entries]
            stacks.append(Stack(stacked(self._template(group), distinct, len(entries))))
        mesh = jax.sharding.get_mesh()
        if not mesh.empty:
            stacks = place(stacks, mesh, self.model_config)
        return Rows(tuple(stacks), jnp.asarray(index))

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __str__(self) -> str:
        held = Counter(entry.method for entry in list(self._entries.values()))
        counted = ", ".join(f"{count} {method}" for method, count in held.items()) or "none yet"
        text = f"{len(self)} of {self.capacity} tenants ({counted}), {self.nbytes / 1e6:.1f} MB of host memory"
        if "lora" in self.methods:
            text += f"; every row decodes with LoRA matrices of rank {self.max_r} on {', '.join(self.sites)}"
        return text

    # ---------------------------------------------------------------------------------------------------- within

    def _check_room(self, name: str) -> None:
        if name in self._entries:
            raise ValueError(f"bank: {name!r} is held already; replace it, or choose another name")
        if len(self._entries) >= self.capacity:
            raise ValueError(
                f"bank: full with {self.capacity} tenants, {name!r} was not added; remove one, or make the bank "
                "with a larger capacity"
            )

    def _put(self, name: str, entry: Entry) -> None:
        self._versions += 1
        replaced = self._entries.get(name)
        self._held[entry.group] += 1
        self._entries[name] = entry._replace(version=self._versions)
        if replaced is not None:
            self._forget(replaced.group)

    def _forget(self, group: Any) -> None:
        """Counts an entry of a group less; a group without any is none."""
        self._held[group] -= 1
        if not self._held[group]:
            del self._held[group]
            self._templates.pop(group, None)

    def _made(self, name: str, adapter: Adapter | str | Path | BucketPath) -> Entry:
        """The entry of an adapter, padded; its version comes later."""
        if not isinstance(adapter, Adapter):
            adapter = load_adapter(adapter, self.model_config)
        check_fits(adapter, self.model_config)
        config, method = adapter.config, adapter_method(adapter.config)
        require(
            method in self.methods, f"bank: {name}: method", method, one_of(self.methods) + " (AdapterBank methods)"
        )
        normal = adapter.normal(self.model_config)
        other = [site for site in normal.config.target_modules if site not in self.sites]
        expected = "some of " + ", ".join(self.sites) + " (AdapterBank sites; .holding takes its adapters')"
        require(not other, f"bank: {name}: sites", other, expected)
        r = getattr(config, "r", 1)
        require(r <= self.max_r, f"bank: {name}: r", r, f"at most {self.max_r} (AdapterBank max_r)")
        leaves = host_leaves(normal)
        require_finite(f"bank: {name}", leaves)
        group = self._group(normal.config)
        template = named_leaves(self._template(group))
        weights = {key: padded(leaves.get(key), shape, adapter.neutral) for key, shape in template.items()}
        return Entry(method, config, 0, content_hash(adapter), group, weights)

    def _group(self, config) -> Any:
        """The config of all adapters that stack with one of this normal config."""
        rank = {"r": self.max_r} if hasattr(config, "r") else {}
        scale = {"lora_alpha": float(self.max_r)} if isinstance(config, LoraConfig) else {}
        return replace(config, target_modules=self.sites, **rank, **scale)

    def _template(self, group) -> Adapter:
        """An abstract adapter of a group, its matrices in the bank's dtype."""

        def in_dtype(variable):
            matrix = isinstance(variable, AdapterParam) and len(variable.shape) == 3  # [layers, in, out]
            return variable.replace(jax.ShapeDtypeStruct(variable.shape, self.dtype)) if matrix else variable

        if group not in self._templates:
            adapter = jax.eval_shape(lambda: init(METHODS[type(group)], group, self.model_config, 0))
            self._templates[group] = jax.tree.map(in_dtype, adapter, is_leaf=is_variable)
        return self._templates[group]

    def _groups(self, entries: list[Entry | None]) -> list[Any]:
        """The groups that Rows hold, always in this order: those of the bank and of these entries, and at least one
        per method."""
        with self._lock:
            groups = set(self._held)
        groups |= {entry.group for entry in entries if entry is not None}
        for method in self.methods:
            if all(adapter_method(group) != method for group in groups):
                inputs = {"feedforward_modules": ()} if method == "ia3" else {}
                groups.add(self._group(ADAPTER_CONFIGS[method](**inputs)))
        return sorted(groups, key=repr)


#: Names that an unknown one is compared with at most, of each kind: a comparison takes about 50 microseconds.
COMPARED = 50


def unknown(name: object, known: tuple[str, ...]) -> str:
    """The error for a tenant that the bank does not hold, with similar names: of those that begin or end alike."""
    text = str(name)[:100]
    near = [one for one in known if one.startswith(text[:3])]
    at = bisect.bisect(sorted(near), text)  # the closer in this order, the longer the same beginning
    near = sorted(near)[max(0, at - COMPARED // 2) : at + COMPARED // 2]
    near += [one for one in known if one.endswith(text[-3:])][:COMPARED] + list(known[:COMPARED])
    nearest = difflib.get_close_matches(text, [one[:100] for one in dict.fromkeys(near)], n=3, cutoff=0.5)
    hint = f"the nearest are {', '.join(map(shown, nearest))}" if nearest else ""
    hint = hint or f"it holds {', '.join(map(shown, known[:3])) or 'none'}{' ...' if len(known) > 3 else ''}"
    return f"no tenant {shorten(name)}; {hint}"


def padded(leaf: np.ndarray | None, shape: jax.ShapeDtypeStruct, neutral: float) -> np.ndarray:
    """The array with a larger shape, filled up with zeros; with `neutral` where there is none."""
    if leaf is None:
        return np.full(shape.shape, neutral, shape.dtype)
    out = np.zeros(shape.shape, shape.dtype)
    out[tuple(map(slice, leaf.shape))] = leaf
    return out


def stacked(template: Adapter, entries: list[Entry], places: int) -> Adapter:
    """The entries' weights on the device, [places, layers, ...] each, in the first places; zeros in the others. Only
    the entries' own bytes are sent, each once: the rest is made on the device."""
    shapes = named_leaves(template)
    if len(entries) == places:
        return with_leaves(template, {k: jax.device_put(np.stack([e.weights[k] for e in entries])) for k in shapes})
    made = {name: jnp.zeros((places, *shape.shape), shape.dtype) for name, shape in shapes.items()}
    for i, entry in enumerate(entries):
        made = put_entry(made, {name: entry.weights[name] for name in shapes}, i)
    return with_leaves(template, made)


@partial(jax.jit, donate_argnums=0)
def put_entry(stacks: dict[str, jax.Array], weights: dict[str, jax.Array], place) -> dict[str, jax.Array]:
    """The stacks with one entry's weights in a place. The given stacks are donated."""
    return {name: jax.lax.dynamic_update_index_in_dim(stacks[name], weights[name], place, 0) for name in stacks}


def content_hash(adapter: Adapter) -> str:
    digest = hashlib.sha256(repr((adapter.config, adapter.backbone)).encode())
    for name, leaf in sorted(host_leaves(adapter).items()):
        digest.update(name.encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def host_leaves(adapter: Adapter) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf, np.float32) for name, leaf in named_leaves(adapter).items()}
