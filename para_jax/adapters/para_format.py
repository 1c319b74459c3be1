"""PARA's tensors in an adapter folder: in PyTorch's orientation, the up-projections of all sites as one matrix, and
their biases as one vector."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from ..config import ModelConfig, ParaConfig
from .adapter import Adapter, named_leaves
from .own_tensors import ValueCounts, join_layers, layer_name

#: Arrays that only some configs have, and their names in the file.
EXTRAS = {
    "constant": "para_constant",
    "mean": "para_summary_mean",
    "scale": "para_summary_scale",
    "numerator": "para_numerator",
    "denominator": "para_denominator",
}


def para_tensors(adapter: Adapter) -> dict[str, jax.Array | np.ndarray]:
    """The tensors by name, [out, in]; the rows of para_up.weight are in the order of the sites."""
    config, leaves, count = adapter.config, named_leaves(adapter), adapter.backbone.num_layers
    tensors = {}
    for place, i in enumerate(adapter.layers(config, count)):
        r = config.rank_of(i, count)
        ups = [leaves[f"up.{site}"][place, :r].T for site in config.target_modules]
        tensors[layer_name(i, "para_down.weight")] = leaves["down"][place, :, :r].T
        tensors[layer_name(i, "para_up.weight")] = jnp.concatenate(ups)
        if config.up_bias:
            biases = [leaves[f"up_bias.{site}"][place] for site in config.target_modules]
            tensors[layer_name(i, "para_up.bias")] = jnp.concatenate(biases)
        tensors |= {layer_name(i, name): leaves[key][place] for key, name in EXTRAS.items() if key in leaves}
    return tensors


def para_leaves(
    config: ParaConfig, model: ModelConfig, tensors: dict[str, np.ndarray]
) -> tuple[ParaConfig, dict[str, np.ndarray]]:
    stacked = join_layers({name: in_array_rank(name, tensor, config.array_r) for name, tensor in tensors.items()})
    ends = np.cumsum([model.site_width(site) for site in config.target_modules])[:-1]
    ups = np.split(stacked["para_up.weight"].swapaxes(1, 2), ends, axis=2)
    leaves = {f"up.{site}": up for site, up in zip(config.target_modules, ups, strict=True)}
    if config.up_bias:
        biases = np.split(stacked["para_up.bias"], ends, axis=1)
        leaves |= {f"up_bias.{site}": bias for site, bias in zip(config.target_modules, biases, strict=True)}
    leaves["down"] = stacked["para_down.weight"].swapaxes(1, 2)
    return config, leaves | {key: stacked[name] for key, name in EXTRAS.items() if name in stacked}


def in_array_rank(name: str, tensor: np.ndarray, rank: int) -> np.ndarray:
    """A layer's tensor with zeros up to the rank of the arrays."""
    axis = {"para_down.weight": 0, "para_up.weight": 1}.get(".".join(name.split(".")[-2:]))
    if axis is None or tensor.shape[axis] == rank:
        return tensor
    room = [(0, rank - size if i == axis else 0) for i, size in enumerate(tensor.shape)]
    return np.pad(tensor, room)


def para_values(config: ParaConfig, backbone: dict, read_shapes: Callable) -> ValueCounts:
    """Counted from the config alone, so that a folder without its weights can be inspected."""
    count, width, carried = backbone["num_layers"], backbone["width"], sum(backbone["site_widths"].values())
    layers = count if config.layers_to_transform is None else len(config.layers_to_transform)
    vectors = carried if config.up_bias else 0
    if config.pooler == "constant":
        vectors += width
    if config.summary == "standardised":
        vectors += width + 1
    if config.activation == "rational":
        vectors += 7 + 5
    each = width + carried  # numbers per rank of a layer
    return ValueCounts(matrices=config.total_rank(count) * each, vectors=layers * vectors, carried=count * carried)


def para_outline(config: ParaConfig) -> str:
    rank = f"{config.r} ({config.late_r} in the last third of the layers)" if config.late_r else str(config.r)
    text = f"Rank {rank} on {', '.join(config.target_modules)}; pooler {config.pooler}, "
    text += f"summary {config.summary}, activation {config.activation}"
    if config.up_bias:
        text += ", W_up with a bias"
    if config.layers_to_transform:
        text += f"; layers {', '.join(map(str, config.layers_to_transform))}"
    return text
