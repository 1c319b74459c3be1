"""Where backbone and adapters meet: adapt, forward, prefill, decode.

A layer's adjustments are made from the residual stream that enters it, at the prompt, once; the same adjustments
serve the teacher-forced pass and every decoded token. `decode` takes adjustments and no adapter: neither its cost nor
its compiled program can depend on the number of tenants.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer
from jaxtyping import Array, Float, Int

from .adapters.adapter import Adapter, Adjustment, Factors, Shared, init
from .adapters.methods import METHODS
from .adapters.rows import Made, Rows, Stack, by_layer, check_fits, gather
from .adapters.segments import adjust_segments
from .backbone.cache import attend_cached, attend_prefix, padded
from .backbone.kernels import self_attention
from .backbone.rotary import rotary_tables
from .backbone.transformer import Transformer, periods
from .config import SITES, ModelConfig

#: What the backward pass keeps of a layer, beside its input: everything; the outputs of its linears (attention weights
#: and everything elementwise are made anew, which costs less than storing them); nothing.
REMAT: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda step: step,
    "dots": partial(jax.checkpoint, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable),
    "block": jax.checkpoint,
}


class Segments(NamedTuple):
    """Where the examples of packed rows stand."""

    segment: jax.Array
    """int32 [rows, T]: each token's segment; -1 is padding"""
    start: jax.Array
    """int32 [rows, segments]: where a segment's first token stands"""

    @property
    def position(self) -> Int[Array, "rows T"]:
        """Each token's place in its segment."""
        start = jnp.take_along_axis(self.start, jnp.maximum(self.segment, 0), axis=1)
        return jnp.arange(self.segment.shape[1]) - jnp.where(self.segment < 0, 0, start)


class DecodeState(NamedTuple):
    """What decode needs of the tokens so far. Donated at each step."""

    cache: tuple
    """a layer: (keys after rotary, values), each [batch, kv_heads, max_length, head_dim]"""
    adjustments: tuple
    """a layer: an Adjustment whose arrays lead with the batch, or that is Shared; () without adapters"""
    length: jax.Array
    """int32 [batch], tokens held"""


class StackedState(NamedTuple):
    """A DecodeState of a model in the stacked layout, whose caches and adjustments are one array for all layers and
    lead with them. Each step of decode_step writes into these caches; those of a DecodeState it would have to stack."""

    cache: tuple
    """(keys after rotary, values), each [layers, batch, kv_heads, max_length, head_dim]"""
    adjustments: Adjustment | None
    length: jax.Array
    """int32 [batch], tokens held"""


class AdaptedTransformer(nnx.Module):
    """The same Transformer, its arrays shared, with an adapter at every layer."""

    def __init__(self, backbone: Transformer, adapter: Adapter):
        self.backbone = backbone
        self.adapter = adapter

    def __call__(self, tokens, prompt_length) -> Float[Array, "batch T vocab"]:
        """Logits float32 [batch, length, vocab] of tokens int32 [batch, length], right-padded."""
        return forward(self.backbone, self.adapter, tokens, prompt_length)


def init_adapter(adapter_config, model_config: ModelConfig, *, seed: int = 0) -> Adapter:
    """A fresh adapter: exactly the backbone until it is trained. Its arrays lead with the layers."""
    return init(METHODS[type(adapter_config)], adapter_config, model_config, seed)


def adapt(model: Transformer, adapter) -> AdaptedTransformer:
    """The transform: `model` with an adapter (or a fresh one of an adapter config) at every layer."""
    if type(adapter) in METHODS:
        adapter = init_adapter(adapter, model.config)
    check_fits(adapter, model.config)
    return AdaptedTransformer(model, adapter)


# ----------------------------------------------------------------------------------------------------- whole sequences


def forward(
    model: Transformer, adapters: Adapter | Rows | Made | None, tokens, prompt_length, length=None
) -> Float[Array, "batch T vocab"]:
    """Logits float32 [batch, T, vocab] of the teacher-forced pass.

    Args:
        adapters: None (prompt_length is ignored), one adapter for every row, or Rows.
        tokens: int32 [batch, T], padded on the right.
        prompt_length: int or int32 [batch]; the summary is taken at prompt_length - 1 (mean, max: over the prompt).
        length: int or int32 [batch], a row's real tokens; default T. Logits at padding are finite, no more.

    Raises ValueError unless 1 <= prompt_length <= length <= T, where they are concrete, or for a foreign adapter.
    """
    tokens, prompt_length, _ = checked(model, adapters, tokens, prompt_length, length)
    return _forward(model, adapters, tokens, prompt_length)


def hidden_states(
    model: Transformer,
    adapters: Adapter | Rows | Made | None,
    tokens,
    prompt_length,
    length=None,
    *,
    all_layers: bool = False,
) -> Float[Array, "*layers batch T width"]:
    """The hidden states after the final norm [batch, T, width]; all_layers: the residual stream that enters each
    layer, and the last layer's output before the final norm, [layers + 1, batch, T, width]. Arguments and errors as
    in forward."""
    tokens, prompt_length, _ = checked(model, adapters, tokens, prompt_length, length)
    return _hidden_states(model, adapters, tokens, prompt_length, all_layers)


def vectors(
    model: Transformer, adapters: Adapter | Rows, tokens, prompt_length
) -> dict[str, Float[Array, "layers batch out"]]:
    """The factors l themselves, {site: float32 [layers, batch, site width]}, for looking and for tests."""
    tokens, prompt_length, _ = checked(model, adapters, tokens, prompt_length, None)
    adjustments = _adjustments(model, adapters, tokens, prompt_length)
    if not isinstance(adjustments[0], Factors):
        raise ValueError(f"vectors: {type(adjustments[0]).__name__} adjustments are not factors")
    sites = [site for site in SITES if site in adjustments[0].distance]
    return {site: 1 + jnp.stack([a.distance[site] for a in adjustments]) for site in sites}


def made_for(model: Transformer, adapters: Adapter | Rows | None, tokens, prompt_length) -> Made | None:
    """The adjustments that the adapters make of prompts, one a row, to be given to forward, prefill and others in the
    place of the adapters, whatever tokens these then read. None without adapters."""
    tokens, prompt_length, _ = checked(model, adapters, tokens, prompt_length, None)
    return None if adapters is None else Made(tuple(_adjustments(model, adapters, tokens, prompt_length)))


def multi_tenant_forward(
    model: Transformer, rows: Rows, tokens, prompt_length, length=None
) -> Float[Array, "batch T vocab"]:
    """forward, written the plain way, as the reference: `jax.vmap` over single examples and their adapter weights,
    with the backbone unmapped. It gathers every row's whole adapter."""
    tokens, prompt_length, _ = checked(model, rows, tokens, prompt_length, length)
    return _multi_tenant_forward(model, rows, tokens, prompt_length)


def right_pad(tokens, attention_mask) -> tuple[Int[Array, "batch T"], Int[Array, " batch"]]:
    """(tokens, length) with every row's real tokens moved to the left: tokens and mask [batch, T], padded on any
    side."""
    mask = jnp.asarray(attention_mask) != 0
    order = jnp.argsort(~mask, axis=1, stable=True)
    kept = jnp.take_along_axis(jnp.where(mask, jnp.asarray(tokens), 0), order, axis=1)
    return kept.astype(jnp.int32), mask.sum(axis=1).astype(jnp.int32)


# -------------------------------------------------------------------------------------------------------- step by step


def prefill(
    model: Transformer, adapters: Adapter | Rows | Made | None, tokens, prompt_length, length=None, *, max_length: int
) -> tuple[Float[Array, "batch vocab"], DecodeState]:
    """Logits float32 [batch, vocab] at each row's last token, and the state from which decode goes on.

    Args:
        length: a row's real tokens; default prompt_length. A larger one continues a started completion with the
        factors of
            its prompt.
        max_length: tokens a row that the cache holds.

    Raises ValueError as forward does, and where the tokens do not fit max_length.
    """
    tokens, prompt_length, length = checked(
        model, adapters, tokens, prompt_length, prompt_length if length is None else length
    )
    if tokens.shape[1] > max_length:
        raise ValueError(f"max_length: {max_length} is less than the {tokens.shape[1]} tokens given")
    if isinstance(adapters, Rows):
        adapters = adapters.by_row()  # decode carries an adjustment for each row
    return _prefill(model, adapters, tokens, prompt_length, length, max_length)


def decode(model: Transformer, state: DecodeState, tokens) -> tuple[Float[Array, "batch vocab"], DecodeState]:
    """Logits float32 [batch, vocab] after one more token a row, int32 [batch], and the next state.

    The state that is given is donated. A row that holds max_length tokens writes nothing and gives NaN logits.
    """
    return _decode(model, state, jnp.asarray(tokens, jnp.int32))


# -------------------------------------------------------------------------------------------------------- the programs


@jax.jit
def _forward(model, adapters, tokens, prompt_length):
    return model.logits(model.final_norm(residual_stream(model, adapters, tokens, prompt_length)[0]))


@partial(jax.jit, static_argnums=4)
def _hidden_states(model, adapters, tokens, prompt_length, all_layers):
    x, entered = residual_stream(
        model, adapters, tokens, prompt_length, keep=(lambda x, kept, adjustment: x) if all_layers else None
    )
    return jnp.stack([*entered, x]) if all_layers else model.final_norm(x)


@jax.jit
def _adjustments(model, adapters, tokens, prompt_length):
    return residual_stream(model, adapters, tokens, prompt_length, keep=lambda x, kept, adjustment: adjustment)[1]


@jax.jit
def _multi_tenant_forward(model, rows, tokens, prompt_length):
    rows = rows.by_row()

    def alone(adapters, index, tokens, prompt_length):
        one = tuple(Stack(jax.tree.map(lambda leaf: leaf[None], adapter)) for adapter in adapters)
        x, _ = residual_stream(model, Rows(one, jnp.minimum(index, 0)[:, None]), tokens[None], prompt_length[None])
        return model.logits(model.final_norm(x))[0]

    gathered = [gather(stack.adapters, index) for stack, index in zip(rows.stacks, rows.index, strict=True)]
    return jax.vmap(alone)(gathered, rows.index.T, tokens, prompt_length)


@partial(jax.jit, static_argnums=5)
def _prefill(model, adapters, tokens, prompt_length, length, max_length):
    def keep(x, kept, adjustment):
        return padded(kept, max_length), cast(adjustment, x.dtype)

    x, kept = residual_stream(model, adapters, tokens, prompt_length, keep=keep)
    last = jnp.take_along_axis(x, (length - 1)[:, None, None], axis=1)[:, 0]
    adjustments = () if adapters is None else tuple(adjustment for _, adjustment in kept)
    return model.logits(model.final_norm(last)), DecodeState(tuple(cache for cache, _ in kept), adjustments, length)


@partial(jax.jit, donate_argnums=1)
def _decode(model, state, tokens):
    return decode_step(model, state, tokens)


@jax.jit
def stacked_state(state: DecodeState) -> StackedState:
    return StackedState(stacked(state.cache), stacked(state.adjustments) if state.adjustments else None, state.length)


def decode_step(
    model: Transformer, state: DecodeState | StackedState, tokens: Int[Array, " batch"]
) -> tuple[Float[Array, "batch vocab"], DecodeState | StackedState]:
    """decode, to be used inside a larger compiled program; in the stacked layout, of a StackedState too."""
    if model.layout == "stacked" and isinstance(state, DecodeState):
        logits, after = decode_step(model, stacked_state(state), tokens)
        cache = tuple(jax.tree.map(lambda a, i=i: a[i], after.cache) for i in range(model.config.num_layers))
        return logits, DecodeState(cache, state.adjustments, after.length)
    max_length = jax.tree.leaves(state.cache)[0].shape[-2]
    tables = tables_of(model.config, state.length[:, None])

    def through(x, layer, cache, adjustment, index=None):
        attend = attend_cached(cache, state.length, layer.kind.window, index)
        return layer(x, batched_adjust(adjustment), tables[layer.kind.rotary], attend)

    x = model.embed(tokens[:, None])
    if isinstance(state, StackedState):

        def step(x_and_cache, layer, inputs):
            x, cache = x_and_cache
            index, adjustment = inputs
            return through(x, layer, cache, adjustment, index), None

        inputs = jnp.arange(model.config.num_layers), state.adjustments
        (x, cache), _ = through_layers(model, step, (x, state.cache), inputs)
    else:
        adjustments = state.adjustments or (None,) * model.config.num_layers
        inputs = list(zip(state.cache, adjustments, strict=True))
        x, cache = through_layers(model, lambda x, layer, inputs: through(x, layer, *inputs), x, inputs)
        cache = tuple(cache)
    logits = model.logits(model.final_norm(x[:, 0]))
    full = state.length >= max_length
    logits = jnp.where(full[:, None], jnp.nan, logits)
    return logits, state._replace(cache=cache, length=jnp.where(full, state.length, state.length + 1))


def continue_rows(
    model: Transformer, state: DecodeState, row: Int[Array, " n"], tokens: Int[Array, "n C"]
) -> Float[Array, "n C width"]:
    """The hidden states, after the final norm, of tokens that continue rows of a state: tokens[i] goes on after what
    row[i] of it holds, with that row's adjustments. The state stays as it is. For use inside a compiled program."""
    length = state.length[row]
    tables = tables_of(model.config, length[:, None] + jnp.arange(tokens.shape[1]))

    def step(x, layer, inputs):
        cache, adjustment = inputs
        cache = jax.tree.map(lambda a: a[row], cache)
        if not isinstance(adjustment, Shared):
            adjustment = jax.tree.map(lambda a: a[row], adjustment)
        attend = attend_prefix(cache, length, layer.kind.window)
        return layer(x, batched_adjust(adjustment), tables[layer.kind.rotary], attend)

    adjustments = state.adjustments or (None,) * model.config.num_layers
    x, _ = through_layers(model, step, model.embed(tokens), list(zip(state.cache, adjustments, strict=True)))
    return model.final_norm(x)


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
    """The residual stream [batch, T, width] before the final norm, and a list over layers of what
    keep(x that entered, (keys, values), float32 adjustment) gives; [None, ...] without `keep`.

    Args:
        prompt_length: int32 [batch]; of packed rows [batch, segments].
        segments: of packed rows; adjustments then lead with [batch, segments].
        remat: a name of REMAT.
    """
    positions = segments.position if segments else jnp.arange(tokens.shape[1])
    tables = tables_of(model.config, positions)
    segment = segments.segment if segments else None
    attend = self_attention(model.config, model.dtype, tokens.shape[1], segment, model.attention)
    weights, make = (None, lambda *_: None) if adapters is None else by_layer(adapters)

    def step(x, layer, weights):
        adjustment = make(weights, x, prompt_length, *([segments.start] if segments else []))
        adjust = batched_adjust(adjustment, segments)
        out, kept = layer(x, adjust, tables[layer.kind.rotary], attend[layer.kind.window])
        return out, keep(x, kept, adjustment) if keep else None

    return through_layers(model, REMAT[remat](step), model.embed(tokens), weights)


def tables_of(config: ModelConfig, positions: jax.Array) -> dict:
    """The rotary tables of every kind of layer, each made once."""
    rotaries = dict.fromkeys(kind.rotary for kind in config.kinds)
    return {rotary: rotary_tables(rotary, positions) for rotary in rotaries}


def through_layers(model: Transformer, step: Callable, x, inputs) -> tuple[Any, list]:
    """x after step(x, layer, a layer's inputs) -> (x, output) of every layer in order, and the outputs as a list; x may
    be any tree.

    Args:
        inputs: a list over layers, or a tree whose arrays lead with the layers.
    """
    run = {"layers": one_by_one, "stacked": by_scan}[model.layout]
    return run(model, step, x, inputs)


def one_by_one(model, step, x, inputs):
    outputs = []
    for i, layer in enumerate(model.layers):
        x, output = step(x, layer, inputs[i] if isinstance(inputs, list) else jax.tree.map(lambda a, i=i: a[i], inputs))
        outputs.append(output)
    return x, outputs


def by_scan(model, step, x, inputs):
    if isinstance(inputs, list):
        inputs = stacked(inputs)
    outputs: list = [None] * model.config.num_layers
    for (start, period, repeats), group in zip(periods(model.config.kinds), model.layers, strict=True):
        stop = start + period * repeats
        of_position = [strided(inputs, start + j, stop, period) for j in range(period)]
        x, kept = jax.lax.scan(partial(one_period, step), x, (list(group), of_position))
        for j in range(period):
            for i in range(repeats):
                outputs[start + i * period + j] = jax.tree.map(lambda a, i=i: a[i], kept[j])
    return x, outputs


def stacked(layers):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def strided(inputs, start: int, stop: int, period: int):
    return jax.tree.map(lambda a: a[start:stop:period], inputs)


def one_period(step, x, layers_and_inputs):
    outputs = []
    for layer, inputs in zip(*layers_and_inputs, strict=True):
        x, output = step(x, layer, inputs)
        outputs.append(output)
    return x, outputs


def batched_adjust(adjustment: Adjustment | None, segments: Segments | None = None) -> Callable:
    """adjust(site, x, y) over a batch, from an adjustment whose arrays lead with the batch, or that is Shared."""
    if adjustment is None:
        return lambda site, x, y: y
    if isinstance(adjustment, Shared):
        return adjustment.adjust
    if segments is not None:
        return adjust_segments(adjustment, segments.segment)
    return lambda site, x, y: jax.vmap(lambda a, x, y: a.adjust(site, x, y))(adjustment, x, y)


def cast(adjustment, dtype):
    """What decode carries: the adjustment in the compute dtype. In the teacher-forced pass, `adjust` rounds to the same
    dtype, just before it applies them, so that their gradients stay float32."""
    return jax.tree.map(lambda a: a.astype(dtype), adjustment)


def checked(model, adapters, tokens, prompt_length, length) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens and lengths as int32 arrays, checked where they are concrete."""
    check_fits(adapters, model.config)
    if np.ndim(tokens) != 2 or not jnp.issubdtype(jnp.result_type(tokens), jnp.integer):
        raise ValueError(
            f"tokens: shape {np.shape(tokens)}; expected whole numbers [batch, length], padded on the right"
        )
    batch, total = np.shape(tokens)
    prompt_length = total if adapters is None and prompt_length is None else prompt_length
    length = total if length is None else length
    lengths = []
    for name, value in (("prompt_length", prompt_length), ("length", length)):
        if np.ndim(value) > 1 or (np.ndim(value) == 1 and np.shape(value) != (batch,)):
            raise ValueError(
                f"{name}: shape {np.shape(value)}; expected one whole number, or one for each of the {batch} rows"
            )
        lengths.append(value)
    concrete = [value for value in lengths if not isinstance(value, Tracer)]
    if len(concrete) == 2:
        shortest, longest = np.broadcast_arrays(*map(np.asarray, lengths))
        if (shortest < 1).any() or (shortest > longest).any() or (longest > total).any():
            raise ValueError(
                f"prompt_length {np.asarray(prompt_length).tolist()}, length {np.asarray(length).tolist()}: "
                f"expected 1 <= prompt_length <= length <= {total}, the tokens given"
            )
    if (
        isinstance(tokens, np.ndarray)
        and tokens.size
        and not (0 <= tokens.min() and tokens.max() < model.config.vocab_size)
    ):
        raise ValueError(f"tokens: ids {tokens.min()} to {tokens.max()}; expected 0 to {model.config.vocab_size - 1}")
    prompt_length, length = (jnp.broadcast_to(jnp.asarray(value, jnp.int32), (batch,)) for value in lengths)
    return jnp.asarray(tokens, jnp.int32), prompt_length, length
