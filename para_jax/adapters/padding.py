"""Adapters of different ranks and sites in one shape, so that an AdapterBank can stack them.

A group is the config that all its adapters are padded to: the bank's rank and sites, and what is left of their own
config. Zeros fill up a matrix; the method's neutral weight fills a site that an adapter lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..config import ModelConfig
from ..sharding import is_variable
from .adapter import Adapter, AdapterParam, abstract, named_leaves, with_leaves
from .methods import method_of


def group_template(group: Any, model: ModelConfig, dtype: str) -> Adapter:
    """An abstract adapter of a group. Its matrices have this dtype; its vectors stay float32."""

    def in_dtype(variable):
        matrix = isinstance(variable, AdapterParam) and len(variable.shape) == 3  # [layers, in, out]
        return variable.replace(jax.ShapeDtypeStruct(variable.shape, dtype)) if matrix else variable

    return jax.tree.map(in_dtype, abstract(method_of(group).adapter, group, model), is_leaf=is_variable)


def padded_leaves(adapter: Adapter, template: Adapter) -> dict[str, np.ndarray]:
    """The adapter's arrays, by name, in the template's shapes and dtypes."""
    leaves = host_leaves(adapter)
    return {name: padded(leaves.get(name), shape, adapter.neutral) for name, shape in named_leaves(template).items()}


def padded(leaf: np.ndarray | None, shape: jax.ShapeDtypeStruct, neutral: float) -> np.ndarray:
    if leaf is None:
        return np.full(shape.shape, neutral, shape.dtype)
    out = np.zeros(shape.shape, shape.dtype)
    out[tuple(map(slice, leaf.shape))] = leaf
    return out


def stacked(template: Adapter, weights: Sequence[dict[str, np.ndarray]], places: int) -> Adapter:
    """Adapters, [places, layers, ...] each: these in the first places, zeros in the others. On the host if there are as
    many as places. Else the zeros are made on the device, and each adapter is sent once.
    """
    shapes = named_leaves(template)
    if len(weights) == places:
        return with_leaves(template, {name: np.stack([w[name] for w in weights]) for name in shapes})
    stacks = {name: jnp.zeros((places, *shape.shape), shape.dtype) for name, shape in shapes.items()}
    for i, of_one in enumerate(weights):
        stacks = put_in_place(stacks, {name: of_one[name] for name in shapes}, i)
    return with_leaves(template, stacks)


@partial(jax.jit, donate_argnums=0)
def put_in_place(stacks: dict[str, jax.Array], weights: dict[str, jax.Array], place) -> dict[str, jax.Array]:
    """The stacks with one adapter's weights in a place. The given stacks are donated."""
    return {name: jax.lax.dynamic_update_index_in_dim(stacks[name], weights[name], place, 0) for name in stacks}


def host_leaves(adapter: Adapter) -> dict[str, np.ndarray]:
    return {name: np.asarray(leaf, np.float32) for name, leaf in named_leaves(adapter).items()}
