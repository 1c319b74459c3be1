"""An adapter folder in para_jax's own format. adapter_config.json has the fields of the method's config and the shape
of the backbone. There is a tensor for each array and layer, under the array's name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Annotated, Any, NamedTuple

import jax
import numpy as np

from ...config import ModelConfig
from ...config.adapter import given_fields
from ...config.bounds import Bounds, check_value
from ...io.checks import require, shorten
from ...io.untrusted import safe_name, safe_names
from ..adapter import Adapter, Backbone, describe, named_leaves

KEYS = ("peft_type", "backbone", "base_model_name_or_path", "task_type", "inference_mode")
BACKBONE_KEYS = ("model_type", "num_layers", "width", "site_widths")
Size = Annotated[int, Bounds(at_least=1, below=2**31)]

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
    require_keys("", found, ("peft_type", "backbone", *required), (*KEYS, *optional))
    config = kind(**{name: found[name] for name in (*required, *optional) if name in found})
    return config, checked_backbone(found["backbone"], config.target_modules)


def checked_backbone(backbone: Any, sites: tuple[str, ...]) -> dict:
    require(isinstance(backbone, dict), "backbone", backbone, "a mapping")
    require_keys("backbone.", backbone, BACKBONE_KEYS, ("fingerprint",))
    widths = backbone["site_widths"]
    fits = isinstance(widths, dict) and set(widths) == set(sites)
    require(fits, "backbone.site_widths", widths, f"a width for each of {', '.join(sites)}")
    for key, value in {"num_layers": backbone["num_layers"], "width": backbone["width"], **widths}.items():
        check_value(f"backbone: {key}", value, Size)
    for key in ("model_type", "fingerprint"):
        text = backbone.get(key, "")
        short = isinstance(text, str) and text.isprintable() and len(text) <= 100
        require(short, f"backbone.{key}", text, "a short text")
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
