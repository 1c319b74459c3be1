"""LoRA (Low-Rank Adaptation, arXiv:2106.09685): y + scale * (x A) B at each site.

Its matrices are its adjustment. Rows with adapters of their own carry them into decode and pay two small matrix
products a site and row at every token, which is what PARA avoids.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..config import LoraConfig, ModelConfig
from .adapter import Adapter, AdapterParam, Adjustment, describe, named_leaves, with_leaves


class Lora(Adapter):
    """One layer's matrices: A [in, r] from the uniform distribution that PEFT uses, B [r, out] from zero."""

    shared = True

    def __init__(self, config: LoraConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        def a(site: str) -> AdapterParam:
            bound = model.site_input_width(site) ** -0.5
            shape = (model.site_input_width(site), config.r)
            drawn = jax.random.uniform(rngs.params(), shape, minval=-bound, maxval=bound)
            return AdapterParam(drawn, axes=(model.site_input_axis(site), "rank"))

        def b(site: str) -> AdapterParam:
            return AdapterParam(jnp.zeros((config.r, model.site_width(site))), axes=("rank", model.site_axis(site)))

        self.a = nnx.Dict({site: a(site) for site in config.target_modules})
        self.b = nnx.Dict({site: b(site) for site in config.target_modules})
        self.config = config
        self.backbone = describe(model)

    def condition(self, summary: Float[Array, " width"]) -> LowRank:
        """The matrices, the scale (lora_alpha / r, section 4.1) in B; the prompt is not read."""
        scaled = {site: b[...] * self.config.scale for site, b in self.b.items()}
        return LowRank({site: a[...] for site, a in self.a.items()}, scaled)

    def normal(self, model: ModelConfig) -> Lora:
        """With the scale in B, so that it is 1 at any rank."""
        leaves = named_leaves(self)
        leaves |= {name: leaf * self.config.scale for name, leaf in leaves.items() if name.startswith("b.")}
        made = with_leaves(self, leaves)
        made.config = replace(self.config, lora_alpha=self.config.r, use_rslora=False)
        return made


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank(Adjustment):
    """A change of sites' outputs that is linear in their inputs: y + (x a) b."""

    a: dict[str, Any]
    """[in, r] of each site"""
    b: dict[str, Any]
    """[r, out] of each site"""

    def adjust(
        self, site: str, x: Float[Array, "*rows length in"], y: Float[Array, "*rows length out"]
    ) -> Float[Array, "*rows length out"]:
        if site not in self.a:
            return y
        return y + (x @ self.a[site].astype(x.dtype)) @ self.b[site].astype(x.dtype)
