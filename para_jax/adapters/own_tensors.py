"""The tensors of an adapter folder in para_jax's own format: one for each array and layer, under the array's name."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ..config import ModelConfig
from .adapter import Adapter, named_leaves

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
