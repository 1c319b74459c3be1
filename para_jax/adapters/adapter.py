"""The interface of adapter methods. An Adapter makes an Adjustment once a prompt; the Adjustment is what decode
carries.

Both are written for one layer and one example; `jax.vmap` batches them. A whole adapter, for all layers, is the same
class with a leading layer axis on every array.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ..config import SITES, ModelConfig, require


class AdapterParam(nnx.LoRAParam):
    """A trained adapter weight: the type by which trainers that know Flax's LoRAParam select what they train."""


class Statistic(nnx.Variable):
    """A number measured once and stored with the adapter, never trained."""


class Backbone(NamedTuple):
    """What an adapter must know of the backbone it belongs to."""

    model_type: str
    num_layers: int
    width: int
    site_widths: tuple[tuple[str, int], ...]


def describe(model: ModelConfig) -> Backbone:
    return Backbone(model.model_type, model.num_layers, model.width, tuple((s, model.site_width(s)) for s in SITES))


Kind = TypeVar("Kind", bound="Adapter")


class Adapter(nnx.Module):
    """One layer's weights."""

    config: Any
    backbone: Backbone
    #: Whether rows that all use one adapter share its adjustment as it is, instead of each carrying a copy. For
    #: adjustments that are matrices; only where the prompt is not read.
    shared = False
    #: The weight of a site that changes nothing.
    neutral = 0.0

    def pool(
        self, x: Float[Array, "length width"], prompt_length: Int[Array, ""], start: Int[Array, ""] | int = 0
    ) -> Float[Array, " width"]:
        """The summary [width] of the prompt that begins at `start`, from the residual stream x [length, width] that
        enters the layer."""
        return token_at(x, start + prompt_length - 1)

    def condition(self, summary: Float[Array, " width"]) -> Adjustment:
        """The adjustment of one example, from its summary [width]; runs once a prompt."""
        raise NotImplementedError

    def normal(self, model: ModelConfig) -> Adapter:
        """An adapter of the same function whose config differs from others of its kind in sites and rank alone, so that
        they stack once these are padded with `neutral`."""
        return self

    def in_all_layers(self: Kind) -> Kind:
        """The weights of every layer of the backbone, from a whole adapter's that may have only some. They lead with
        the layers, whatever axes follow."""
        return self


class Adjustment:
    """What an adapter carries from prefill into decode, for one layer. All zeros change nothing: so do rows of the base
    model."""

    def adjust(
        self, site: str, x: Float[Array, "*rows length in"], y: Float[Array, "*rows length out"]
    ) -> Float[Array, "*rows length out"]:
        """y [length, out] of the linear at `site`, adjusted; x [length, in] is the linear's input. Runs at every
        token."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors(Adjustment):
    """Elementwise factors l on sites' outputs, held as their distance from one: y + y * (l - 1)."""

    distance: dict[str, Any]
    """l - 1 of each site, [out]"""

    def adjust(
        self, site: str, x: Float[Array, "*rows length in"], y: Float[Array, "*rows length out"]
    ) -> Float[Array, "*rows length out"]:
        return scaled(y, self.distance[site]) if site in self.distance else y


@jax.custom_vjp
def scaled(y: Float[Array, "*rows length out"], distance: Float[Array, " out"]) -> Float[Array, "*rows length out"]:
    """y + y * (l - 1). The distance l - 1 is rounded to y's dtype first, because decode carries it so.

    The backward pass sums the distance's gradient over the tokens in float32. What JAX derives would round each product
    and, on some devices, each partial sum to y's dtype. It keeps y and one distance, not one for each token.
    """
    return y + y * distance.astype(y.dtype)


def scaled_forwards(y, distance):
    return scaled(y, distance), (y, distance)


def scaled_backwards(kept, gradient):
    y, distance = kept
    products = gradient.astype(jnp.float32) * y.astype(jnp.float32)
    summed = products.sum(axis=tuple(range(y.ndim - 1))).astype(distance.dtype)
    # Sums first: a TPU's compiler would put them off to the layer's end, and keep each site's y and gradient till then.
    gradient, summed = jax.lax.optimization_barrier((gradient, summed))
    return scaled(gradient, distance), summed


scaled.defvjp(scaled_forwards, scaled_backwards)


@jax.custom_vjp
def token_at(x: Float[Array, "length width"], place: Int[Array, ""]) -> Float[Array, " width"]:
    """x[place]. Its backward pass selects: indexing has a scatter there, on a TPU a loop over rows in each layer."""
    return x[place]


def token_at_forwards(x, place):
    return token_at(x, place), (place, jnp.arange(x.shape[0]))


def token_at_backwards(kept, gradient):
    place, places = kept
    return jnp.where((places == place)[:, None], gradient, jnp.zeros((), gradient.dtype)), None


token_at.defvjp(token_at_forwards, token_at_backwards)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shared(Adjustment):
    """One adjustment for all rows of a batch: its arrays do not lead with the batch."""

    adjustment: Adjustment

    def adjust(
        self, site: str, x: Float[Array, "*rows length in"], y: Float[Array, "*rows length out"]
    ) -> Float[Array, "*rows length out"]:
        return self.adjustment.adjust(site, x, y)


def make_adjustment(layer: Adapter, x: jax.Array, prompt_length: jax.Array, start: jax.Array | int = 0) -> Adjustment:
    """One layer's adjustment of one example, from the residual stream x [length, width] that enters the layer."""
    return layer.condition(layer.pool(x, prompt_length, start))


def init(kind: Callable[..., Adapter], config, model: ModelConfig, seed: int) -> Adapter:
    """A fresh adapter of a method, with a leading axis on its arrays: the layers that it has."""
    keys = jax.random.split(jax.random.key(seed), model.num_layers)[np.array(layers_of(config, model.num_layers))]
    return jax.vmap(lambda key: kind(config, model, rngs=nnx.Rngs(params=key)))(keys)


def layers_of(config, num_layers: int) -> Sequence[int]:
    """The layers of the backbone in which an adapter of this config has weights. Raises ValueError for one that the
    backbone does not have."""
    chosen = getattr(config, "layers_to_transform", None)
    if chosen is None:
        return range(num_layers)
    expected = f"layers of the backbone, 0 to {num_layers - 1}"
    require(chosen[-1] < num_layers, "layers_to_transform", chosen, expected)
    return chosen


def count_parameters(adapter: Adapter) -> int:
    """The number of trained values."""
    variables = jax.tree.leaves(adapter, is_leaf=is_variable)
    return sum(math.prod(v.shape) for v in variables if isinstance(v, AdapterParam))


def named_leaves(adapter: Adapter) -> dict[str, Any]:
    """The arrays of an adapter by name, such as "up.q_proj"."""
    paths = jax.tree_util.tree_flatten_with_path(adapter)[0]
    return {".".join(key.name for key in path[:-1]): leaf for path, leaf in paths}


def with_leaves(adapter: Kind, leaves: dict[str, Any]) -> Kind:
    """The adapter (it may be abstract) with these arrays, by name, in the place of its own."""
    return jax.tree.unflatten(jax.tree.structure(adapter), [leaves[name] for name in named_leaves(adapter)])


def is_variable(node) -> bool:
    return isinstance(node, nnx.Variable)
