"""A backbone with int8 kernels: qwix's arrays, int8 values with one float32 scale for each output of a linear.

Kernels alone are quantised: norms, biases, the embedding and the head stay, and so do the activations. Nothing is
trained through the rounding, for the backbone is frozen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

from ..sharding import gathered
from .layers import Linear


class Int8Linear(nnx.Module):
    """x @ (kernel * scale) (+ bias); kernel int8 [in, out], scale float32 [1, out]."""

    def __init__(self, linear: Linear):
        kernel, scale = quantise(linear.kernel[...])
        self.kernel = linear.kernel.replace(kernel)
        self.scale = nnx.Param(scale, axes=(None, linear.kernel.axes[1]))
        self.bias = linear.bias

    def __call__(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        from qwix import QArray, dot

        # Gathered here, as bytes: what they stand for would be twice as many.
        kernel, scale = (gathered(held[...], held.axes) for held in (self.kernel, self.scale))
        y = dot(x, QArray(kernel, scale.astype(x.dtype)))
        return y if self.bias is None else y + self.bias[...]


def quantised(model):
    """The model, in the layout "layers", with an Int8Linear for each Linear."""
    return jax.tree.map(
        lambda node: Int8Linear(node) if isinstance(node, Linear) else node,
        model,
        is_leaf=lambda node: isinstance(node, Linear),
    )


def quantise(kernel: Float[Array, "in out"]) -> tuple[Int8[Array, "in out"], Float[Array, "1 out"]]:
    """The int8 values nearest to kernel / scale, within 127, and the scale: an output's largest weight over 127.5,
    so that no weight is off by more than half a step."""
    from qwix import quantize

    made = quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=(1,))
    # The largest weight lies at 127.5, as near to 127 as to 128: which one it becomes is left to no machine's rounding.
    return jnp.clip(made.qvalue, -127, 127), made.scale


@cache
def quantiser(kernel: jax.sharding.Sharding | None, scale: jax.sharding.Sharding | None) -> Callable:
    """`quantise`, compiled, whose results are laid out so. Every process of a mesh must call it."""
    return jax.jit(quantise, out_shardings=None if kernel is None else (kernel, scale))
