"""Adapters of many tenants: a Stack of them, and Rows, which gives every row of a batch its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from ..config import ModelConfig
from .adapter import Adapter, Adjustment, describe


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
    """One adapter a batch row: row b uses adapter index[b] of the stack, and the backbone alone where index[b] is
    -1."""

    stack: Stack
    index: jax.Array
    """int32 [batch]"""


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
    return Rows(stack, jnp.asarray(indices, jnp.int32))


def by_layer(adapters: Adapter | Rows) -> tuple[object, Callable]:
    """The adapters' weights with a leading layer axis, and the function that makes one layer's adjustments.

    The function takes (one layer's weights, x [batch, length, width], prompt_length [batch]) and gives an Adjustment
    whose arrays lead with the batch, in float32. Only the batch's tenants are gathered, a layer at a time.
    """
    if isinstance(adapters, Rows):
        weights = jax.tree.map(lambda leaf: jnp.moveaxis(leaf, 1, 0), adapters.stack.adapters)
        return weights, lambda layer, x, length: jax.vmap(make_adjustment)(gather(layer, adapters.index), x, length)
    return adapters, jax.vmap(make_adjustment, in_axes=(None, 0, 0))


def make_adjustment(layer: Adapter, x: jax.Array, prompt_length: jax.Array) -> Adjustment:
    """One layer's adjustment of one example, from the residual stream x [length, width] that enters the layer."""
    return layer.condition(layer.pool(x, prompt_length))


def gather(adapters: Adapter, index: jax.Array) -> Adapter:
    """The adapters of a batch from a leading tenant axis; all zeros, which is the backbone, where the index is -1."""

    def rows(leaf: jax.Array) -> jax.Array:
        present = (index >= 0).reshape(-1, *[1] * (leaf.ndim - 1))
        return jnp.where(present, leaf[jnp.maximum(index, 0)], 0)

    return jax.tree.map(rows, adapters)


def check_fits(adapters, model: ModelConfig) -> None:
    """Raises ValueError where adapters were made for a backbone of another shape."""
    if adapters is None:
        return
    if not isinstance(adapters, (Adapter, Rows)):
        raise ValueError(
            f"adapters: {type(adapters).__name__} is not possible; expected None, an adapter or Rows, "
            "made by pick(stack, indices)"
        )
    adapter = adapters.stack.adapters if isinstance(adapters, Rows) else adapters
    expected = describe(model, adapter.config.target_modules)
    if adapter.backbone != expected:
        raise ValueError(f"adapter for another backbone: it was made for {adapter.backbone}, this one is {expected}")
