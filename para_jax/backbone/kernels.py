"""Self-attention over whole sequences, with the kernel for the device: plain matrix products on a CPU, cuDNN on a GPU,
Pallas' splash attention on a TPU. Only plain attention stores scores [heads, length, length]."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from ..config import ModelConfig
from ..sharding import partition
from .attention import causal_mask, mixed_values
from .kernel_choice import AUTO, LANES, AttentionChoice, attention_kernel

BLOCK = 512  # largest block of splash attention, in tokens


def self_attention(
    config: ModelConfig,
    dtype,
    length: int,
    segment: Int[Array, "batch length"] | None = None,
    choice: AttentionChoice = AUTO,
) -> dict[int | None, Callable]:
    """{window: attend} for the kinds of layers. attend(q, k, v, scale, cap) returns the mixed values, and keeps keys
    and values [batch, kv_heads, length, head_dim].

    Args:
        segment: each token's segment, for packed rows. A token sees only its own segment.
        choice: the model's.
    """
    name, _ = attention_kernel(config, length, dtype, platform(), choice, packed=segment is not None)
    windows = dict.fromkeys(kind.window for kind in config.kinds)
    return {window: KERNELS[name](length, window, segment) for window in windows}


def platform() -> str:
    """The platform to compile for: that of the current mesh, which may be another machine's, else this process's."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty or not mesh.abstract_device else mesh.abstract_device.platform


def plain(length: int, window: int | None, segment: Int[Array, "batch length"] | None) -> Callable:
    mask = causal_mask(length, window)[None] if segment is None else causal_mask(length, window) & same_segment(segment)
    return attend_within(mask)


def attend_within(mask: Bool[Array, "#batch length length"]) -> Callable:
    """Plain attention under a mask."""

    def attend(q, k, v, scale, cap):
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)
        return mixed_values(q, k, v, mask, scale, cap), (k, v)

    return attend


def cudnn(
    length: int, window: int | None, segment: Int[Array, "batch length"] | None, *, implementation: Any = "cudnn"
) -> Callable:
    """Attention by jax.nn.dot_product_attention. Packed rows use a mask [batch, length, length]. Never run on a GPU."""

    def rows(q, k, v, segment, scale):
        reach: dict[str, Any] = dict(is_causal=True, local_window_size=None if window is None else (window - 1, 0))
        if segment is not None:
            reach = dict(mask=(causal_mask(length, window) & same_segment(segment))[:, None])
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation=implementation, **reach)

    def attend(q, k, v, scale, cap):
        assert cap is None
        mixed = over_mesh(partial(rows, scale=scale), 2)(q, k, v, segment)
        return mixed, (k.swapaxes(1, 2), v.swapaxes(1, 2))

    return attend


def splash(length: int, window: int | None, segment: Int[Array, "batch length"] | None) -> Callable:
    """Attention by jax.experimental.pallas.ops.tpu.splash_attention. Without a TPU it is interpreted, which is slow."""

    missing = -length % LANES  # padding comes last, where no token sees it

    def attend(q, k, v, scale, cap):
        q, k, v = (x.swapaxes(1, 2) for x in (q * scale, k, v))
        longer = [jnp.pad(x, ((0, 0), (0, 0), (0, missing), (0, 0))) for x in (q, k, v)]
        segments = None if segment is None else jnp.pad(segment, ((0, 0), (0, missing)), constant_values=-1)
        mixed = over_mesh(partial(splash_rows, window=window, cap=cap), 1)(*longer, segments)
        return mixed[:, :, :length].swapaxes(1, 2), (k, v)

    return attend


def splash_rows(
    q: Float[Array, "b h t e"],
    k: Float[Array, "b k t e"],
    v: Float[Array, "b k t e"],
    segment: Int[Array, "b t"] | None,
    window: int | None,
    cap: float | None,
) -> Float[Array, "b h t e"]:
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    heads, length = q.shape[1:3]
    square = (length, length)
    one = pallas.CausalMask(square) if window is None else pallas.LocalMask(square, (window - 1, 0), 0)
    size = next(size for size in range(min(BLOCK, length), 0, -LANES) if length % size == 0)
    blocks = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes: dict[str, Any] = {f"block_{name}": size for name in blocks}
    kernel = pallas.make_splash_mha_single_device(
        pallas.MultiHeadMask([one] * heads),
        block_sizes=pallas.BlockSizes(**sizes),
        attn_logits_soft_cap=cap,
        interpret=platform() != "tpu",
    )
    mixed: Any = jax.vmap(kernel)(q, k, v, None if segment is None else pallas.SegmentIds(segment, segment))
    return mixed


def over_mesh(rows: Callable, heads_axis: int) -> Callable:
    """rows(q, k, v, segment), run on each device of the mesh for its own rows and heads: the compiler cannot split a
    kernel. Heads are not split if the number of kv heads does not divide by the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return rows

    def run(q, k, v, segment):
        counts = (q.shape[0], k.shape[heads_axis])
        batch, heads = partition(("batch", "kv_heads"), counts, mesh.shape)
        spec = jax.P(batch, *(heads if axis == heads_axis else None for axis in (1, 2, 3)))
        specs = (spec, spec, spec, jax.P(batch, None))
        return jax.shard_map(rows, in_specs=specs, out_specs=spec, check_vma=False)(q, k, v, segment)

    return run


def same_segment(segment: Int[Array, "batch length"]) -> Bool[Array, "batch length length"]:
    return segment[:, :, None] == segment[:, None]


#: kernel(length, window, segment) -> attend
KERNELS: dict[str, Callable] = {"plain": plain, "cudnn": cudnn, "splash": splash}
