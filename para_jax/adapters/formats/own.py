"""An adapter folder in para_jax's own format. adapter_config.json has the fields of the method's config and the shape
of the backbone. There is a tensor for each array and layer, under the array's name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, NamedTuple

import jax
import numpy as np

from ...config import ModelConfig
from ...config.adapter import given_fields
from ...io.checks import require, shorten
from ...io.untrusted import safe_name, safe_names
from ..adapter import Adapter, Backbone, describe, named_leaves

KEYS = ("peft_type", "backbone", "base_model_name_or_path", "task_type", "inference_mode")

# ---------------------------------------------------------------------------------------------------------- the config


def own_config(peft_type: str, config: Any, backbone: Backbone, base_model: str, fingerprint: str | None) -> dict:
    """The content of adapter_config.json."""
    widths = dict(backbone.site_widths)
    shape = backbone._asdict() | {"site_widths": {site: widths[site] for site in config.target_modules}}
    return {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **{name: value for name, value in given_fields(config).items() if value is not None},
        "backbone": shape | ({"fingerprint": fingerprint} if fingerprint else {}),
    }


def read_own_config(kind: type, found: dict) -> tuple[Any, dict]:
    """The config, of class `kind`, and the backbone in adapter_config.json, both checked."""
    optional = [field.name for field in fields(kind) if field.default is None or field.metadata.get("optional")]
    required = [field.name for field in fields(kind) if field.name not in optional]
    keys = {
        "missing": [key for key in ("backbone", *required) if key not in found],
        "unknown": [key for key in found if key not in (*KEYS, *required, *optional)],
    }
    if any(keys.values()):
        raise ValueError("; ".join(f"{what} keys: {safe_names(named)}" for what, named in keys.items() if named))
    config = kind(**{name: found[name] for name in (*required, *optional) if name in found})
    return config, checked_backbone(found["backbone"], config.target_modules)


def checked_backbone(backbone: Any, sites: tuple[str, ...]) -> dict:
    """The description of the backbone, with the sizes that `inspect` and banks count with."""
    widths = backbone.get("site_widths") if isinstance(backbone, dict) else None
    fits = isinstance(widths, dict) and set(widths) == set(sites) and "model_type" in backbone
    sizes = [backbone.get("num_layers"), backbone.get("width"), *widths.values()] if fits else []
    fits = fits and all(type(size) is int and 0 < size < 2**31 for size in sizes)
    require(fits, "backbone", backbone, f"model_type, num_layers, width, and site_widths of {', '.join(sites)}")
    return backbone


def require_same_backbone(backbone: dict, model: ModelConfig, base_model: object) -> None:
    """Raises ValueError with the differences between the backbone in a config and this one.

    Args:
        base_model: the name of the backbone in the config.
    """
    expected = describe(model)._asdict()
    expected["site_widths"] = {site: model.site_width(site) for site in backbone["site_widths"]}
    differing = [
        f"{key} {safe_name(str(backbone[key]))}, not {expected[key]}"
        for key in expected
        if backbone[key] != expected[key]
    ]
    if differing:
        named = f", {shorten(base_model, 200)}" if base_model else ""
        raise ValueError(f"the adapter is for another backbone{named}: it has {'; '.join(differing)[:500]}")


# --------------------------------------------------------------------------------------------------------- the tensors

#: What Hugging Face PEFT puts before the number of a layer.
PREFIX = "base_model.model.model.layers."


def layer_name(i: int, name: str) -> str:
    return f"{PREFIX}{i}.{name}"


def tensors_of_leaves(adapter: Adapter) -> dict[str, jax.Array | np.ndarray]:
    layers = adapter.layers(adapter.config, adapter.backbone.num_layers)
    leaves = named_leaves(adapter)
    return {layer_name(i, name): leaf[place] for place, i in enumerate(layers) for name, leaf in leaves.items()}


def leaves_of_tensors(config: Any, model: ModelConfig, tensors: dict[str, np.ndarray]) -> tuple[Any, dict]:
    return config, join_layers(tensors)


def join_layers(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The tensors without the number of their layer in the name, [layers, ...] in the order of the layers."""
    found: dict[str, dict[int, np.ndarray]] = {}
    for full_name, tensor in tensors.items():
        layer, _, name = full_name.removeprefix(PREFIX).partition(".")
        found.setdefault(name, {})[int(layer)] = tensor
    return {name: np.stack([of_layer[i] for i in sorted(of_layer)]) for name, of_layer in found.items()}


class ValueCounts(NamedTuple):
    """How many numbers an adapter has."""

    matrices: int
    """in its matrices"""
    vectors: int
    """in its vectors"""
    carried: int
    """that decode carries for each row"""
    joined: int = 0
    """vectors that become one with others, in a bank and in what decode carries"""


def count_by_shape(config: Any, backbone: dict, read_shapes: Callable[[], dict[str, tuple[int, ...]]]) -> ValueCounts:
    """The counts of a method whose decode carries a vector for each site and layer."""
    shapes = read_shapes().values()
    matrices = sum(math.prod(shape) for shape in shapes if len(shape) > 1)
    vectors = sum(math.prod(shape) for shape in shapes if len(shape) <= 1)
    carried = backbone["num_layers"] * sum(backbone["site_widths"].values())
    return ValueCounts(matrices, vectors, carried)
