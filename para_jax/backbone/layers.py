"""The building blocks of attention and feed-forward layers: linear layers, norms, activations and the soft cap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float


class Linear(nnx.Module):
    """x @ kernel (+ bias); kernel [in, out]."""

    def __init__(self, size_in: int, size_out: int, *, axes: tuple[str, str], bias: bool, rngs: nnx.Rngs):
        self.kernel = nnx.Param(normal(rngs, (size_in, size_out), size_in**-0.5), axes=axes)
        self.bias = nnx.Param(jnp.zeros(size_out), axes=axes[1:]) if bias else None

    def __call__(self, x: Float[Array, "*rows in"]) -> Float[Array, "*rows out"]:
        y = x @ self.kernel[...]
        return y if self.bias is None else y + self.bias[...]


class RMSNorm(nnx.Module):
    """x / rms(x) * (offset + weight) over the last axis, in float32 (arXiv:1910.07467). Gemma's offset is 1."""

    def __init__(self, size: int, *, eps: float, offset: float, axis: str | None = None):
        self.weight = nnx.Param(jnp.full(size, 1.0 - offset), axes=(axis,))
        self.eps = eps
        self.offset = offset

    def __call__(self, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        x32 = x.astype(jnp.float32)
        scale = jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (x32 * scale * (self.offset + self.weight[...].astype(jnp.float32))).astype(x.dtype)


class HeadNorm(RMSNorm):
    """The RMS norm of each head of a projection [..., heads * head_dim]. All heads share one weight [head_dim]."""

    def __call__(self, x: Float[Array, "*rows size"]) -> Float[Array, "*rows size"]:
        return super().__call__(x.reshape(*x.shape[:-1], -1, self.weight.shape[-1])).reshape(x.shape)


class Identity(nnx.Module):
    """Replaces a norm that a family lacks."""

    def __call__(self, x: jax.Array) -> jax.Array:
        return x


def normal(rngs: nnx.Rngs, shape: tuple[int, ...], scale: float) -> jax.Array:
    return scale * jax.random.normal(rngs.params(), shape)


def in_float32(activation: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    """The activation, computed in float32 and rounded once, as in transformers. JAX would round each step to x's dtype,
    and in bfloat16 the `1 + tanh` of Gemma's GELU then has few digits left: at -3 it would be 60 % too large."""

    @partial(jax.checkpoint, prevent_cse=False)  # the backward pass keeps x itself, and no float32 values of its size
    def rounded_once(x):
        return activation(x.astype(jnp.float32)).astype(x.dtype)

    return lambda x: activation(x) if x.dtype == jnp.float32 else rounded_once(x)


#: The values of ModelConfig.activation.
ACTIVATIONS = {
    "silu": in_float32(jax.nn.silu),
    "gelu": in_float32(partial(jax.nn.gelu, approximate=False)),
    "gelu_tanh": in_float32(partial(jax.nn.gelu, approximate=True)),
    "relu": jax.nn.relu,  # exact in every dtype
}


def scaled(x: Float[Array, "*axes"], factor: float) -> Float[Array, "*axes"]:
    """x times the factor, rounded once. In bfloat16 Granite's 0.22 alone would be 0.12 % too small in every layer, and
    1 / 12, which scales the scores of Gemma 2 27B, 0.2 % too large."""
    return x if factor == 1 else (x.astype(jnp.float32) * factor).astype(x.dtype)


def softcap(x: jax.Array, cap: float | None) -> jax.Array:
    """cap * tanh(x / cap), which keeps x within ±cap (Gemma 2, arXiv:2408.00118). None leaves x unchanged."""
    return x if cap is None else cap * jnp.tanh(x / cap)
