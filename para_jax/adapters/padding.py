"""Adapters of different ranks and sites in one shape, so that an AdapterBank can stack them.

A group is the config that all its adapters are padded to: the bank's rank and sites, and what is left of their own
config. Zeros fill up a matrix; the method's neutral weight fills a site that an adapter lacks. A bank holds neither:
they are written where adapters are stacked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..config import ModelConfig
from ..runtime.sharding import is_variable
from .adapter import Adapter, AdapterParam, abstract, named_leaves, with_leaves
from .methods import method_of


def group_template(group: Any, model: ModelConfig, dtype: str) -> Adapter:
    """An abstract adapter of a group. Its matrices have this dtype; its vectors stay float32."""

    def in_dtype(variable):
        matrix = isinstance(variable, AdapterParam) and len(variable.shape) == 3  # [layers, in, out]
        return variable.replace(jax.ShapeDtypeStruct(variable.shape, dtype)) if matrix else variable

    return jax.tree.map(in_dtype, abstract(method_of(group).adapter, group, model), is_leaf=is_variable)


@dataclass(frozen=True, eq=False)
class Held:
    """One array of an adapter, padded to [layers, ...], without what fills it up."""

    shape: tuple[int, ...]
    dtype: Any
    parts: tuple[np.ndarray, ...] = ()
    """of some layers each, in their order: [layers, ...] from the start of every axis; zeros follow. Empty: none of the
    array is the adapter's own"""
    fill: float = 0.0
    """every value of an array without parts"""

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def whole(self, out: np.ndarray | None = None) -> np.ndarray:
        """The padded array; written to `out`, where that is given. Without `out` it may be the held one: no copy."""
        complete = [part.shape for part in self.parts] == [self.shape]
        if out is None and complete:
            return self.parts[0]
        out = np.empty(self.shape, self.dtype) if out is None else out
        if not complete:
            out[:] = self.fill
        first = 0
        for part in self.parts:
            out[(slice(first, first + len(part)), *map(slice, part.shape[1:]))] = part
            first += len(part)
        return out


def held_leaves(adapter: Adapter, template: Adapter) -> dict[str, Held]:
    """The adapter's arrays, by name, in the template's dtypes and, when whole, in its shapes."""
    leaves, shapes = host_leaves(adapter), named_leaves(template)
    variables = jax.tree.leaves(template, is_leaf=is_variable)

    def held(name: str, variable) -> Held:
        shape, dtype = shapes[name].shape, shapes[name].dtype
        if name not in leaves:
            return Held(shape, dtype, fill=adapter.neutral)
        axis = 1 + variable.axes.index("rank") if "rank" in variable.axes else None
        return Held(shape, dtype, tuple(part.astype(dtype) for part in without_zeros(leaves[name], axis)))

    return {name: held(name, variable) for name, variable in zip(shapes, variables, strict=True)}


def held_bytes(adapter: Adapter, normal: Adapter) -> int:
    """Bytes of an adapter in a float32 bank, at most; both may be abstract.

    Args:
        normal: what Adapter.normal gives for it.
    """

    def values(of: Adapter, matrices: bool) -> int:
        variables = jax.tree.leaves(of, is_leaf=is_variable)
        return sum(math.prod(one.shape) for one in variables if ("rank" in one.axes) == matrices)

    return 4 * (values(adapter, matrices=True) - adapter.unused + values(normal, matrices=False))


def without_zeros(leaf: np.ndarray, axis: int | None) -> list[np.ndarray]:
    """A part for each run of layers with the same number of places on an axis, up to the last one that is not all
    zero. Without an axis the leaf itself."""
    if axis is None:
        return [leaf]
    of_place = np.moveaxis(leaf, axis, 1)  # [layers, places, ...]
    used = (of_place != 0).any(axis=tuple(range(2, leaf.ndim)))
    counts = np.where(used, np.arange(1, used.shape[1] + 1), 0).max(axis=1)
    # A part ends where the next layer has another count.
    starts = [0, *(1 + np.flatnonzero(np.diff(counts)))]
    parts = np.split(of_place, starts[1:])
    return [np.moveaxis(part[:, : counts[start]], 1, axis) for start, part in zip(starts, parts, strict=True)]


def stacked(template: Adapter, weights: Sequence[dict[str, Held]], places: int) -> Adapter:
    """Adapters, [places, layers, ...] each: these in the first places, zeros in the others. On the host if there are as
    many as places. Else the zeros are made on the device, and each adapter is sent once.
    """
    shapes = named_leaves(template)
    if len(weights) == places:
        stacks = {name: np.empty((places, *shape.shape), shape.dtype) for name, shape in shapes.items()}
        for i, of_one in enumerate(weights):
            for name, stack in stacks.items():
                of_one[name].whole(stack[i])
        return with_leaves(template, stacks)
    stacks = {name: jnp.zeros((places, *shape.shape), shape.dtype) for name, shape in shapes.items()}
    for i, of_one in enumerate(weights):
        stacks = put_in_place(stacks, {name: of_one[name].whole() for name in shapes}, i)
    return with_leaves(template, stacks)


@partial(jax.jit, donate_argnums=0)
def put_in_place(stacks: dict[str, jax.Array], weights: dict[str, jax.Array], place) -> dict[str, jax.Array]:
    """The stacks with one adapter's weights in a place. The given stacks are donated."""
    return {name: jax.lax.dynamic_update_index_in_dim(stacks[name], weights[name], place, 0) for name in stacks}


def host_leaves(adapter: Adapter) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf, np.float32) for name, leaf in named_leaves(adapter).items()}
