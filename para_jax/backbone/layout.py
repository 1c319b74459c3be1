"""The two layouts of a Transformer's layers, and running through them: "layers" (one module per layer, for decoding)
and "stacked" (for training, where a scan keeps the compile time independent of the depth).

Layers may differ in kind (window, rotary embedding). A stack therefore holds one module for each position of a
repeating period of kinds. Its arrays have a leading axis over the repeats.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from ..config import LayerKind


def periods(kinds: tuple[LayerKind, ...]) -> tuple[tuple[int, int, int], ...]:
    """Cuts the layers into runs in which their kinds repeat: (first layer, period, repeats) of each run.

    Gemma 3 1B (26 layers, every sixth with full attention) gives (0, 6, 4) and (24, 1, 2).
    """

    def layers_in_run(period: int, repeats: int) -> int:
        return period * repeats if period == 1 or repeats > 1 else 0  # layers that don't repeat are no run

    cuts, start = [], 0
    while start < len(kinds):
        possible = [(period, repeats_from(kinds, start, period)) for period in range(1, len(kinds) - start + 1)]
        period, repeats = max(possible, key=lambda run: (layers_in_run(*run), -run[0]))  # of equal ones the shortest
        cuts.append((start, period, repeats))
        start += period * repeats
    return tuple(cuts)


def repeats_from(kinds: tuple[LayerKind, ...], start: int, period: int) -> int:
    repeats = 1
    while kinds[start : start + period] == kinds[start + repeats * period : start + (repeats + 1) * period]:
        repeats += 1
    return repeats


def stacked_layers(layers: Sequence[nnx.Module], kinds: tuple[LayerKind, ...]) -> list[nnx.List]:
    """The layers as stacks: for each cut of `periods(kinds)`, one module per position of its period.

    Each array's memory is freed once it is stacked, so the peak is the model and one stacked array.
    """

    def stack(of_position: list) -> Any:
        columns = zip(*(jax.tree.leaves(layer) for layer in of_position), strict=True)
        arrays = [replaced(jnp.stack, column) for column in columns]
        return jax.tree.unflatten(jax.tree.structure(of_position[0]), arrays)

    groups = []
    for start, period, repeats in periods(kinds):
        positions = [[layers[start + i * period + j] for i in range(repeats)] for j in range(period)]
        groups.append(nnx.List([stack(of_position) for of_position in positions]))
    return groups


def unstacked_layers(groups: Sequence[Any], kinds: tuple[LayerKind, ...]) -> list:
    """The inverse of `stacked_layers`, with the same peak."""
    layers: list = [None] * len(kinds)
    for (start, period, repeats), group in zip(periods(kinds), groups, strict=True):
        for j, stack in enumerate(group):
            columns = [replaced(one_by_one, [leaf]) for leaf in jax.tree.leaves(stack)]
            for i in range(repeats):
                arrays = [column[i] for column in columns]
                layers[start + i * period + j] = jax.tree.unflatten(jax.tree.structure(stack), arrays)
    return layers


def one_by_one(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """The arrays in a stack, sharded as it is. Iterating over it would put them on one device."""
    (stack,) = arrays
    return [stack[i] for i in range(len(stack))]


def replaced(function: Callable, arrays: Sequence[jax.Array]) -> Any:
    """function(arrays), after which the arrays are deleted. Shapes in place of arrays give shapes."""
    if isinstance(arrays[0], jax.ShapeDtypeStruct):
        return jax.eval_shape(function, list(arrays))
    result = jax.block_until_ready(function(list(arrays)))
    for array in arrays:
        array.delete()
    return result


# ------------------------------------------------------------------------------------------------- through the layers


def through_layers(model, step: Callable, x, inputs) -> tuple[Any, list]:
    """Applies step(x, layer, its inputs) -> (x, output) to every layer in order; returns the last x and all outputs.

    Args:
        model: a Transformer in either layout.
        x: any tree of arrays.
        inputs: a list with an item per layer, or a tree whose arrays have a leading axis over the layers.
    """
    if model.layout == "layers":
        return layer_by_layer(model, step, x, inputs)
    return scan_layers(model, step, x, inputs)


def layer_by_layer(model, step: Callable, x, inputs) -> tuple[Any, list]:
    outputs = []
    for i, layer in enumerate(model.layers):
        own = inputs[i] if isinstance(inputs, list) else jax.tree.map(lambda a, i=i: a[i], inputs)
        x, output = step(x, layer, own)
        outputs.append(output)
    return x, outputs


def scan_layers(model, step: Callable, x, inputs) -> tuple[Any, list]:
    """`through_layers` with one scan per cut of `periods`; its body runs the layers of one period."""
    kinds = model.config.kinds
    if isinstance(inputs, list):
        inputs = stack_trees(inputs)
    outputs: list = [None] * len(kinds)
    for (start, period, repeats), group in zip(periods(kinds), model.layers, strict=True):
        stop = start + period * repeats
        by_position = [every(period, inputs, start + j, stop) for j in range(period)]
        x, found = jax.lax.scan(partial(one_period, step), x, (list(group), by_position))
        for j in range(period):
            for i in range(repeats):
                outputs[start + i * period + j] = jax.tree.map(lambda a, i=i: a[i], found[j])
    return x, outputs


def every(period: int, inputs, start: int, stop: int) -> Any:
    """The inputs of the layers start, start + period, ... below stop."""
    return jax.tree.map(lambda a: a[start:stop:period], inputs)


def one_period(step: Callable, x, layers_and_inputs) -> tuple[Any, list]:
    outputs = []
    for layer, inputs in zip(*layers_and_inputs, strict=True):
        x, output = step(x, layer, inputs)
        outputs.append(output)
    return x, outputs


def stack_trees(trees: Sequence[Any]) -> Any:
    """Trees of one structure as one tree, whose arrays have a new leading axis."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
