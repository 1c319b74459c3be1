"""Scope `response` in two parts: prompts, which run through the plain backbone and need no backward pass, and tails,
on which the adapter acts.

A tail is the last w tokens of a prompt and what comes after it. It attends to the plain keys and values of the tokens
before it, and to itself; nothing else of the prompt reaches it. Each layer makes its adjustments from the tail's own
stream, at the prompt's last token.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from ..adapters.acting import acting, batched_adjust, plain
from ..adapters.rows import by_layer, reach_of
from ..adapters.segments import Segments
from ..backbone.attention import within
from ..backbone.cache import attend_both
from ..backbone.kernel_choice import LANES, attention_kernel
from ..backbone.kernels import platform, self_attention, splash_both
from ..backbone.layout import stack_trees, through_layers
from ..config import ModelConfig
from .residual import REMAT, residual_stream, rotary_tables_by_kind


class Tokens(NamedTuple):
    """The prompts or the tails of a batch, padded on the right."""

    tokens: jax.Array
    """int32 [rows, T]"""
    position: jax.Array
    """int32 [rows, T] or [T]: of each token in its example"""
    segments: Segments | None = None
    """for packed rows: where each example's prompt, or tail, is in its row"""


class PromptStates(NamedTuple):
    """The keys and values of a batch's prompts in the plain backbone, which tails attend to."""

    keys: jax.Array
    """[layers, rows, kv_heads, P, head_dim] after rotary, in the model's dtype; any finite numbers at padding"""
    values: jax.Array
    """as keys"""
    row: jax.Array | None = None
    """int32: which of these rows each row of the batch has, so that rows can share a prompt; None: its own"""


@jax.jit
def prompt_states(model, tokens: Int[Array, "rows P"]) -> PromptStates:
    """The states of prompts, padded on the right."""
    keep = lambda x, kept, adjustment: PromptStates(*kept)  # noqa: E731
    return stack_trees(residual_stream(model, None, tokens, None, keep=keep)[1])


def tail_stream(
    model,
    adapters,
    prompts: Tokens,
    prompt_length: Int[Array, "*axes"],
    tails: Tokens,
    *,
    states: PromptStates | None = None,
    keep: Callable | None = None,
    remat: str = "dots",
):
    """The residual stream of the tails before the final norm, [rows, T, width], and a list with keep's result for each
    layer. Every row's scope must be `response`.

    Args:
        prompts: a prompt may be followed by further tokens, which nothing reads.
        tails: each begins at position `tail_start` of its example.
        states: of the prompts. Their tokens are then not read. None: each layer computes the states first, without a
            gradient.
        keep: keep((keys, values) of the prompts, those of the tails, float32 adjustment); default: keeps nothing.
        remat: a key of REMAT, for the tails. The prompts' keys and values are saved, or their stream (keeps_stream).
    """
    config, reach = model.config, reach_of(adapters, len(tails.tokens))
    weights, make = by_layer(adapters)
    start = tail_start(prompt_length, reach.window)
    place = [] if tails.segments is None else [tails.segments.start]
    acts = reach.only_window is not None or reach.acts(prompt_length, tails.position, tails.segments)
    tables = rotary_tables_by_kind(config, tails.position)
    windows = dict.fromkeys(kind.window for kind in config.kinds)
    attend_to = {window: tail_attention(model, prompts, tails, start, window) for window in windows}

    def through_tail(x, layer, weights, of_prompts):
        adjustment = make(weights, x, prompt_length - start, *place)  # a tail begins with the window's prompt tokens
        adjust = acting(batched_adjust(adjustment, tails.segments), acts)
        x, of_tails = layer(x, adjust, tables[layer.kind.rotary], attend_to[layer.kind.window](of_prompts))
        return x, keep(of_prompts, of_tails, adjustment) if keep else None

    if states is not None:
        row, through_tail = states.row, REMAT[remat](through_tail)

        def after_states(x, layer, inputs):
            weights, held = inputs
            return through_tail(x, layer, weights, held if row is None else jax.tree.map(lambda a: a[row], held))

        return through_layers(model, after_states, model.embed(tails.tokens), (weights, states[:2]))

    of_prompts = rotary_tables_by_kind(config, prompts.position)
    segment = None if prompts.segments is None else prompts.segments.segment
    attend = self_attention(config, model.dtype, prompts.tokens.shape[1], segment, model.attention)
    whole = keeps_stream(config, remat)
    # One checkpoint is enough: it is around the whole step where the prompts' stream is kept.
    through_tail = REMAT["none" if whole else remat](through_tail)

    def step(streams, layer, weights):
        prompt, x = streams
        prompt, held = layer(prompt, plain, of_prompts[layer.kind.rotary], attend[layer.kind.window])
        x, kept = through_tail(x, layer, weights, held)
        return (prompt, x), kept

    streams = model.embed(prompts.tokens), model.embed(tails.tokens)
    (_, x), kept = through_layers(model, REMAT[remat](step) if whole else step, streams, weights)
    return x, kept


def keeps_stream(config: ModelConfig, remat: str) -> bool:
    """Whether the backward pass gets the prompts' stream instead of their keys and values, and computes these again:
    with `block`, where the stream is smaller."""
    return remat == "block" and config.width < 2 * config.kv_width


def tail_start(prompt_length: Int[Array, "*axes"], window: int) -> Int[Array, "*axes"]:
    """The position at which each prompt's tail begins."""
    return jnp.maximum(prompt_length - window, 0)


def tail_attention(
    model, prompts: Tokens, tails: Tokens, start: Int[Array, "*axes"], window: int | None
) -> Callable[[tuple[jax.Array, jax.Array]], Callable]:
    """The function that makes a layer's attention of the tails from the keys and values of the prompts."""
    length, packed = tails.tokens.shape[1], tails.segments is not None
    kernel, on = "plain", platform()
    if on != "gpu":  # tails never attend by cuDNN
        kernel, _ = attention_kernel(model.config, length, model.dtype, on, model.attention, packed=packed)
    if not by_splash(kernel, length, window):
        return partial(attend_both, mask=seen_by_tails(prompts, tails, start, window))
    if tails.segments is None or prompts.segments is None:
        of_tail, of_prompt, first = jnp.zeros_like(tails.tokens), jnp.zeros_like(prompts.tokens), start[:, None]
    else:
        of_tail, of_prompt = tails.segments.segment, prompts.segments.segment
        first = jnp.take_along_axis(start, jnp.maximum(of_prompt, 0), axis=1)
    return partial(splash_both, of_prompt=jnp.where(prompts.position < first, of_prompt, -2), of_tail=of_tail)


def by_splash(kernel: str, length: int, window: int | None) -> bool:
    """Whether tails of `length` tokens attend by splash attention, where whole sequences do by `kernel`. The kernel
    counts places in a row, and a window counts positions."""
    return kernel == "splash" and length >= LANES and window is None


def seen_by_tails(
    prompts: Tokens, tails: Tokens, start: Int[Array, "*axes"], window: int | None
) -> Bool[Array, "rows tail both"]:
    """Which keys each token of a tail attends to: those of its prompt before the tail, then those of the tails."""
    here = jnp.broadcast_to(tails.position, tails.tokens.shape)[:, :, None]
    before = jnp.broadcast_to(prompts.position, prompts.tokens.shape)[:, None]
    if tails.segments is None or prompts.segments is None:
        first = start[:, None, None]
        in_prompt, in_tail = before < first, here >= here.swapaxes(1, 2)
    else:
        of_tail, of_prompt = tails.segments.segment, prompts.segments.segment
        first = jnp.take_along_axis(start, jnp.maximum(of_tail, 0), axis=1)[:, :, None]
        in_prompt = (before < first) & (of_tail[:, :, None] == of_prompt[:, None])
        in_tail = (here >= here.swapaxes(1, 2)) & (of_tail[:, :, None] == of_tail[:, None])
    distances = here - before, here - here.swapaxes(1, 2)
    both = [(d >= 0) & within(d, window) & seen for d, seen in zip(distances, (in_prompt, in_tail), strict=True)]
    return jnp.concatenate(both, axis=2)
