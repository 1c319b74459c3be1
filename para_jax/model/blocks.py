"""The model over blocks of keys and values (backbone/block_pool.py): prompts that are prefilled in pieces, those of the
base model and of scope `response` (adapters/scope.py), and rows that decode.

`prefill_blocks` computes some pieces, of one prompt or of several. An adapter acts on a prompt's last w tokens alone,
its tail, and makes its adjustments from the last of them. All tokens before the tail are the plain backbone's, so the
keys and values of a block without tail tokens depend on the tokens up to its end, and on nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..adapters.acting import acting, batched_adjust, plain
from ..adapters.rows import Rows, by_layer
from ..backbone.block_pool import LayerPool, attend_blocks
from ..backbone.layout import through_layers
from .adapted import DecodeState, continued
from .residual import rotary_tables_by_kind

#: Per layer: the keys and values of all blocks.
Pool = tuple[LayerPool, ...]


class Lanes(NamedTuple):
    """The pieces of prompts that one program computes. The rows are the prompts at work."""

    tokens: Any
    """int32 [lanes, t], padded on the right; t divides a block"""
    row: Any
    """int32 [lanes]: the row that a lane belongs to"""
    number: Any
    """int32 [lanes]: which piece of its prompt a lane is"""
    count: Any
    """int32 [lanes]: real tokens; 0 for a lane that is not used"""
    table: Any
    """int32 [rows, T]: the pool's blocks that hold each row's prompt, in order"""
    last: Any
    """int32 [rows]: where each prompt's last token is among all lanes' tokens; arbitrary for a prompt without it"""


class Tails(NamedTuple):
    """Which adapters act in the lanes, and where. A row is an adapter with its prompt."""

    of_lane: Any
    """int32 [lanes]: the row of the adapter that acts in a lane; -1: none"""
    start: Any
    """int32 [lanes]: the position from which it acts"""
    lane: Any
    """int32 [rows]: the lane with the prompt's last token; arbitrary if no lane has it"""
    count: Any
    """int32 [rows]: that lane's tokens, at least 1"""


def prefill_blocks(
    model, pool: Pool, lanes: Lanes, adapters: Rows | None = None, tails: Tails | None = None
) -> tuple[Pool, Float[Array, "prompts vocab"], tuple]:
    """The pool with the lanes' tokens, the logits of each prompt's last token and, per layer, the adjustments of each
    row of `tails` in float32. For use inside a compiled program, which donates the pool.

    Args:
        adapters: of scope `response`, one for each row of `tails`; the adjustments of a row without one are zeros.
        tails: None: no adapter acts.
    """
    size = lanes.tokens.shape[1]
    start, table = lanes.number * size, lanes.table[lanes.row]
    position = start[:, None] + jnp.arange(size)
    tables = rotary_tables_by_kind(model.config, position)
    weights, make = (None, lambda *_: None) if adapters is None else by_layer(adapters)

    def step(x, layer, inputs):
        held, weights = inputs
        adjust, adjustment = plain, None
        if tails is not None:
            adjustment = make(weights, x[tails.lane], tails.count)
            row = jnp.maximum(tails.of_lane, 0)
            adjust = batched_adjust(jax.tree.map(lambda a: a[row], adjustment))
            adjust = acting(adjust, (tails.of_lane >= 0)[:, None] & (position >= tails.start[:, None]))
        attend = attend_blocks(held, table, start, lanes.count, layer.kind.window, aligned=True)
        x, held = layer(x, adjust, tables[layer.kind.rotary], attend)
        return x, (held, adjustment)

    inputs = [(held, jax.tree.map(lambda a, i=i: a[i], weights)) for i, held in enumerate(pool)]
    x, kept = through_layers(model, step, model.embed(lanes.tokens), inputs)
    pool, adjustments = zip(*kept, strict=True)
    return pool, model.logits(model.final_norm(x.reshape(-1, x.shape[2])[lanes.last])), adjustments


def decode_blocks(
    model, pool: Pool, table: Int[Array, "rows T"], length: Int[Array, " rows"], adjustments: tuple, tokens
) -> tuple[Float[Array, "rows t vocab"], Pool]:
    """Logits float32 [rows, t, vocab] after t more tokens per row, int32 [rows, t], from position length[row] on, and
    the pool with them. For use inside a compiled program, which donates the pool. The next tokens may be written over
    these. What lies beyond a row's table is not kept."""
    count = jnp.full_like(length, tokens.shape[1])
    attend = lambda held, length, window: attend_blocks(held, table, length, count, window, aligned=False)  # noqa: E731
    hidden, kept = continued(model, DecodeState(pool, adjustments, length), length, tokens, attend)
    return model.logits(hidden), tuple(kept)
