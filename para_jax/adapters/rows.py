"""Adapters of many tenants: a Stack of them, and Rows, which gives every row of a batch its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from ..config import ModelConfig
from .adapter import Adapter, Adjustment, Factors, Shared, describe, make_adjustment
from .groups import Groups, layers_first, of_groups


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
    """One adapter a batch row, of one or several stacks: row b uses adapter index[i, b] of stack i, and the backbone
    alone where all its indices are -1. A row has at most one adapter."""

    stacks: tuple[Stack, ...]
    index: jax.Array
    """int32 [stacks, batch]"""

    @property
    def batch(self) -> int:
        return self.index.shape[1]


def stack_adapters(adapters: list[Adapter]) -> Stack:
    """Adapters of one config and backbone, stacked. Gradients of Rows come back in this shape, a slice a tenant."""
    if not adapters:
        raise ValueError("stack_adapters: the list is empty; expected at least one adapter")
    for i, adapter in enumerate(adapters):
        if (adapter.config, adapter.backbone) != (adapters[0].config, adapters[0].backbone):
            raise ValueError(
                f"stack_adapters: adapter {i} ({adapter.config} for {adapter.backbone}) differs from adapter 0 "
                f"({adapters[0].config} for {adapters[0].backbone}); a stack holds adapters of one config and backbone"
            )
    return Stack(jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters))


def pick(stack: Stack, indices) -> Rows:
    """The adapters of a batch: indices int [batch] into the stack; -1 is the base model.

    Raises ValueError for an index outside -1 .. size - 1, where the indices are concrete.
    """
    if not isinstance(indices, Tracer):
        held = np.asarray(indices)
        if held.ndim != 1 or not np.issubdtype(held.dtype, np.integer):
            raise ValueError(f"pick: indices {indices!r}; expected whole numbers, one a row")
        if held.size and (held.min() < -1 or held.max() >= stack.size):
            raise ValueError(f"pick: indices {held.tolist()}; expected -1 (the base model) to {stack.size - 1}")
    return Rows((stack,), jnp.asarray(indices, jnp.int32)[None])


def by_layer(adapters: Adapter | Rows | Groups | Adjustments) -> tuple[object, Callable]:
    """The adapters' weights with a leading layer axis, and the function that makes one layer's adjustments.

    The function takes (one layer's weights, x [batch, length, width], prompt_length [batch]) and gives an Adjustment
    whose arrays lead with the batch (or that is Shared), in float32. Only the batch's tenants are gathered, a layer at
    a time. Of packed rows it takes prompt_length and start [batch, segments] and gives arrays that lead with (batch,
    segments).
    """
    if isinstance(adapters, Rows):
        stacks = tuple(layers_first(stack.adapters).in_all_layers() for stack in adapters.stacks)

        def make(layers, x, prompt_length, start=None):
            if start is not None:
                raise ValueError(
                    "Rows: an adapter a row is not possible in packed rows; give one adapter for all of them"
                )
            made = [of_rows(*each, x, prompt_length) for each in zip(layers, adapters.index, strict=True)]
            return merged(made)

        return stacks, make
    if isinstance(adapters, Adjustments):
        return list(adapters.layers), lambda made, x, prompt_length: made
    if isinstance(adapters, Groups):
        return adapters.adapters.in_all_layers(), lambda layer, x, length: of_groups(layer, adapters, x, length)
    if adapters.shared:
        return adapters, lambda layer, x, length, start=None: Shared(make_adjustment(layer, x[0], length.ravel()[0]))
    return adapters.in_all_layers(), make_of_one


def make_of_one(layer: Adapter, x: jax.Array, prompt_length: jax.Array, start: jax.Array | None = None) -> Adjustment:
    """One layer's adjustments of a batch whose rows, or whose segments of packed rows, use one adapter."""
    if start is None:
        return jax.vmap(make_adjustment, in_axes=(None, 0, 0))(layer, x, prompt_length)
    of_segments = jax.vmap(make_adjustment, in_axes=(None, None, 0, 0))
    return jax.vmap(of_segments, in_axes=(None, 0, 0, 0))(layer, x, prompt_length, start)


def of_rows(layer: Adapter, index: jax.Array, x: jax.Array, prompt_length: jax.Array) -> Adjustment:
    """One layer's adjustments of a batch from a leading tenant axis; all zeros where the index is -1."""
    made = jax.vmap(make_adjustment)(gather(layer, index), x, prompt_length)
    return jax.tree.map(lambda a: jnp.where((index >= 0).reshape(-1, *[1] * (a.ndim - 1)), a, 0), made)


def gather(adapters: Adapter, index: jax.Array) -> Adapter:
    """The adapters of a batch from a leading tenant axis; anyone's where the index is -1."""
    return jax.tree.map(lambda leaf: leaf[jnp.maximum(index, 0)], adapters)


def merged(adjustments: list[Adjustment]) -> Adjustment:
    """The adjustments of several stacks as one. A row has one that isn't zero, so factors, whoever made them, add up to
    one record: PARA, (IA)^3 and the base model share a decode program."""
    distance: dict[str, Any] = {}
    for factors in (a for a in adjustments if isinstance(a, Factors)):
        for site, value in factors.distance.items():
            distance[site] = distance[site] + value if site in distance else value
    parts = [Factors(distance)] if distance else []
    parts += [a for a in adjustments if not isinstance(a, Factors)]
    return parts[0] if len(parts) == 1 else Several(tuple(parts))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Several(Adjustment):
    """Adjustments of different kinds, of which each row has one that isn't zero."""

    parts: tuple[Adjustment, ...]

    def adjust(
        self, site: str, x: Float[Array, "*rows length in"], y: Float[Array, "*rows length out"]
    ) -> Float[Array, "*rows length out"]:
        for part in self.parts:
            y = part.adjust(site, x, y)
        return y


class Adjustments(NamedTuple):
    """Adjustments that were made already, of whatever prompts; they serve in the place of the adapters that made them,
    one a batch row."""

    layers: tuple
    """a layer: an Adjustment in float32 whose arrays lead with the batch, or that is Shared"""


def check_fits(adapters, model: ModelConfig) -> None:
    """Raises ValueError where adapters were made for a backbone of another shape."""
    if adapters is None or isinstance(adapters, Adjustments):
        return
    if not isinstance(adapters, (Adapter, Rows)):
        raise ValueError(
            f"adapters: {type(adapters).__name__} is not possible; expected None, an adapter or Rows, "
            "made by pick(stack, indices)"
        )
    for adapter in [stack.adapters for stack in adapters.stacks] if isinstance(adapters, Rows) else [adapters]:
        expected = describe(model)
        if adapter.backbone != expected:
            raise ValueError(
                f"adapter for another backbone: it was made for {adapter.backbone}, this one is {expected}"
            )
