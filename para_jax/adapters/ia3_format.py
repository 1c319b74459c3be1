"""(IA)^3's config and tensors in an adapter folder, in the format of Hugging Face PEFT."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from ..config import Ia3Config, ModelConfig
from .adapter import Adapter, Backbone, named_leaves
from .own_tensors import ValueCounts, join_layers, layer_name
from .peft_config import named_linears, peft_tensors, require_supported, target_sites
from .peft_linears import linears_of, names_of, sites_of, used_sites

# ---------------------------------------------------------------------------------------------------------- the config


def ia3_peft_config(config: Ia3Config, backbone: Backbone) -> dict:
    inputs = names_of(backbone.model_type, config.feedforward_modules)
    return {"feedforward_modules": inputs, "init_ia3_weights": True}


def read_ia3_config(found: dict, shapes: dict[str, tuple[int, ...]]) -> Ia3Config:
    require_supported(found, ("feedforward_modules",))
    sites = target_sites(found, shapes)
    by_shape = dict.fromkeys(linear for name, linear, _ in peft_tensors(shapes) if shapes[name][:1] == (1,))
    inputs = named_linears("feedforward_modules", found.get("feedforward_modules"), by_shape)
    return Ia3Config(target_modules=sites, feedforward_modules=sites_of(inputs))


def ia3_outline(config: Ia3Config) -> str:
    return f"Vectors on {', '.join(config.target_modules)}" + (
        "; down_proj's input is scaled" if config.feedforward_modules else ""
    )


# --------------------------------------------------------------------------------------------------------- the tensors


def ia3_tensors(adapter: Adapter) -> dict[str, np.ndarray]:
    linears = linears_of(adapter.backbone.model_type, adapter.config.target_modules)
    stacks = {name: vector_of_linear(adapter, parts) for name, parts in linears.items()}
    layers = range(adapter.backbone.num_layers)
    return {layer_name(i, f"{name}.ia3_l"): stack[i] for i in layers for name, stack in stacks.items()}


def vector_of_linear(adapter: Adapter, parts: tuple[str, ...]) -> np.ndarray:
    """The vectors of one linear, [layers, out, 1], or [layers, 1, in] if they scale its input."""
    leaves, widths = named_leaves(adapter), dict(adapter.backbone.site_widths)
    if parts[0] in adapter.config.feedforward_modules:
        return np.asarray(leaves[f"scale.{parts[0]}"])[:, None]
    vectors = []
    for site in parts:
        ones = np.ones((adapter.backbone.num_layers, widths[site]), np.float32)
        vectors.append(np.asarray(leaves.get(f"scale.{site}", ones)))
    return np.concatenate(vectors, axis=1)[:, :, None]


def ia3_shapes(config: Ia3Config, model: ModelConfig) -> dict[str, tuple[int, ...]]:
    shapes = {}
    linears = linears_of(model.model_type, config.target_modules)
    for i in range(model.num_layers):
        for name, parts in linears.items():
            on_input = parts[0] in config.feedforward_modules
            shape = (1, model.site_input_width(parts[0])) if on_input else (sum(map(model.site_width, parts)), 1)
            shapes[layer_name(i, f"{name}.ia3_l")] = shape
    return shapes


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
