"""int8 kernels for the backbone, in qwix's arrays: int8 values, and one float32 scale per output of a linear layer.

Only kernels are quantised. Norms, biases, the embedding, the head and activations are not. The backbone is frozen, so
no gradient passes through the rounding to a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int8

from ..runtime.sharding import gather_fsdp
from .layers import Linear


class Int8Linear(nnx.Module):
    """x @ (kernel * scale) (+ bias); kernel int8 [in, out], scale float32 [1, out]."""

    def __init__(self, linear: Linear):
        kernel, scale = quantise(linear.kernel[...])
        self.kernel = linear.kernel.replace(kernel)
        self.scale = nnx.Param(scale, axes=(None, linear.kernel.axes[1]))
        self.bias = linear.bias

    def __call__(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        # gathered here as int8: half the bytes of the dequantised weights
        kernel, scale = (gather_fsdp(held[...], held.axes) for held in (self.kernel, self.scale))
        weights = (kernel.astype(jnp.float32) * scale).astype(x.dtype)  # float16 and bfloat16 would round the scale too
        y = x @ weights
        return y if self.bias is None else y + self.bias[...]


def quantised(model):
    """The model, in the layout "layers", with an Int8Linear in place of each Linear."""
    return jax.tree.map(
        lambda node: Int8Linear(node) if isinstance(node, Linear) else node,
        model,
        is_leaf=lambda node: isinstance(node, Linear),
    )


def quantise(kernel: Float[Array, "in out"]) -> tuple[Int8[Array, "in out"], Float[Array, "1 out"]]:
    """(int8 values, scale): kernel / scale rounded and clipped to 127. The scale is the largest weight of an output
    divided by 127.5, so that no error exceeds half a step."""
    from qwix import quantize

    quantised_kernel = quantize(kernel.astype(jnp.float32), jnp.int8, channelwise_axes=(1,))
    # The largest weight is 127.5 steps. Without the clip, the machine's rounding would choose between 127 and 128.
    return jnp.clip(quantised_kernel.qvalue, -127, 127), quantised_kernel.scale


@cache
def quantiser(kernel: jax.sharding.Sharding | None, scale: jax.sharding.Sharding | None) -> Callable:
    """`quantise`, compiled for results with these shardings. Every process of a mesh must call it."""
    return jax.jit(quantise, out_shardings=None if kernel is None else (kernel, scale))
