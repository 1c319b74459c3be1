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
from ..runtime.sharding import partition
from .attention import causal_mask, mixed_values
from .kernel_choice import LANES, AttentionChoice, attention_kernel
from .layers import scaled

BLOCK = 512  # largest block of splash attention, in tokens


def self_attention(
    config: ModelConfig,
    dtype,
    length: int,
    segment: Int[Array, "batch length"] | None,
    choice: AttentionChoice,
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

    def attend(q, k, v, scale, cap):
        k, v = k.swapaxes(1, 2), v.swapaxes(1, 2)  # heads first, as the cache holds them
        return mixed_values(q, [(k, v)], mask, scale, cap), (k, v)

    return attend


def cudnn(
    length: int, window: int | None, segment: Int[Array, "batch length"] | None, *, implementation: Any = "cudnn"
) -> Callable:
    """Attention by jax.nn.dot_product_attention. Packed rows use a mask [batch, length, length]. Never run on a GPU.

    Rows get an even length: JAX refuses the backward pass of others (check_is_flash_attention), and cuDNN one token."""

    def rows(q, k, v, segment, scale):
        reach: dict[str, Any] = dict(is_causal=True, local_window_size=None if window is None else (window - 1, 0))
        if segment is not None:
            reach = dict(mask=(causal_mask(q.shape[1], window) & same_segment(segment))[:, None])
        return jax.nn.dot_product_attention(q, k, v, scale=scale, implementation=implementation, **reach)

    def attend(q, k, v, scale, cap):
        assert cap is None  # cuDNN has no soft cap; kernel_choice leaves it out then
        even = [padded_to(2, x, 1) for x in (q, k, v)]  # padding comes last, where no token sees it
        segments = None if segment is None else padded_to(2, segment, 1, -1)
        mixed = over_mesh(partial(rows, scale=scale), 2)(*even, segments)
        return mixed[:, :length], (k.swapaxes(1, 2), v.swapaxes(1, 2))

    return attend


def splash(length: int, window: int | None, segment: Int[Array, "batch length"] | None) -> Callable:
    """Attention by jax.experimental.pallas.ops.tpu.splash_attention. Without a TPU it is interpreted, which is slow."""

    def attend(q, k, v, scale, cap):
        q, k, v = (x.swapaxes(1, 2) for x in (scaled(q, scale), k, v))
        longer = [padded_to_lanes(x, 2) for x in (q, k, v)]  # padding comes last, where no token sees it
        segments = None if segment is None else (padded_to_lanes(segment, 1, -1),) * 2
        mixed = over_mesh(partial(splash_rows, window=window, cap=cap), 1)(*longer, segments)
        return mixed[:, :, :length].swapaxes(1, 2), (k, v)

    return attend


def splash_both(
    prompt: tuple[Float[Array, "b k p e"], Float[Array, "b k p e"]],
    of_prompt: Int[Array, "b p"],
    of_tail: Int[Array, "b t"],
) -> Callable:
    """`cache.attend_both` by splash attention, without a window.

    Args:
        of_prompt, of_tail: numbers. A new token sees the prompt's tokens with its own number, and the new tokens with
            its own number up to itself. Negative numbers are those of padding.
    """

    def attend(q, k, v, scale, cap):
        q, k, v = (x.swapaxes(1, 2) for x in (scaled(q, scale), k, v))
        keys, values = (
            jnp.concatenate([padded_to_lanes(x, 2) for x in both], axis=2) for both in zip(prompt, (k, v), strict=True)
        )
        seeing = padded_to_lanes(of_tail, 1, -1)
        # The prompt's padding has another number than that of the tails, so nothing sees it.
        seen = jnp.concatenate([padded_to_lanes(of_prompt, 1, -2), seeing], axis=1)
        rows = over_mesh(partial(splash_rows, window=None, cap=cap), 1)
        mixed = rows(padded_to_lanes(q, 2), keys, values, (seeing, seen))
        return mixed[:, :, : q.shape[2]].swapaxes(1, 2), (k, v)

    return attend


def padded_to_lanes(x: jax.Array, axis: int, value: int = 0) -> jax.Array:
    """An array with its token axis padded to a multiple of LANES."""
    return padded_to(LANES, x, axis, value)


def padded_to(multiple: int, x: jax.Array, axis: int, value: int = 0) -> jax.Array:
    """An array with its token axis padded to a multiple."""
    missing = [(0, -size % multiple if i == axis else 0) for i, size in enumerate(x.shape)]
    return jnp.pad(x, missing, constant_values=value)


def splash_rows(
    q: Float[Array, "b h t e"],
    k: Float[Array, "b k s e"],
    v: Float[Array, "b k s e"],
    segments: tuple[Int[Array, "b t"], Int[Array, "b s"]] | None,
    window: int | None,
    cap: float | None,
) -> Float[Array, "b h t e"]:
    """The mixed values of the last t of s tokens."""
    from jax.experimental.pallas.ops.tpu import splash_attention as pallas

    heads, shape = q.shape[1], (q.shape[2], k.shape[2])
    before = shape[1] - shape[0]  # the queries are the last tokens
    one = pallas.CausalMask(shape, before) if window is None else pallas.LocalMask(shape, (window - 1, 0), before)
    largest = [next(size for size in range(min(BLOCK, n), 0, -LANES) if n % size == 0) for n in shape]
    names = (("q", "q_dkv", "q_dq"), ("kv", "kv_compute", "kv_dkv", "kv_dkv_compute", "kv_dq"))
    sizes: dict[str, Any] = {f"block_{name}": size for size, of in zip(largest, names, strict=True) for name in of}
    kernel = pallas.make_splash_mha_single_device(
        pallas.MultiHeadMask([one] * heads),
        block_sizes=pallas.BlockSizes(**sizes),
        attn_logits_soft_cap=cap,
        interpret=platform() != "tpu",  # for tests on a CPU
    )
    mixed: Any = jax.vmap(kernel)(q, k, v, None if segments is None else pallas.SegmentIds(*segments))
    return mixed


def over_mesh(rows: Callable, heads_axis: int) -> Callable:
    """rows(q, k, v, segments), run on each device of the mesh for its own rows and heads: the compiler cannot split a
    kernel. Heads are not split if the number of kv heads does not divide by the mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return rows

    def run(q, k, v, segments):
        counts = (q.shape[0], k.shape[heads_axis])
        batch, heads = partition(("batch", "kv_heads"), counts, mesh.shape)
        spec = jax.P(batch, *(heads if axis == heads_axis else None for axis in (1, 2, 3)))
        specs = (spec, spec, spec, jax.P(batch, None))
        return jax.shard_map(rows, in_specs=specs, out_specs=spec, check_vma=False)(q, k, v, segments)

    return run


def same_segment(segment: Int[Array, "batch length"]) -> Bool[Array, "batch length length"]:
    return segment[:, :, None] == segment[:, None]


#: kernel(length, window, segment) -> attend
KERNELS: dict[str, Callable] = {"plain": plain, "cudnn": cudnn, "splash": splash}
