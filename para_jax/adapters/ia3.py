"""(IA)^3 (arXiv:2205.05638): learned vectors that scale outputs of linears, and the input of down_proj."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ..config import Ia3Config, ModelConfig
from .adapter import Adapter, AdapterParam, Backbone, Factors, abstract, describe, named_leaves, with_leaves
from .formats.own import ValueCounts, join_layers, layer_name
from .formats.peft import (
    linears_of,
    names_of,
    peft_tensors,
    require_supported,
    sites_of,
    trained_sites,
    used_sites,
)
from .method import Method


class Ia3(Adapter):
    """One layer's vectors l, which start at one: l k, l v and l (activation(gate) up) (section 3.3, equation 1).

    A factor on down_proj's input is applied to up_proj's output, because activation(g) (l u) = l (activation(g) u) [D].
    """

    neutral = 1.0

    def __init__(self, config: Ia3Config, model: ModelConfig, *, rngs: nnx.Rngs):
        inputs = config.feedforward_modules

        def ones(site: str) -> AdapterParam:
            width = model.site_input_width(site) if site in inputs else model.site_width(site)
            axis = model.site_input_axis(site) if site in inputs else model.site_axis(site)
            return AdapterParam(jnp.ones(width, jnp.float32), axes=(axis,))

        self.scale = nnx.Dict({site: ones(site) for site in config.target_modules})
        self.config = config
        self.backbone = describe(model)

    @property
    def reads_prompt(self) -> bool:
        return False

    def condition(self, summary: Float[Array, " width"]) -> Factors:
        """The vectors as their distance from one. The prompt is not read."""
        return Factors({site: factors - 1 for site, factors in self.on_outputs().items()})

    def normal(self, model: ModelConfig) -> Ia3:
        """The same adapter with all factors on outputs."""
        return from_factors(self.on_outputs(), model, self.config)

    def on_outputs(self) -> dict[str, Array]:
        """l [..., out] by site, all on outputs."""
        factors = {site: scale[...] for site, scale in self.scale.items()}
        for site in self.config.feedforward_modules:
            factors["up_proj"] = factors.pop(site) * factors.get("up_proj", 1.0)
        return factors


def from_factors(factors: dict[str, Array], model: ModelConfig, like: Ia3Config | None = None) -> Ia3:
    """The adapter that scales the outputs of sites by these l, {site: [layers, out]}, with the scope of `like`."""
    config = replace(like or Ia3Config(), target_modules=tuple(factors), feedforward_modules=())
    leaves = {f"scale.{site}": factor for site, factor in factors.items()}
    return with_leaves(abstract(Ia3, config, model), leaves)


# ----------------------------------------------------------------------------------------------------------- the folder


def ia3_peft_config(config: Ia3Config, backbone: Backbone) -> dict:
    inputs = names_of(backbone.model_type, config.feedforward_modules)
    return {"feedforward_modules": inputs, "init_ia3_weights": True}


def read_ia3_config(found: dict, shapes: dict[str, tuple[int, ...]]) -> Ia3Config:
    require_supported(found, ())
    inputs = sites_of({linear for name, linear, _ in peft_tensors(shapes) if shapes[name][:1] == (1,)})
    return Ia3Config(target_modules=trained_sites(shapes), feedforward_modules=inputs)


def ia3_outline(config: Ia3Config) -> str:
    return f"Vectors on {', '.join(config.target_modules)}" + (
        "; down_proj's input is scaled" if config.feedforward_modules else ""
    )


# --------------------------------------------------------------------------------------------------------- the tensors


def ia3_tensors(adapter: Adapter) -> dict[str, Array]:
    linears = linears_of(adapter.backbone.model_type, adapter.config.target_modules)
    stacks = {name: vector_of_linear(adapter, parts) for name, parts in linears.items()}
    layers = range(adapter.backbone.num_layers)
    return {layer_name(i, f"{name}.ia3_l"): stack[i] for i in layers for name, stack in stacks.items()}


def vector_of_linear(adapter: Adapter, parts: tuple[str, ...]) -> Array | np.ndarray:
    """The vectors of one linear, [layers, out, 1], or [layers, 1, in] if they scale its input."""
    leaves, widths = named_leaves(adapter), dict(adapter.backbone.site_widths)
    if parts[0] in adapter.config.feedforward_modules:
        return leaves[f"scale.{parts[0]}"][:, None]
    ones = {site: jnp.ones((adapter.backbone.num_layers, widths[site])) for site in parts}
    return jnp.concatenate([leaves.get(f"scale.{site}", ones[site]) for site in parts], axis=1)[:, :, None]


def ia3_leaves(
    config: Ia3Config, model: ModelConfig, tensors: dict[str, np.ndarray]
) -> tuple[Ia3Config, dict[str, np.ndarray]]:
    """The adapter's config and arrays, without sites that share a linear and change nothing."""
    stacked = join_layers(tensors)
    linears = linears_of(model.model_type, config.target_modules)
    found: dict[str, Any] = {}
    for name, parts in linears.items():
        vectors = stacked[f"{name}.ia3_l"].reshape(model.num_layers, -1)
        cuts = np.cumsum([model.site_width(site) for site in parts])[:-1]
        found |= dict(zip(parts, np.split(vectors, cuts, axis=1), strict=True))
    # A joint linear has a vector for all its sites. Those of ones are dropped.
    kept = used_sites(linears, {site for site, vectors in found.items() if (vectors == 1).all()})
    return replace(config, target_modules=kept), {f"scale.{site}": found[site] for site in kept}


def ia3_values(config: Ia3Config, backbone: dict, read_shapes: Callable[[], dict[str, tuple[int, ...]]]) -> ValueCounts:
    shapes = read_shapes()
    held = sum(map(math.prod, shapes.values()))
    joined = 0
    if "up_proj" in config.target_modules:  # a factor on an input becomes one vector with that of up_proj
        inputs = {name for name in shapes if set(config.feedforward_modules) & set(name.split("."))}
        joined = sum(math.prod(shapes[name]) for name in inputs)
    return ValueCounts(matrices=0, vectors=held, carried=held - joined, joined=joined)


IA3 = Method(
    name="ia3",
    label="(IA)^3",
    peft_type="IA3",
    config=Ia3Config,
    adapter=Ia3,
    group_config=lambda config, sites, max_r: replace(config, target_modules=sites, feedforward_modules=()),
    outline=ia3_outline,
    to_tensors=ia3_tensors,
    from_tensors=ia3_leaves,
    count_values=ia3_values,
    to_peft_config=ia3_peft_config,
    from_peft_config=read_ia3_config,
)
