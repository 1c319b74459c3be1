"""Prompts prefilled in blocks of tokens: those of the base model and of scope `response` (adapters/scope.py).

They run through the plain backbone, so the keys and values of a block depend on the tokens up to its end, and on
nothing else. `prefill_blocks` computes some blocks, of one prompt or of several. It is the same program for the base
model and for every tenant. An adapter's window of w tokens follows in two parts: `adapt_window` runs all of them but
the last again, and decoding begins with the last one, as if it were the answer's first token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .adapters.rows import Rows, by_layer
from .backbone.block_pool import LayerPool, attend_blocks, attend_window
from .backbone.layout import through_layers
from .residual import batched_adjust, plain, rotary_tables_by_kind

#: Per layer: the keys and values of all blocks.
Pool = tuple[LayerPool, ...]


class Lanes(NamedTuple):
    """The blocks that one program computes. The rows are the prompts at work."""

    tokens: Any
    """int32 [lanes, B], padded on the right"""
    row: Any
    """int32 [lanes]: the row that a lane belongs to"""
    number: Any
    """int32 [lanes]: which block of its prompt a lane is"""
    count: Any
    """int32 [lanes]: real tokens; 0 for a lane that is not used"""
    table: Any
    """int32 [rows, T]: the pool's blocks that hold each row's prompt, in order"""
    last: Any
    """int32 [rows]: where each prompt's last token is among all lanes' tokens; arbitrary for a prompt without it"""


class LastToken(NamedTuple):
    """What a row's last prompt token leaves."""

    logits: jax.Array
    """float32 [rows, vocab]"""
    entered: tuple
    """per layer: the plain residual stream that enters it, [rows, width]"""


class Windows(NamedTuple):
    """Tokens of prompts that run again with their adapters. All counts leave out a prompt's last token."""

    tokens: Any
    """int32 [rows, W]: the last W tokens, padded on the left"""
    table: Any
    """int32 [rows, T]: the pool's blocks that hold each prompt"""
    length: Any
    """int32 [rows]: tokens of each prompt"""
    adapted: Any
    """int32 [rows]: how many of the last tokens are adapted: at most W, and at most `length`"""


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


def adjustments_of(adapters: Rows, entered: tuple) -> tuple:
    """Per layer: the adjustments that the adapters make of prompts, in float32. Zeros for a row without an adapter.

    Args:
        adapters: their adjustments need no token of a prompt but its last.
        entered: LastToken.entered.
    """
    weights, make = by_layer(adapters)
    one = jnp.ones(len(entered[0]), jnp.int32)
    each = enumerate(entered)
    return tuple(make(jax.tree.map(lambda a, i=i: a[i], weights), x[:, None], one) for i, x in each)


def adapt_window(model, pool: Pool, adjustments: tuple, windows: Windows) -> tuple:
    """Per layer: the keys and values of the windows' tokens, [rows, kv_heads, W, head_dim]. For use inside a compiled
    program."""
    size = windows.tokens.shape[1]
    position = jnp.maximum(windows.length[:, None] - size + jnp.arange(size), 0)
    tables = rotary_tables_by_kind(model.config, position)

    def step(x, layer, inputs):
        held, adjustment = inputs
        attend = attend_window(held, windows.table, windows.length, windows.adapted, layer.kind.window)
        return layer(x, batched_adjust(adjustment), tables[layer.kind.rotary], attend)

    inputs = list(zip(pool, adjustments, strict=True))
    _, last = through_layers(model, step, model.embed(windows.tokens), inputs)
    return tuple(last)
