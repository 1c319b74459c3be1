"""The interface of adapter methods. An Adapter makes an Adjustment once per prompt, and decode carries the Adjustment.

Both are written for one layer and one example; `jax.vmap` batches them. An adapter for all layers is the same class
with a leading layer axis on every array.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ..config import SITES, ModelConfig
from ..runtime.sharding import is_variable


class Lazy(nnx.Variable):
    """Is not placed when it is made, whatever Flax's setting is. Tunix's models change the setting when they are
    imported, and trees from before and after would not match."""

    def __init__(self, value: Any, **metadata: Any):
        super().__init__(value, **{"eager_sharding": False, **metadata})


class AdapterParam(Lazy, nnx.LoRAParam):
    """A trained adapter weight. Trainers that know Flax's LoRAParam select it by this type."""


class BiasParam(AdapterParam):
    """A trained constant that is added to what a prompt makes. It has no weight decay."""


class Backbone(NamedTuple):
    """The shape of the backbone that an adapter was made for."""

    model_type: str
    num_layers: int
    width: int
    site_widths: tuple[tuple[str, int], ...]


def describe(model: ModelConfig) -> Backbone:
    return Backbone(model.model_type, model.num_layers, model.width, tuple((s, model.site_width(s)) for s in SITES))


Kind = TypeVar("Kind", bound="Adapter")
#: The input and the output of the linear at a site.
SiteInput = Float[Array, "*rows length in"]
SiteOutput = Float[Array, "*rows length out"]


class Adapter(nnx.Module):
    """One layer's weights."""

    config: Any
    backbone: Backbone
    #: Whether rows with the same adapter share one adjustment instead of each carrying a copy. For adjustments that are
    #: matrices and do not depend on the prompt.
    shared = False
    #: The weight that leaves a site unchanged.
    neutral = 0.0

    def __init__(self, config: Any, model: ModelConfig, *, rngs: nnx.Rngs):
        """Fresh weights, which change nothing. Sets `config` and `backbone`."""
        raise NotImplementedError

    @staticmethod
    def layers(config: Any, num_layers: int) -> Sequence[int]:
        """The layers that have weights under this config."""
        return range(num_layers)

    def pool(
        self, x: Float[Array, "length width"], prompt_length: Int[Array, ""], start: Int[Array, ""] | int = 0
    ) -> Float[Array, " width"]:
        """The prompt's summary [width], from the residual stream x [length, width] that enters the layer. The prompt
        begins at `start`."""
        return token_at(x, start + prompt_length - 1)

    def condition(self, summary: Float[Array, " width"]) -> Adjustment:
        """The adjustment of one example, from its summary [width]. Runs once per prompt."""
        raise NotImplementedError

    def started(self: Kind) -> Kind:
        """The fresh adapter, from one in which all layers were made alike. For methods with layers that differ in more
        than their random numbers."""
        return self

    @property
    def unused(self) -> int:
        """How many values of the arrays are zero for ever."""
        return 0

    def normal(self, model: ModelConfig) -> Adapter:
        """An adapter that computes the same, in the form that an AdapterBank can stack: its config may differ from that
        of other adapters in the same stack in sites and rank only."""
        return self

    def in_all_layers(self: Kind) -> Kind:
        """The adapter with weights for every layer of the backbone, where it has them for some only. The layer axis
        comes first, whatever axes follow."""
        return self

    @property
    def reads_prompt(self) -> bool:
        """Whether the adjustment depends on the prompt."""
        return not self.shared


class Adjustment:
    """What one layer of an adapter carries from prefill into decode. All zeros must change nothing: rows of the base
    model carry zeros."""

    def adjust(self, site: str, x: SiteInput, y: SiteOutput) -> SiteOutput:
        """Adjusts y [length, out], the output of the linear at `site` for its input x [length, in]. Runs at every
        token."""
        raise NotImplementedError


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Factors(Adjustment):
    """Elementwise factors l on the outputs of sites, held as their distance from one: y + y * (l - 1)."""

    distance: dict[str, Any]
    """l - 1 [out] by site"""

    def adjust(self, site: str, x: SiteInput, y: SiteOutput) -> SiteOutput:
        return scaled(y, self.distance[site]) if site in self.distance else y


@jax.custom_vjp
def scaled(y: SiteOutput, distance: Float[Array, " out"]) -> SiteOutput:
    """y + y * (l - 1). The distance l - 1 is rounded to y's dtype first, as decode carries it.

    The backward pass sums the gradient of the distance over the tokens in float32. JAX's own would round each product
    and, on some devices, each partial sum to y's dtype. Only y and one distance are kept, not one distance per token.
    """
    return y + y * distance.astype(y.dtype)


def scaled_forwards(y, distance):
    return scaled(y, distance), (y, distance)


def scaled_backwards(kept, gradient):
    y, distance = kept
    products = gradient.astype(jnp.float32) * y.astype(jnp.float32)
    summed = products.sum(axis=tuple(range(y.ndim - 1))).astype(distance.dtype)
    # Sum now: a TPU's compiler would delay the sums to the end of the layer and keep every y and gradient until then.
    gradient, summed = jax.lax.optimization_barrier((gradient, summed))
    return scaled(gradient, distance), summed


scaled.defvjp(scaled_forwards, scaled_backwards)


@jax.custom_jvp
def token_at(x: Float[Array, "length width"], place: Int[Array, ""]) -> Float[Array, " width"]:
    """x[place]. The backward pass is a product with zeros and a one. Under jax.vmap over the segments of a packed row
    it is one product for all of them, where a custom_vjp would make [length, width] for each one and add them up. That
    of plain indexing is a scatter, which a TPU runs as a loop over rows in every layer."""
    return x[place]


@token_at.defjvp
def token_at_jvp(primals, tangents):
    (x, place), (tangent, _) = primals, tangents
    chosen = (jnp.arange(x.shape[0]) == place).astype(x.dtype)
    return x[place], jnp.matmul(chosen, tangent, precision=jax.lax.Precision.HIGHEST)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shared(Adjustment):
    """One adjustment for all rows of a batch: its arrays have no batch axis."""

    adjustment: Adjustment

    def adjust(self, site: str, x: SiteInput, y: SiteOutput) -> SiteOutput:
        return self.adjustment.adjust(site, x, y)


def make_adjustment(layer: Adapter, x: jax.Array, prompt_length: jax.Array, start: jax.Array | int = 0) -> Adjustment:
    """One layer's adjustment of one example, from the residual stream x [length, width] that enters the layer."""
    return layer.condition(layer.pool(x, prompt_length, start))


def init(kind: type[Kind], config, model: ModelConfig, seed: int | Int[Array, ""]) -> Kind:
    """A fresh adapter of a method. The leading axis of its arrays is the layers that have weights."""
    layers = np.array(kind.layers(config, model.num_layers))
    keys = jax.random.split(jax.random.key(seed), model.num_layers)[layers]
    return jax.vmap(lambda key: kind(config, model, rngs=nnx.Rngs(params=key)))(keys).started()


def abstract(kind: type[Kind], config, model: ModelConfig) -> Kind:
    """An adapter with shapes and dtypes in place of arrays."""
    return jax.eval_shape(lambda: init(kind, config, model, 0))


def count_parameters(adapter: Adapter) -> int:
    """The number of trained values."""
    variables = jax.tree.leaves(adapter, is_leaf=is_variable)
    return sum(math.prod(v.shape) for v in variables if isinstance(v, AdapterParam)) - adapter.unused


def named_leaves(adapter: Adapter) -> dict[str, Any]:
    """The adapter's arrays by name, such as "up.q_proj"."""
    paths = jax.tree_util.tree_flatten_with_path(adapter)[0]
    return {".".join(key.name for key in path[:-1]): leaf for path, leaf in paths}


def with_leaves(adapter: Kind, leaves: dict[str, Any]) -> Kind:
    """The adapter, which may be abstract, with its arrays replaced by these, given by name."""
    return jax.tree.unflatten(jax.tree.structure(adapter), [leaves[name] for name in named_leaves(adapter)])
