"""The residual stream of whole sequences, through every layer of a backbone with adapters.

Each layer makes its adjustments from the stream that enters it at the prompt, as the layers below have adjusted it.
They act where their adapter's scope says (adapters/scope.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from ..adapters.acting import acting, batched_adjust
from ..adapters.rows import by_layer, reach_of
from ..adapters.segments import Segments
from ..backbone.kernels import self_attention
from ..backbone.layout import through_layers
from ..backbone.rotary import rotary_tables
from ..config import ModelConfig

#: What the forward pass saves of a layer for the backward pass, besides its input: everything; the outputs of its
#: linears (recomputing attention weights and elementwise operations is cheaper than storing them); nothing.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda step: step,
    "dots": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "block": jax.checkpoint,
}


def residual_stream(
    model,
    adapters,
    tokens,
    prompt_length,
    *,
    segments: Segments | None = None,
    keep: Callable | None = None,
    remat: str = "dots",
):
    """The residual stream [batch, T, width] before the final norm, and a list with keep's result for each layer.

    Args:
        prompt_length: int32 [batch]; for packed rows [batch, segments].
        segments: for packed rows; adjustments then have leading axes [batch, segments].
        keep: keep(x that entered the layer, (keys, values), float32 adjustment); default: keeps nothing.
        remat: a key of REMAT.
    """
    position = segments.position if segments else jnp.arange(tokens.shape[1])
    tables = rotary_tables_by_kind(model.config, position)
    segment = segments.segment if segments else None
    attend = self_attention(model.config, model.dtype, tokens.shape[1], segment, model.attention)
    if adapters is None:
        acts, weights, make = True, None, lambda *_: None
    else:
        reach, (weights, make) = reach_of(adapters, len(tokens)), by_layer(adapters)
        # True spares the choice between adapted and plain outputs at every site.
        acts = reach.everywhere or reach.acts(prompt_length, position, segments)
    starts = [segments.start] if segments else []

    def step(x, layer, weights):
        adjustment = make(weights, x, prompt_length, *starts)
        adjust = acting(batched_adjust(adjustment, segments), acts)
        out, kept = layer(x, adjust, tables[layer.kind.rotary], attend[layer.kind.window])
        return out, keep(x, kept, adjustment) if keep else None

    return through_layers(model, REMAT[remat](step), model.embed(tokens), weights)


def rotary_tables_by_kind(config: ModelConfig, positions: jax.Array) -> dict:
    """The rotary tables of every kind of layer, each computed once."""
    rotaries = dict.fromkeys(kind.rotary for kind in config.kinds)
    return {rotary: rotary_tables(rotary, positions) for rotary in rotaries}
