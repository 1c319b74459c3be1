"""Backbones and adapters of the golden fixtures, and adapters strong enough that a law can fail."""

import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from para_jax import ParaConfig, Transformer, init_adapter, load_backbone
from para_jax.backbone.families import model_config

FIXTURES = Path(__file__).parents[1] / "fixtures"
FAMILIES = tuple(
    "llama llama3 mistral ministral ministral3 qwen2 qwen3 gemma gemma2 gemma3_text phi3 "
    "smollm2 smollm3 olmo2 olmo3 granite granitemoehybrid".split()
)


@cache
def backbone(family: str, layout: str = "layers", config: str | None = None):
    """A golden backbone; with `config`, its weights under variants/<config>.json."""
    model = load_backbone(FIXTURES / family, layout="layers")
    if config is not None:
        variant = model_config(json.loads((FIXTURES / family / "variants" / f"{config}.json").read_text()))
        shape = jax.eval_shape(lambda: Transformer(variant, rngs=nnx.Rngs(0)))
        model = jax.tree.unflatten(jax.tree.structure(shape), jax.tree.leaves(model))
    return model.with_layout(layout)


@cache
def golden(family: str, kind: str = "") -> dict:
    """The golden arrays of a family; kind "para": with two PARA tenants."""
    file = FIXTURES / "para" / family / "para_golden.npz" if kind == "para" else FIXTURES / family / "golden.npz"
    with np.load(file) as arrays:
        return dict(arrays)


@cache
def golden_tenants(family: str, activation: str = "gelu") -> list:
    """The two PARA adapters of the golden fixtures."""
    adapters = []
    for tenant in range(2):
        arrays = load_file(FIXTURES / "para" / family / f"para_t{tenant}.safetensors")
        config = backbone(family).config
        adapter = init_adapter(ParaConfig(r=4, activation=activation), config)
        up = np.stack([arrays[f"layers.{i}.up"] for i in range(config.num_layers)])
        cuts = np.cumsum([config.site_width(site) for site in adapter.config.target_modules])[:-1]
        adapter.down[...] = jnp.stack([arrays[f"layers.{i}.down"] for i in range(config.num_layers)])
        for site, part in zip(adapter.config.target_modules, np.split(up, cuts, axis=2), strict=True):
            adapter.up[site][...] = jnp.asarray(part)
        adapters.append(adapter)
    return adapters


def strong(adapter, seed: int = 0, scale: float = 0.1):
    """The adapter with what a fresh one has at zero (at one in (IA)^3) drawn from N(0, scale) around it: with a fresh
    one every law would hold without adapters."""
    made = jax.tree.map(lambda leaf: leaf, adapter)
    weights = next(getattr(made, name) for name in ("up", "b", "scale") if hasattr(made, name))
    for i, site in enumerate(made.config.target_modules):
        drawn = np.random.default_rng([seed, i]).normal(0, scale, weights[site].shape)
        weights[site][...] = jnp.asarray(made.neutral + drawn, jnp.float32)
    for i, bias in enumerate(vars(made).get("up_bias", {}).values()):
        bias[...] = jnp.asarray(np.random.default_rng([seed, i, 1]).normal(0, scale, bias.shape), jnp.float32)
    return made


def prompts(model, batch: int = 3, length: int = 12, seed: int = 0) -> np.ndarray:
    """Random tokens int32 [batch, length]."""
    return np.random.default_rng(seed).integers(3, model.config.vocab_size, (batch, length)).astype(np.int32)
