"""LoRA (Low-Rank Adaptation, arXiv:2106.09685): y + scale * (x A) B at each site.

The matrices are the adjustment. In a batch of several adapters, each row carries its matrices into decode and pays two
small matrix products per site at every token. PARA avoids this cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from ..config import FUSED, SITES, LoraConfig, ModelConfig
from .adapter import (
    Adapter,
    AdapterParam,
    Adjustment,
    Backbone,
    SiteInput,
    SiteOutput,
    describe,
    named_leaves,
    with_leaves,
)
from .formats.own import ValueCounts, join_layers, layer_name
from .formats.peft import linears_of, require_supported, trained_sites, used_sites
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


# ----------------------------------------------------------------------------------------------------------- the folder


def lora_peft_config(config: LoraConfig, backbone: Backbone) -> dict:
    linears = linears_of(backbone.model_type, config.target_modules)
    at_rank = with_rank(config, config.r * blocks_of(linears))
    alpha = at_rank.lora_alpha
    return {
        "r": at_rank.r,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "use_rslora": config.use_rslora,
        "lora_dropout": 0.0,
        "bias": "none",
        "init_lora_weights": True,
        **({"alora_invocation_tokens": list(tokens)} if (tokens := config.alora_invocation_tokens) else {}),
    }


def read_lora_config(found: dict, shapes: dict[str, tuple[int, ...]]) -> LoraConfig:
    require_supported(found, ("r", "lora_alpha", "use_rslora", "alora_invocation_tokens"))
    values: dict[str, Any] = {"r": found.get("r"), "lora_alpha": found.get("lora_alpha")}
    values |= {"use_rslora": found.get("use_rslora", False), "target_modules": trained_sites(shapes)}
    config = LoraConfig(**values, **activated_scope(found))
    return replace(config, lora_alpha=float(config.lora_alpha))


def activated_scope(found: dict) -> dict[str, Any]:
    """The fields of PEFT's activated LoRA; none for plain LoRA. PEFT's versions disagree about an empty list."""
    tokens = found.get("alora_invocation_tokens")
    if tokens is None:
        return {}
    window = len(tokens) if isinstance(tokens, list) and tokens else 1
    return {"scope": "response", "scope_window": window, "alora_invocation_tokens": tokens}


def with_rank(config: LoraConfig, r: int) -> LoraConfig:
    """The config at another rank, with the same scale."""
    if r == config.r:
        return config
    return replace(config, r=r, lora_alpha=config.scale * (r**0.5 if config.use_rslora else r))


def lora_outline(config: LoraConfig) -> str:
    return f"Rank {config.r} on {', '.join(config.target_modules)}; scale {config.scale:.6g}"


# --------------------------------------------------------------------------------------------------------- the tensors


def lora_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    """The tensors by name, in PyTorch's orientation."""
    widths, leaves = dict(adapter.backbone.site_widths), named_leaves(adapter)
    linears = linears_of(adapter.backbone.model_type, adapter.config.target_modules)
    rank = adapter.config.r * blocks_of(linears)
    tensors = {}
    for name, parts in linears.items():
        a, b = matrices_of_linear(leaves, parts, widths, rank)
        for i in range(adapter.backbone.num_layers):
            tensors[layer_name(i, f"{name}.lora_A.weight")] = a[i]
            tensors[layer_name(i, f"{name}.lora_B.weight")] = b[i]
    return tensors


def matrices_of_linear(
    leaves: dict[str, Any], parts: tuple[str, ...], widths: dict[str, int], rank: int
) -> tuple[np.ndarray, np.ndarray]:
    """A [layers, rank, in] and B [layers, out, rank] of one linear.

    Each of its sites has its own rows of A and its own block of B. B is zero outside the blocks, and so is the rest of
    the rank.
    """
    held = [site for site in parts if f"a.{site}" in leaves]
    layers, width, r = leaves[f"a.{held[0]}"].shape
    a = np.zeros((layers, rank, width), np.float32)
    b = np.zeros((layers, sum(widths[site] for site in parts), rank), np.float32)
    for site, rows, columns in blocks(parts, widths, r):
        if site in held:
            a[:, columns] = np.swapaxes(np.asarray(leaves[f"a.{site}"]), 1, 2)
            b[:, rows, columns] = np.swapaxes(np.asarray(leaves[f"b.{site}"]), 1, 2)
    return a, b


def lora_shapes(config: LoraConfig, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes = {}
    linears = linears_of(model.model_type, config.target_modules)
    for i in range(model.num_layers):
        for name, parts in linears.items():
            width_out = sum(map(model.site_width, parts))
            shapes[layer_name(i, f"{name}.lora_A.weight")] = (config.r, model.site_input_width(parts[0]))
            shapes[layer_name(i, f"{name}.lora_B.weight")] = (width_out, config.r)
    return shapes


def lora_leaves(
    config: LoraConfig, model: ModelConfig, tensors: dict[str, np.ndarray]
) -> tuple[LoraConfig, dict[str, np.ndarray]]:
    """The adapter's config and arrays.

    Sites that share a linear share its A, with one exception: if all linears have the form that `matrices_of_linear`
    gives them, each site takes its own block back, and the rank is the smaller one again.
    """
    stacked = join_layers(tensors)
    linears = linears_of(model.model_type, config.target_modules)
    widths = {site: model.site_width(site) for site in SITES}
    pairs = {name: (stacked[f"{name}.lora_A.weight"], stacked[f"{name}.lora_B.weight"]) for name in linears}
    r = config.r // blocks_of(linears)
    in_blocks = config.r % blocks_of(linears) == 0 and all(
        only_blocks(*pairs[name], blocks(parts, widths, r)) for name, parts in linears.items()
    )
    if in_blocks and r < config.r:
        config = with_rank(config, r)
        config = replace(config, lora_alpha=float(f"{config.lora_alpha:.14g}"))  # the value before it was saved
    found = {}
    for name, parts in linears.items():
        a, b = pairs[name]
        for site, rows, columns in blocks(parts, widths, r):
            columns = columns if in_blocks else slice(None)
            found[site] = a[:, columns].swapaxes(1, 2), b[:, rows, columns].swapaxes(1, 2)
    unused = {site for site, pair in found.items() if not any(matrix.any() for matrix in pair)}
    # PEFT trains a joint linear as a whole. Sites of it that change nothing are dropped.
    kept = used_sites(linears, unused)
    leaves = {f"a.{site}": found[site][0] for site in kept} | {f"b.{site}": found[site][1] for site in kept}
    return replace(config, target_modules=kept), leaves


def only_blocks(a: np.ndarray, b: np.ndarray, cut: list[tuple[str, slice, slice]]) -> bool:
    """Whether B is zero outside these blocks, and A in the rows that belong to none."""
    outside = b.copy()
    for _, rows, columns in cut:
        outside[:, rows, columns] = 0
    return not outside.any() and not a[:, cut[-1][2].stop :].any()


def blocks(parts: tuple[str, ...], widths: dict[str, int], r: int) -> list[tuple[str, slice, slice]]:
    """The block of each site in the B of its linear: (site, rows, columns), with r columns per site."""
    ends = np.cumsum([0, *(widths[site] for site in parts)]).tolist()
    return [(site, slice(ends[j], ends[j + 1]), slice(j * r, (j + 1) * r)) for j, site in enumerate(parts)]


def blocks_of(linears: dict[str, tuple[str, ...]]) -> int:
    """The largest number of sites in one linear. The rank in the file, one for all linears, is this times a site's."""
    return max(map(len, linears.values()))


def lora_values(
    config: LoraConfig, backbone: dict, read_shapes: Callable[[], dict[str, tuple[int, ...]]]
) -> ValueCounts:
    """An upper bound where sites share a linear: each counts with an A of the file's rank, but may load with less."""
    held = 0
    for name, shape in read_shapes().items():
        shared_by = max((len(sites) for linear, sites in FUSED.items() if linear in name.split(".")), default=1)
        held += math.prod(shape) * (shared_by if name.endswith("lora_A.weight") else 1)
    return ValueCounts(matrices=held, vectors=0, carried=held)


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
