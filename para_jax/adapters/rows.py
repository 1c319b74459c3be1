"""Adapters of many tenants: a Stack of them, and Rows, which says which one each row of a batch uses."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Int

from ..config import ModelConfig
from .adapter import (
    Adapter,
    Adjustment,
    Factors,
    Shared,
    SiteInput,
    SiteOutput,
    describe,
    make_adjustment,
)
from .scope import Reach, invocation_tokens, reach_of_config, reach_of_configs


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stack:
    """Adapters of one config as one pytree: every array leads with (tenants, layers)."""

    adapters: Adapter

    @property
    def size(self) -> int:
        return jax.tree.leaves(self.adapters)[0].shape[0]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """An adapter for each group of `rows_each` consecutive rows of a batch. Group g uses adapter index[i, g] of stack
    i, and the backbone alone where all its indices are -1. A group has at most one adapter."""

    stacks: tuple[Stack, ...]
    index: Any
    """int32 [stacks, groups]"""
    rows_each: int = field(default=1, metadata={"static": True})
    distinct: bool = field(default=False, metadata={"static": True})
    """a promise that each adapter has at most one group. Its gradient is then that group's, and nothing is added up"""

    @property
    def batch(self) -> int:
        return self.index.shape[1] * self.rows_each

    def by_row(self) -> Rows:
        """The same adapters with an index for each row."""
        if self.rows_each == 1:
            return self
        return Rows(self.stacks, jnp.repeat(self.index, self.rows_each, axis=1))


def stack_adapters(adapters: list[Adapter]) -> Stack:
    """Adapters of one config and backbone, stacked. Gradients of Rows have this shape, a slice per tenant.

    >>> stack_adapters([adapter, adapter]).size
    2
    """
    return Stack(jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters))


def pick(stack: Stack, indices) -> Rows:
    """The adapters of a batch: indices int [batch] into the stack; -1 is the base model.

    Raises ValueError for an index outside -1 .. size - 1, where the indices are concrete.

    >>> rows = pick(stack_adapters([adapter, adapter]), [1, -1])
    >>> forward(model, rows, np.repeat(tokens, 2, axis=0), 5).shape
    (2, 5, 256)
    """
    if not isinstance(indices, Tracer):
        on_host = np.asarray(indices)
        if on_host.size and (on_host.min() < -1 or on_host.max() >= stack.size):
            raise ValueError(f"pick: indices must be -1 (the base model) to {stack.size - 1}; got {on_host.tolist()}")
    return Rows((stack,), jnp.asarray(indices, jnp.int32)[None])


def by_layer(adapters: Adapter | Rows | Adjustments) -> tuple[object, Callable]:
    """The adapters' weights with a leading layer axis, and the function that makes one layer's adjustments.

    The function takes (one layer's weights, x [batch, length, width], prompt_length [batch]) and gives an Adjustment
    whose arrays lead with the batch (or that is Shared), in float32. Only the batch's tenants are gathered, a layer at
    a time. `start`, an argument after prompt_length, says where the prompts begin; default 0. For packed rows both are
    [batch, segments], and the arrays lead with (batch, segments).
    """
    if isinstance(adapters, Rows):
        return of_stacks(adapters)
    if isinstance(adapters, Adjustments):
        return list(adapters.layers), lambda made, x, prompt_length: made
    return adapters.in_all_layers(), make_of_all


def of_stacks(rows: Rows) -> tuple[tuple[Adapter, ...], Callable]:
    """by_layer for the adapters of one or several stacks."""
    if len(rows.stacks) > 1:
        rows = rows.by_row()
    weights = tuple(layers_first(stack.adapters).in_all_layers() for stack in rows.stacks)
    groups = [
        group_of_tenant(i, s.size) if rows.distinct else None for i, s in zip(rows.index, rows.stacks, strict=True)
    ]

    def make(layers, x, prompt_length, start=None):
        each = zip(layers, rows.index, groups, strict=True)
        return merged([of_groups(*one, rows.rows_each, x, prompt_length, start) for one in each])

    return weights, make


def make_of_all(layer: Adapter, x: jax.Array, prompt_length: jax.Array, start: jax.Array | None = None) -> Adjustment:
    """One layer's adjustments of a batch in which all rows use one adapter."""
    if layer.shared:
        return Shared(make_adjustment(layer, x[0], prompt_length.ravel()[0]))
    return make_of_one(layer, x, prompt_length, start)


def make_of_one(layer: Adapter, x: jax.Array, prompt_length: jax.Array, start: jax.Array | None = None) -> Adjustment:
    """One layer's adjustments for each row, or for each segment of packed rows, with one adapter."""
    if start is None:
        return jax.vmap(make_adjustment, in_axes=(None, 0, 0))(layer, x, prompt_length)
    of_row = make_adjustment
    if prompt_length.ndim > 1:
        of_row = jax.vmap(make_adjustment, in_axes=(None, None, 0, 0))
    return jax.vmap(of_row, in_axes=(None, 0, 0, 0))(layer, x, prompt_length, start)


def of_groups(
    layer: Adapter,
    index: Int[Array, " groups"],
    group: Int[Array, " tenants"] | None,
    rows_each: int,
    x: jax.Array,
    prompt_length: jax.Array,
    start: jax.Array | None,
) -> Adjustment:
    """One layer's adjustments of a batch from weights that lead with the tenants; all zeros where the index is -1.

    Args:
        group: each tenant's group, where it has at most one; see `gather`.
    """
    weights = gather(layer, index, group)
    streams, lengths, starts = jax.tree.map(
        lambda a: a.reshape(len(index), rows_each, *a.shape[1:]), (x, prompt_length, start)
    )
    shared = layer.shared and (rows_each > 1 or prompt_length.ndim > 1)
    if shared:  # the prompt is not read, so any row of a group will do
        made = jax.vmap(make_adjustment)(weights, streams[:, 0], lengths.reshape(len(index), -1)[:, 0])
    else:
        made = jax.vmap(make_of_one)(weights, streams, lengths, starts)
    # A negative index has gathered an arbitrary adapter.
    made = jax.tree.map(lambda a: jnp.where((index >= 0).reshape(-1, *[1] * (a.ndim - 1)), a, 0), made)
    return SharedByGroup(made) if shared else jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), made)


def layers_first(adapters: Adapter) -> Adapter:
    """Adapters whose arrays lead with (layers, tenants), from a stack's."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), adapters)


def gather(adapters: Adapter, index: jax.Array, group: jax.Array | None = None) -> Adapter:
    """The adapters of a batch from weights that lead with the tenants; an arbitrary one where the index is -1.

    Args:
        group: each tenant's group, where no tenant has two. The backward pass then takes each gradient from its group.
    """
    if group is None:
        return jax.tree.map(lambda leaf: leaf[jnp.maximum(index, 0)], adapters)
    return jax.tree.map(lambda leaf: taken(leaf, index, group), adapters)


@jax.custom_vjp
def taken(leaf: jax.Array, index: jax.Array, group: jax.Array) -> jax.Array:
    """leaf[index], with a backward pass that gathers too. The one that JAX derives is a scatter: it adds element by
    element, on a GPU in a varying order."""
    return leaf[jnp.maximum(index, 0)]


def taken_forwards(leaf, index, group):
    return taken(leaf, index, group), group


def taken_backwards(group, gradient):
    return of_tenants(gradient, group), None, None


taken.defvjp(taken_forwards, taken_backwards)


def group_of_tenant(index: Int[Array, " groups"], tenants: int) -> Int[Array, " tenants"]:
    """Each tenant's group, from each group's tenant; -1 for a tenant without one. No tenant may have two."""
    is_its = index[None] == jnp.arange(tenants)[:, None]
    return jnp.where(is_its.any(axis=1), jnp.argmax(is_its, axis=1).astype(jnp.int32), -1)


def of_tenants(of_groups: jax.Array, group: Int[Array, " tenants"]) -> jax.Array:
    """Each tenant's value [tenants, ...] from the groups' [groups, ...]; 0 for a tenant without a group."""
    held = (group >= 0).reshape(-1, *[1] * (of_groups.ndim - 1))
    return jnp.where(held, of_groups[jnp.maximum(group, 0)], 0)


def merged(adjustments: list[Adjustment]) -> Adjustment:
    """The adjustments of several stacks as one. Each row has at most one that isn't zero, so those of one kind add up
    to one record: PARA, (IA)^3 and the base model share a decode program, and so do LoRA adapters of several scopes."""
    distance: dict[str, Any] = {}
    for factors in (a for a in adjustments if isinstance(a, Factors)):
        for site, value in factors.distance.items():
            distance[site] = distance[site] + value if site in distance else value
    of_kind: dict[Any, Adjustment] = {}
    for made in (a for a in adjustments if not isinstance(a, Factors)):
        kind = jax.tree.structure(made), tuple(leaf.shape for leaf in jax.tree.leaves(made))
        of_kind[kind] = jax.tree.map(jnp.add, of_kind[kind], made) if kind in of_kind else made
    parts = [*([Factors(distance)] if distance else []), *of_kind.values()]
    return parts[0] if len(parts) == 1 else Several(tuple(parts))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Several(Adjustment):
    """Adjustments of different kinds. Each row has at most one that isn't zero."""

    parts: tuple[Adjustment, ...]

    def adjust(self, site: str, x: SiteInput, y: SiteOutput) -> SiteOutput:
        for part in self.parts:
            y = part.adjust(site, x, y)
        return y


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SharedByGroup(Shared):
    """One adjustment for the rows of each group: its arrays lead with the groups."""

    def adjust(self, site: str, x: SiteInput, y: SiteOutput) -> SiteOutput:
        groups = jax.tree.leaves(self.adjustment)[0].shape[0]
        cut = [a.reshape(groups, -1, *a.shape[1:]) for a in (x, y)]
        return jax.vmap(lambda a, x, y: a.adjust(site, x, y))(self.adjustment, *cut).reshape(y.shape)


class Adjustments(NamedTuple):
    """Adjustments that adapters made already, one per batch row, from any prompts. They take the adapters' place."""

    layers: tuple
    """per layer: an Adjustment in float32 whose arrays lead with the batch, or a Shared one"""
    reach: Reach
    """where the adapters act"""


def reach_of(adapters: Adapter | Rows | Adjustments, rows: int) -> Reach:
    """Where the adapters of a batch act."""
    if isinstance(adapters, Adjustments):
        return adapters.reach
    if isinstance(adapters, Rows):
        return reach_of_configs([stack.adapters.config for stack in adapters.stacks], adapters.by_row().index)
    return reach_of_config(adapters.config, rows)


def check_fits(adapters: Adapter | Rows | Adjustments | None, model: ModelConfig) -> None:
    """Raises ValueError where adapters were made for a backbone of another shape."""
    if adapters is None or isinstance(adapters, Adjustments):
        return
    for adapter in [stack.adapters for stack in adapters.stacks] if isinstance(adapters, Rows) else [adapters]:
        expected = describe(model)
        if adapter.backbone != expected:
            raise ValueError(f"the adapter was made for another backbone: {adapter.backbone}. This one is {expected}")


def row_configs(adapters: Any, rows: int) -> Iterable[Any]:
    """The config of each row's adapter, where any of them has invocation tokens. A bank's Rows have none: they hold
    adapters in a form that several tenants share."""
    if isinstance(adapters, Adapter):
        return [adapters.config] * rows
    configs = [stack.adapters.config for stack in adapters.stacks] if isinstance(adapters, Rows) else []
    if not any(map(invocation_tokens, configs)):
        return [None] * rows
    used = np.asarray(adapters.by_row().index) >= 0
    return [next((configs[i] for i in np.flatnonzero(row)), None) for row in used.T]
