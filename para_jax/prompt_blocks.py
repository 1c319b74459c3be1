"""Prompts prefilled in blocks of tokens: those of the base model and of scope `response` (adapters/scope.py).

They run through the plain backbone, so the keys and values of a block depend on the tokens up to its end, and on
nothing else. `prefill_blocks` computes some blocks, of one prompt or of several. It is the same program for the base
model and for every tenant. An adapter's tail follows: `tail_states` takes a prompt's last w tokens as ordinary steps
with the adapter, which makes its adjustments from the last of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

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


class Tails(NamedTuple):
    """The last tokens of prompts, which their adapters take. The rows may be of several prompts."""

    tokens: Any
    """int32 [rows, W]: the last W tokens, padded on the left"""
    table: Any
    """int32 [rows, T]: the pool's blocks that hold each prompt's tokens, at least those before its tail"""
    length: Any
    """int32 [rows]: tokens of each prompt"""
    adapted: Any
    """int32 [rows]: how many of the last tokens are adapted: at most W, and at most `length`"""


def prefill_blocks(model, pool: Pool, lanes: Lanes) -> tuple[Pool, Float[Array, "rows vocab"]]:
    """The pool with the lanes' blocks, computed by the plain backbone, and the logits of each row's last token. For use
    inside a compiled program, which donates the pool."""
    size = lanes.tokens.shape[1]
    start, table = lanes.number * size, lanes.table[lanes.row]
    block = jnp.take_along_axis(table, lanes.number[:, None], axis=1)[:, 0]
    block = jnp.where(lanes.count > 0, block, pool[0][0].shape[0])
    tables = rotary_tables_by_kind(model.config, start[:, None] + jnp.arange(size))

    def step(x, layer, held):
        attend = attend_blocks(held, block, table, start, lanes.count, layer.kind.window)
        return layer(x, plain, tables[layer.kind.rotary], attend)

    x, kept = through_layers(model, step, model.embed(lanes.tokens), list(pool))
    return tuple(kept), model.logits(model.final_norm(x.reshape(-1, x.shape[2])[lanes.last]))


def tail_states(model, adapters: Rows, pool: Pool, tails: Tails) -> tuple[Float[Array, "rows vocab"], tuple, tuple]:
    """The logits of each row's last token and, per layer, the adjustments in float32 and the keys and values of the
    tails, [rows, kv_heads, W, head_dim]. For use inside a compiled program.

    Args:
        adapters: of scope `response`; a row without one has adjustments of zeros.
    """
    rows, size = tails.tokens.shape
    position = jnp.maximum(tails.length[:, None] - size + jnp.arange(size), 0)
    tables = rotary_tables_by_kind(model.config, position)
    weights, make = by_layer(adapters)

    def step(x, layer, inputs):
        held, weights = inputs
        adjustment = make(weights, x, jnp.full(rows, size))
        attend = attend_window(held, tails.table, tails.length, tails.adapted, layer.kind.window)
        x, new = layer(x, batched_adjust(adjustment), tables[layer.kind.rotary], attend)
        return x, (adjustment, new)

    inputs = [(held, jax.tree.map(lambda a, i=i: a[i], weights)) for i, held in enumerate(pool)]
    x, kept = through_layers(model, step, model.embed(tails.tokens), inputs)
    adjustments, new = zip(*kept, strict=True)
    return model.logits(model.final_norm(x[:, -1])), adjustments, new
