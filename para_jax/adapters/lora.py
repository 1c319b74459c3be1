"""LoRA (Low-Rank Adaptation, arXiv:2106.09685): y + scale * (x A) B at each site.

The matrices are the adjustment. In a batch of several adapters, each row carries its matrices into decode and pays two
small matrix products per site at every token. PARA avoids this cost.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from ..config import LoraConfig, ModelConfig
from .adapter import Adapter, AdapterParam, Adjustment, SiteInput, SiteOutput, describe, named_leaves, with_leaves
from .lora_format import (
    lora_leaves,
    lora_outline,
    lora_peft_config,
    lora_shapes,
    lora_tensors,
    lora_values,
    read_lora_config,
)
from .method import Method


class Lora(Adapter):
    """One layer's matrices: A [in, r], drawn from the uniform distribution that PEFT uses, and B [r, out] of zeros."""

    shared = True

    def __init__(self, config: LoraConfig, model: ModelConfig, *, rngs: nnx.Rngs):
        def a(site: str) -> AdapterParam:
            bound = model.site_input_width(site) ** -0.5
            shape = (model.site_input_width(site), config.r)
            drawn = jax.random.uniform(rngs.params(), shape, jnp.float32, -bound, bound)
            return AdapterParam(drawn, axes=(model.site_input_axis(site), "rank"))

        def b(site: str) -> AdapterParam:
            zeros = jnp.zeros((config.r, model.site_width(site)), jnp.float32)
            return AdapterParam(zeros, axes=("rank", model.site_axis(site)))

        self.a = nnx.Dict({site: a(site) for site in config.target_modules})
        self.b = nnx.Dict({site: b(site) for site in config.target_modules})
        self.config = config
        self.backbone = describe(model)

    def condition(self, summary: Float[Array, " width"]) -> LowRank:
        """The matrices, with the scale (lora_alpha / r, section 4.1) in B. The prompt is not read."""
        scaled = {site: b[...] * self.config.scale for site, b in self.b.items()}
        return LowRank({site: a[...] for site, a in self.a.items()}, scaled)

    def normal(self, model: ModelConfig) -> Lora:
        """The same adapter with the scale in B, so that the scale is 1 at any rank. Which tokens a prompt must end with
        makes no difference to what is computed."""
        leaves = named_leaves(self)
        leaves |= {name: leaf * self.config.scale for name, leaf in leaves.items() if name.startswith("b.")}
        made = with_leaves(self, leaves)
        made.config = replace(self.config, lora_alpha=self.config.r, use_rslora=False, alora_invocation_tokens=None)
        return made


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class LowRank(Adjustment):
    """Adds (x a) b to the outputs of sites."""

    a: dict[str, Any]
    """[in, r] by site"""
    b: dict[str, Any]
    """[r, out] by site"""

    def adjust(self, site: str, x: SiteInput, y: SiteOutput) -> SiteOutput:
        if site not in self.a:
            return y
        return y + (x @ self.a[site].astype(x.dtype)) @ self.b[site].astype(x.dtype)


LORA = Method(
    name="lora",
    label="LoRA",
    peft_type="LORA",
    config=LoraConfig,
    adapter=Lora,
    carries="matrices",
    rank=lambda config: config.r,
    group_config=lambda config, sites, max_r: replace(config, target_modules=sites, r=max_r, lora_alpha=float(max_r)),
    outline=lora_outline,
    to_tensors=lora_tensors,
    from_tensors=lora_leaves,
    tensor_shapes=lora_shapes,
    count_values=lora_values,
    to_peft_config=lora_peft_config,
    from_peft_config=read_lora_config,
    fits_peft=lambda config: config.scope == "all" or config.alora_invocation_tokens is not None,
)
