"""An adapter folder in para_jax's own format. adapter_config.json has the fields of the method's config and the shape
of the backbone. There is a tensor for each array and layer, under the array's name."""

from __future__ import annotations

import importlib.metadata
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import fields
from typing import Any, NamedTuple

import jax
import numpy as np

from ...config import ModelConfig
from ...config.adapter import given_fields
from ...io.checks import shorten
from ...io.untrusted import safe_name, safe_names
from ..adapter import Adapter, Backbone, describe, named_leaves

KEYS = ("peft_type", "backbone", "base_model_name_or_path", "task_type", "inference_mode", "para_jax_version")
BACKBONE_KEYS = ("model_type", "num_layers", "width", "site_widths")

# ---------------------------------------------------------------------------------------------------------- the config


def own_config(peft_type: str, config: Any, backbone: Backbone, base_model: str, fingerprint: str | None) -> dict:
    """The content of adapter_config.json."""
    widths = dict(backbone.site_widths)
    shape = backbone._asdict() | {"site_widths": {site: widths[site] for site in config.target_modules}}
    found = {
        "peft_type": peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        **{name: value for name, value in given_fields(config).items() if value is not None},
        "backbone": shape | ({"fingerprint": fingerprint} if fingerprint else {}),
    }
    with suppress(importlib.metadata.PackageNotFoundError):  # a checkout that is not installed
        found["para_jax_version"] = importlib.metadata.version("para_jax")
    return found


def read_own_config(kind: type, found: dict) -> tuple[Any, dict]:
    """The config, of class `kind`, and the backbone in adapter_config.json, both checked."""
    optional = [field.name for field in fields(kind) if field.default is None or field.metadata.get("optional")]
    required = [field.name for field in fields(kind) if field.name not in optional]
    require_keys("", found, ("peft_type", "backbone", *required), (*KEYS, *optional))
    if found.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"task_type {shorten(found['task_type'])} is not supported; use CAUSAL_LM")
    config = kind(**{name: found[name] for name in (*required, *optional) if name in found})
    return config, checked_backbone(found["backbone"], config.target_modules)


def checked_backbone(backbone: object, sites: tuple[str, ...]) -> dict:
    if not isinstance(backbone, dict):
        raise ValueError(f"backbone must be a mapping; got {shorten(backbone)}")
    require_keys("backbone.", backbone, BACKBONE_KEYS, ("fingerprint",))
    widths = backbone["site_widths"]
    if not isinstance(widths, dict) or set(widths) != set(sites):
        raise ValueError(
            f"backbone.site_widths must have a width for each of {', '.join(sites)}; got {shorten(widths)}"
        )
    for key, value in {"num_layers": backbone["num_layers"], "width": backbone["width"], **widths}.items():
        if type(value) is not int or not 1 <= value < 2**31:
            raise ValueError(f"backbone: {key} must be a whole number of at least 1; got {shorten(value)}")
    for key in ("model_type", "fingerprint"):
        text = backbone.get(key, "")
        if not isinstance(text, str) or not text.isprintable() or len(text) > 100:
            raise ValueError(f"backbone.{key} must be a short text; got {shorten(text)}")
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


def require_keys(where: str, found: dict, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    missing = [where + key for key in required if key not in found]
    unknown = [where + key for key in found if key not in required + optional]
    if missing or unknown:
        named = {"missing": missing, "unknown": unknown}
        raise ValueError("; ".join(f"{what} keys: {safe_names(keys)}" for what, keys in named.items() if keys))


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
