"""Prompts prefilled in blocks of tokens: what the prompts of the base model and of scope `response` are made of.

Their prompts run through the plain backbone, so the keys and values of a block depend on the tokens up to its end, and
on nothing else. `prefill_blocks` computes some blocks, of one prompt or of several. It is the same program for the base
model and for every tenant. `adapt_window` then runs the last tokens of finished prompts again with their adapters, from
the residual streams that `prefill_blocks` gives at each prompt's last token (adapters/scope.py).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from .adapters.rows import Rows, by_layer
from .backbone.block_pool import LayerPool, attend_blocks, attend_window
from .backbone.layout import through_layers
from .residual import batched_adjust, plain, rotary_tables_by_kind

#: Per layer: the keys and values of all blocks.
Pool = tuple[LayerPool, ...]


class Lanes(NamedTuple):
    """The blocks that one program computes. The rows are the prompts at work."""

    tokens: Int[Array, "lanes B"]
    """padded on the right"""
    row: Int[Array, " lanes"]
    """the row that a lane belongs to"""
    number: Int[Array, " lanes"]
    """which block of its prompt a lane is"""
    count: Int[Array, " lanes"]
    """real tokens; 0 for a lane that is not used"""
    table: Int[Array, "rows T"]
    """the pool's blocks that hold each row's prompt, in order"""
    last: Int[Array, " rows"]
    """where each prompt's last token is among all lanes' tokens; arbitrary for a prompt without it"""


class LastToken(NamedTuple):
    """What a row's last prompt token leaves."""

    logits: Float[Array, "rows vocab"]
    entered: tuple
    """per layer: the plain residual stream that enters it, [rows, width]"""


class Windows(NamedTuple):
    """The ends of prompts, which run again with their adapters."""

    tokens: Int[Array, "rows W"]
    """each prompt's last W tokens, padded on the left"""
    table: Int[Array, "rows T"]
    length: Int[Array, " rows"]
    """tokens of each prompt"""
    adapted: Int[Array, " rows"]
    """how many of the last tokens are adapted: at most W, and at most `length`"""


class Adapted(NamedTuple):
    """What the adapters make of prompts."""

    logits: Float[Array, "rows vocab"]
    adjustments: tuple
    """per layer, as decode carries them"""
    last: tuple
    """per layer: keys and values of each prompt's last W tokens, [rows, kv_heads, W, head_dim]"""


def prefill_blocks(model, pool: Pool, lanes: Lanes) -> tuple[Pool, LastToken]:
    """The pool with the lanes' blocks, computed by the plain backbone. For use inside a compiled program, which donates
    the pool."""
    size = lanes.tokens.shape[1]
    start, table = lanes.number * size, lanes.table[lanes.row]
    block = jnp.take_along_axis(table, lanes.number[:, None], axis=1)[:, 0]
    block = jnp.where(lanes.count > 0, block, pool[0][0].shape[0])
    tables = rotary_tables_by_kind(model.config, start[:, None] + jnp.arange(size))

    def last(x):
        return x.reshape(-1, x.shape[2])[lanes.last]

    def step(x, layer, held):
        attend = attend_blocks(held, block, table, start, lanes.count, layer.kind.window)
        out, held = layer(x, plain, tables[layer.kind.rotary], attend)
        return out, (held, last(x))

    x, kept = through_layers(model, step, model.embed(lanes.tokens), list(pool))
    logits = model.logits(model.final_norm(last(x)))
    return tuple(held for held, _ in kept), LastToken(logits, tuple(entered for _, entered in kept))


def adapt_window(model, adapters: Rows, pool: Pool, windows: Windows, entered: tuple) -> Adapted:
    """The ends of prompts with their adapters. A row without an adapter gives adjustments of zero. For use inside a
    compiled program.

    Args:
        adapters: their adjustments need no token of a prompt but its last.
        entered: LastToken.entered.
    """
    weights, make = by_layer(adapters)
    size = windows.tokens.shape[1]
    position = jnp.maximum(windows.length[:, None] - size + jnp.arange(size), 0)
    tables = rotary_tables_by_kind(model.config, position)

    def step(x, layer, inputs):
        weights, held, entered = inputs
        adjustment = make(weights, entered[:, None], jnp.ones(len(x), jnp.int32))
        attend = attend_window(held, windows.table, windows.length, windows.adapted, layer.kind.window)
        out, new = layer(x, batched_adjust(adjustment), tables[layer.kind.rotary], attend)
        return out, (jax.tree.map(lambda a: a.astype(x.dtype), adjustment), new)

    of_layers = [jax.tree.map(lambda a, i=i: a[i], weights) for i in range(model.config.num_layers)]
    inputs = list(zip(of_layers, pool, entered, strict=True))
    x, kept = through_layers(model, step, model.embed(windows.tokens), inputs)
    logits = model.logits(model.final_norm(x[:, -1]))
    return Adapted(logits, tuple(adjustment for adjustment, _ in kept), tuple(new for _, new in kept))
