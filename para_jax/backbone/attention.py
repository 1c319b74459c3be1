"""Grouped-query attention: projections, rotary embedding, and softmax over the keys that a mask allows."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float

from ..config import ModelConfig
from ..runtime.sharding import constrain
from .layers import HeadNorm, Identity, Linear, RMSNorm, softcap
from .rotary import rotate


class Attention(nnx.Module):
    """One layer's attention. The caller's `attend` decides where keys and values come from."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        q, kv = ("width", "heads"), ("width", "kv_heads")
        self.q_proj = Linear(config.width, config.q_width, axes=q, bias=config.qkv_bias, rngs=rngs)
        self.k_proj = Linear(config.width, config.kv_width, axes=kv, bias=config.qkv_bias, rngs=rngs)
        self.v_proj = Linear(config.width, config.kv_width, axes=kv, bias=config.qkv_bias, rngs=rngs)
        self.o_proj = Linear(config.q_width, config.width, axes=("heads", "width"), bias=config.output_bias, rngs=rngs)
        self.q_norm = query_key_norm(config, config.q_width, "heads")
        self.k_norm = query_key_norm(config, config.kv_width, "kv_heads")
        self.head_dim = config.head_dim
        self.scale = config.attention_scale
        self.softcap = config.attention_softcap

    def __call__(
        self, x: Float[Array, "batch length width"], adjust: Callable, rotary: tuple[Array, Array], attend: Callable
    ):
        """(output [batch, length, width], what `attend` kept) for x [batch, length, width].

        Args:
            adjust: adjust(site, input, output) -> output, applied directly after each linear layer.
            attend: attend(q, k, v, scale, cap) -> (mixed values, kept). q is [batch, length, heads, head_dim]; q and k
                are rotated.
        """
        q = self.heads(self.q_norm(adjust("q_proj", x, self.q_proj(x))), "heads")
        k = self.heads(self.k_norm(adjust("k_proj", x, self.k_proj(x))), "kv_heads")
        v = self.heads(adjust("v_proj", x, self.v_proj(x)), "kv_heads")
        q, k = rotate(q, *rotary), rotate(k, *rotary)
        mixed, kept = attend(q, k, v, self.scale, self.softcap)
        mixed = mixed.reshape(*x.shape[:-1], -1)
        return adjust("o_proj", mixed, self.o_proj(mixed)), kept

    def heads(self, projected: Float[Array, "batch length width"], axis: str) -> Float[Array, "batch length heads e"]:
        if projected.shape[1] == 1:  # a decode step; without this, a TPU transposes the weights of q, k and v in each
            fence = jax.lax.optimization_barrier
            projected = jax.lax.platform_dependent(projected, cpu=lambda same: same, default=fence)
        split = projected.reshape(*projected.shape[:-1], -1, self.head_dim)
        return constrain(split, ("batch", None, axis, None))


def query_key_norm(config: ModelConfig, size: int, axis: str) -> nnx.Module:
    """The norm of queries or keys: none, per head (Qwen3, Gemma 3), or over the whole projection (OLMo 2)."""
    if config.qk_norm == "head":
        return HeadNorm(config.head_dim, eps=config.norm_eps, offset=config.norm_offset)
    if config.qk_norm == "projection":
        return RMSNorm(size, eps=config.norm_eps, offset=config.norm_offset, axis=axis)
    return Identity()


def mixed_values(
    q: Float[Array, "b t h e"],
    parts: Sequence[tuple[Float[Array, "b k _ e"], Float[Array, "b k _ e"]]],
    mask: Bool[Array, "#b #t s"],
    scale: float,
    cap: float | None,
) -> Float[Array, "b t h e"]:
    """softmax(q k^T) v. Scores and softmax are float32. Query head h uses kv head h // (heads / kv_heads).

    Args:
        parts: keys and values, in one or several parts along s. A part that needs no gradient costs none.
        mask: broadcasts to [b, t, s].
    """
    b, t, h, e = q.shape
    grouped = q.reshape(b, t, parts[0][0].shape[1], -1, e)
    scores = [jnp.einsum("btkge,bkse->bkgts", grouped, k, preferred_element_type=jnp.float32) for k, _ in parts]
    joined = softcap(jnp.concatenate(scores, axis=-1) * scale, cap)
    joined = jnp.where(mask[..., None, None, :, :], joined, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(joined, axis=-1).astype(parts[0][1].dtype)
    cut = jnp.split(weights, np.cumsum([k.shape[2] for k, _ in parts[:-1]], dtype=int), axis=-1)
    each = [  # "btkge" would transpose v: 3x the time on a CPU
        jnp.einsum("bkgts,bkse->bkgte", part, v) for part, (_, v) in zip(cut, parts, strict=True)
    ]
    mixed = functools.reduce(jnp.add, each)
    return mixed.transpose(0, 3, 1, 2, 4).reshape(b, t, h, e)


def causal_mask(length: int, window: int | None) -> Bool[Array, "length length"]:
    """bool [length, length]: the query at t sees the keys t - window < s <= t."""
    distance = jnp.arange(length)[:, None] - jnp.arange(length)
    return (distance >= 0) & within(distance, window)


def within(distance: jax.Array, window: int | None) -> jax.Array | bool:
    return True if window is None else distance < window
