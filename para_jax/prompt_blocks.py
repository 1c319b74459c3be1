"""Prompts prefilled in blocks of tokens: those of the base model and of scope `response` (adapters/scope.py).

They run through the plain backbone, so the keys and values of a block depend on the tokens up to its end, and on
nothing else. `prefill_blocks` computes some blocks, of one prompt or of several. It is the same program for the base
model and for every tenant. An adapter's tail follows: `run_tails` takes a prompt's last w tokens as ordinary steps
with the adapter, which makes its adjustments from the last of them.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from .adapters.rows import Rows, by_layer
from .backbone.block_pool import LayerPool, attend_pool, write_blocks, write_tokens
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


class Tails(NamedTuple):
    """The last tokens of prompts, which their adapters take. Each row is another prompt."""

    tokens: Any
    """int32 [rows, W], padded on the right"""
    table: Any
    """int32 [rows, T]: the pool's blocks of each prompt. Those that a tail lies in are no other prompt's"""
    start: Any
    """int32 [rows]: the position of the tail's first token"""
    count: Any
    """int32 [rows]: real tokens; 0 for a row that is not used"""


def prefill_blocks(model, pool: Pool, lanes: Lanes) -> tuple[Pool, Float[Array, "rows vocab"]]:
    """The pool with the lanes' blocks, computed by the plain backbone, and the logits of each row's last token. For use
    inside a compiled program, which donates the pool."""
    size = lanes.tokens.shape[1]
    start, table = lanes.number * size, lanes.table[lanes.row]
    block = jnp.take_along_axis(table, lanes.number[:, None], axis=1)[:, 0]
    block = jnp.where(lanes.count > 0, block, pool[0][0].shape[0])
    tables = rotary_tables_by_kind(model.config, start[:, None] + jnp.arange(size))

    def step(x, layer, held):
        attend = attend_pool(partial(write_blocks, held, block), table, start, lanes.count, layer.kind.window)
        return layer(x, plain, tables[layer.kind.rotary], attend)

    x, kept = through_layers(model, step, model.embed(lanes.tokens), list(pool))
    return tuple(kept), model.logits(model.final_norm(x.reshape(-1, x.shape[2])[lanes.last]))


def run_tails(model, adapters: Rows, pool: Pool, tails: Tails) -> tuple[Pool, Float[Array, "rows vocab"], tuple]:
    """The pool with the tails' keys and values, the logits of each prompt's last token and, per layer, its adjustments
    in float32. For use inside a compiled program, which donates the pool.

    Args:
        adapters: of scope `response`; the adjustments of a row without one are zeros.
    """
    blocks, _, size, _ = pool[0][0].shape
    offset = jnp.arange(tails.tokens.shape[1])
    position = tails.start[:, None] + offset
    block = jnp.take_along_axis(tails.table, position // size, axis=1)
    block = jnp.where(offset < tails.count[:, None], block, blocks)
    tables, (weights, make) = rotary_tables_by_kind(model.config, position), by_layer(adapters)

    def step(x, layer, inputs):
        held, weights = inputs
        adjustment = make(weights, x, tails.count)
        write = partial(write_tokens, held, block, position % size)
        attend = attend_pool(write, tails.table, tails.start, tails.count, layer.kind.window)
        x, held = layer(x, batched_adjust(adjustment), tables[layer.kind.rotary], attend)
        return x, (held, adjustment)

    inputs = [(held, jax.tree.map(lambda a, i=i: a[i], weights)) for i, held in enumerate(pool)]
    x, kept = through_layers(model, step, model.embed(tails.tokens), inputs)
    pool, adjustments = zip(*kept, strict=True)
    last = jnp.take_along_axis(x, jnp.maximum(tails.count - 1, 0)[:, None, None], axis=1)[:, 0]
    return pool, model.logits(model.final_norm(last)), adjustments
