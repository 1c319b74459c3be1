"""One adapter for each group of rows of a batch: what training many tenants in one run uses. Rows of one group share
its weights, as rows of a batch share one adapter's, instead of each having a copy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .adapter import Adapter, Adjustment, Shared, make_adjustment


class Groups(NamedTuple):
    """A batch cut into groups of equally many rows that follow each other; group g uses adapter index[g]. Each adapter
    has at most one group, so that its gradient is that group's, as it is: nothing is added up over groups."""

    adapters: Adapter
    """its arrays lead with (layers, tenants): what a scan over the layers takes, and gives gradients of, as it is"""
    index: jax.Array
    """int32 [groups]; -1 is the backbone alone"""
    place: jax.Array
    """int32 [tenants], each adapter's group; -1 for none"""


def grouped(adapters: Adapter, index: Int[Array, " groups"]) -> Groups:
    """The adapters of a batch's groups, from arrays that lead with (layers, tenants); every index but -1 may occur
    once."""
    tenants = jax.tree.leaves(adapters)[0].shape[1]
    is_its = index[None] == jnp.arange(tenants)[:, None]
    return Groups(adapters, index, jnp.where(is_its.any(axis=1), jnp.argmax(is_its, axis=1).astype(jnp.int32), -1))


def layers_first(adapters: Adapter) -> Adapter:
    """Adapters whose arrays lead with (layers, tenants), from a stack's."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), adapters)


def of_groups(
    layer: Adapter, groups: Groups, x: Float[Array, "rows length width"], prompt_length: Int[Array, " rows"]
) -> Adjustment:
    """One layer's adjustments of a batch from its leading tenant axis; all zeros where a group has no adapter.

    They lead with the rows, or are SharedByGroup where the prompt is not read and they are matrices.
    """
    count = groups.index.shape[0]
    weights = jax.tree.map(lambda leaf: taken(leaf, groups.index, groups.place), layer)
    lengths = prompt_length.reshape(count, -1)
    streams = x.reshape(count, -1, *x.shape[1:])

    if layer.shared:
        made = jax.vmap(make_adjustment)(weights, streams[:, 0], lengths[:, 0])
    else:
        made = jax.vmap(jax.vmap(make_adjustment, in_axes=(None, 0, 0)))(weights, streams, lengths)
    made = jax.tree.map(lambda a: jnp.where((groups.index >= 0).reshape(-1, *[1] * (a.ndim - 1)), a, 0), made)
    return SharedByGroup(made) if layer.shared else jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), made)


@jax.custom_vjp
def taken(leaf: jax.Array, index: jax.Array, place: jax.Array) -> jax.Array:
    """leaf[index], anyone's where the index is -1. Its backward pass takes too: a scatter would add up element by
    element, on a GPU in an order that changes."""
    return leaf[jnp.maximum(index, 0)]


def taken_forwards(leaf, index, place):
    return taken(leaf, index, place), place


def taken_backwards(place, gradient):
    return of_places(gradient, place), None, None


taken.defvjp(taken_forwards, taken_backwards)


def of_places(of_each_group: jax.Array, place: jax.Array) -> jax.Array:
    """Each tenant's value [tenants, ...] among those of the groups [groups, ...]; 0 for one that has no group."""
    held = (place >= 0).reshape(-1, *[1] * (of_each_group.ndim - 1))
    return jnp.where(held, of_each_group[jnp.maximum(place, 0)], 0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedByGroup(Shared):
    """One adjustment for the rows of each group: its arrays lead with the groups."""

    def adjust(
        self, site: str, x: Float[Array, "rows length in"], y: Float[Array, "rows length out"]
    ) -> Float[Array, "rows length out"]:
        groups = jax.tree.leaves(self.adjustment)[0].shape[0]
        cut = [a.reshape(groups, -1, *a.shape[1:]) for a in (x, y)]
        return jax.vmap(lambda a, x, y: a.adjust(site, x, y))(self.adjustment, *cut).reshape(y.shape)
