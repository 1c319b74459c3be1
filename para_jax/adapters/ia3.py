"""(IA)^3 (arXiv:2205.05638): learned vectors that scale outputs of linears, and the input of down_proj."""

from __future__ import annotations

from dataclasses import replace

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..config import Ia3Config, ModelConfig
from .adapter import Adapter, AdapterParam, Factors, abstract, describe, with_leaves
from .ia3_format import (
    ia3_leaves,
    ia3_outline,
    ia3_peft_config,
    ia3_shapes,
    ia3_tensors,
    ia3_values,
    read_ia3_config,
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
    tensor_shapes=ia3_shapes,
    count_values=ia3_values,
    to_peft_config=ia3_peft_config,
    from_peft_config=read_ia3_config,
)
