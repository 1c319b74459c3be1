"""Where backbone and adapters meet: adapt, forward, prefill, decode.

Each layer computes its adjustments once, from the residual stream that enters it at the prompt. The same adjustments
apply to the teacher-forced pass and to every decoded token. `decode` takes adjustments and no adapter, so neither its
cost nor its compiled program can depend on the number of tenants. Where in a row an adapter acts is its scope
(adapters/scope.py).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from ..adapters.acting import batched_adjust, carried
from ..adapters.adapter import Adapter, Adjustment, Factors, Shared, init
from ..adapters.methods import is_adapter_config, method_of
from ..adapters.rows import Adjustments, Rows, Stack, check_fits, gather, reach_of
from ..backbone.cache import attend_cached, attend_prefix, padded, with_tokens
from ..backbone.layout import stack_trees, through_layers
from ..backbone.sequences import checked_sequences, require_in_vocabulary
from ..backbone.transformer import Transformer
from ..config import SITES, ModelConfig
from ..runtime.sharding import traced_on_its_mesh
from .residual import residual_stream, rotary_tables_by_kind
from .tail import PromptStates, Tokens, tail_start, tail_stream


class DecodeState(NamedTuple):
    """What decode needs to know about the tokens so far. Each step donates it."""

    cache: tuple
    """per layer: (keys after rotary, values), each [batch, kv_heads, max_length, head_dim]"""
    adjustments: tuple
    """per layer: an Adjustment whose arrays have a leading batch axis, or a Shared one; () without adapters"""
    length: jax.Array
    """int32 [batch]: tokens in the cache"""


class StackedState(NamedTuple):
    """A DecodeState for the stacked layout: its arrays have a leading layer axis.

    decode_step updates these caches in place. It would have to stack the caches of a DecodeState at every step.
    """

    cache: tuple
    """(keys after rotary, values), each [layers, batch, kv_heads, max_length, head_dim]"""
    adjustments: Adjustment | None
    length: jax.Array
    """int32 [batch]: tokens in the cache"""


class AdaptedTransformer(nnx.Module):
    """A Transformer with an adapter at every layer. It shares the Transformer's arrays."""

    def __init__(self, backbone: Transformer, adapter: Adapter):
        self.backbone = backbone
        self.adapter = adapter

    def __call__(self, tokens, prompt_length) -> Float[Array, "batch T vocab"]:
        """Logits float32 [batch, length, vocab] of tokens int32 [batch, length], right-padded."""
        return forward(self.backbone, self.adapter, tokens, prompt_length)


def init_adapter(adapter_config, model_config: ModelConfig, *, seed: int | Int[Array, ""] = 0) -> Adapter:
    """A new adapter, which changes nothing until it is trained. Its arrays have a leading layer axis.

    >>> fresh = init_adapter(ParaConfig(r=12), model.config)
    >>> bool((forward(model, fresh, tokens, 5) == forward(model, None, tokens, 5)).all())
    True
    """
    return init(method_of(adapter_config).adapter, adapter_config, model_config, seed)


def adapt(model: Transformer, adapter) -> AdaptedTransformer:
    """`model` with an adapter at every layer; an adapter config gives a new adapter.

    >>> adapted = adapt(model, adapter)
    >>> adapted(tokens, tokens.shape[1]).shape
    (1, 5, 256)
    """
    if is_adapter_config(adapter):
        adapter = init_adapter(adapter, model.config)
    check_fits(adapter, model.config)
    return AdaptedTransformer(model, adapter)


# ----------------------------------------------------------------------------------------------------- whole sequences


@traced_on_its_mesh
def forward(
    model: Transformer, adapters: Adapter | Rows | Adjustments | None, tokens, prompt_length, length=None
) -> Float[Array, "batch T vocab"]:
    """Logits float32 [batch, T, vocab] of the teacher-forced pass.

    Args:
        adapters: None, one adapter for all rows, Rows, or Adjustments. With None, prompt_length is ignored.
        tokens: int32 [batch, T], padded on the right.
        prompt_length: int or int32 [batch]. The prompt's last token, prompt_length - 1, gives the summary; the mean
            pooler reads the whole prompt.
        length: int or int32 [batch]: each row's tokens without padding; default T. Logits at padding are finite but
            mean nothing.

    Raises ValueError for an adapter of another backbone, and unless 1 <= prompt_length <= length <= T and length is at
    most the model's positions (checked only if they are concrete).

    >>> logits = forward(model, adapter, tokens, tokens.shape[1])
    >>> logits.shape
    (1, 5, 256)
    """
    tokens, prompt_length, _ = checked(model, adapters, tokens, prompt_length, length)
    return _forward(model, adapters, tokens, prompt_length)


@traced_on_its_mesh
def hidden_states(
    model: Transformer,
    adapters: Adapter | Rows | Adjustments | None,
    tokens,
    prompt_length,
    length=None,
    *,
    all_layers: bool = False,
) -> Float[Array, "*layers batch T width"]:
    """The hidden states after the final norm, [batch, T, width]. Arguments and errors are those of forward.

    With all_layers: the residual stream that enters each layer, and the last layer's output before the final norm,
    [layers + 1, batch, T, width].

    >>> hidden_states(model, None, tokens, 5, all_layers=True).shape
    (4, 1, 5, 64)
    """
    tokens, prompt_length, _ = checked(model, adapters, tokens, prompt_length, length)
    return _hidden_states(model, adapters, tokens, prompt_length, all_layers)


@traced_on_its_mesh
def vectors(
    model: Transformer, adapters: Adapter | Rows, tokens, prompt_length
) -> dict[str, Float[Array, "layers batch out"]]:
    """The factors l as PARA defines them, {site: float32 [layers, batch, site width]}, for inspection and tests.

    >>> {site: l.shape for site, l in vectors(model, adapter, tokens, 5).items()}
    {'q_proj': (3, 1, 64), 'v_proj': (3, 1, 32), 'up_proj': (3, 1, 128)}
    """
    tokens, prompt_length, _ = checked(model, adapters, tokens, prompt_length, None)
    adjustments = _adjustments(model, adapters, tokens, prompt_length)
    if not isinstance(adjustments[0], Factors):
        kind = type(adjustments[0]).__name__
        raise ValueError(f"vectors: {kind} adjustments have no factors; give an adapter of PARA or (IA)^3")
    sites = [site for site in SITES if site in adjustments[0].distance]
    return {site: 1 + jnp.stack([a.distance[site] for a in adjustments]) for site in sites}


@traced_on_its_mesh
def adjustments_for(model: Transformer, adapters: Adapter | Rows | None, tokens, prompt_length) -> Adjustments | None:
    """The adjustments that the adapters compute from the prompts, one per row. None without adapters.

    forward, prefill and the others take them in place of adapters, also with the tokens of another prompt.
    """
    tokens, prompt_length, _ = checked(model, adapters, tokens, prompt_length, None)
    if adapters is None:
        return None
    if isinstance(adapters, Rows):
        adapters = adapters.by_row()  # decode and continue_rows take the rows apart
    return Adjustments(tuple(_adjustments(model, adapters, tokens, prompt_length)), reach_of(adapters, len(tokens)))


@traced_on_its_mesh
def multi_tenant_forward(
    model: Transformer, rows: Rows, tokens, prompt_length, length=None
) -> Float[Array, "batch T vocab"]:
    """The reference for forward with Rows: `jax.vmap` over single examples and their whole adapters. It is slow. Raises
    ValueError as forward does.

    >>> rows = pick(stack_adapters([adapter, adapter]), [1, -1])
    >>> multi_tenant_forward(model, rows, np.repeat(tokens, 2, axis=0), 5).shape
    (2, 5, 256)
    """
    tokens, prompt_length, _ = checked(model, rows, tokens, prompt_length, length)
    return _multi_tenant_forward(model, rows, tokens, prompt_length)


def right_pad(tokens, attention_mask) -> tuple[Int[Array, "batch T"], Int[Array, " batch"]]:
    """Moves each row's real tokens to the left; returns (tokens, length).

    Args:
        tokens, attention_mask: [batch, T], padded on either side.

    >>> moved, length = right_pad(np.array([[0, 0, 7, 8]]), np.array([[0, 0, 1, 1]]))
    >>> moved.tolist(), length.tolist()
    ([[7, 8, 0, 0]], [2])
    """
    mask = jnp.asarray(attention_mask) != 0
    # A stable sort keeps the order of the real tokens.
    order = jnp.argsort(~mask, axis=1, stable=True)
    kept = jnp.take_along_axis(jnp.where(mask, jnp.asarray(tokens, jnp.int32), 0), order, axis=1)
    return kept, mask.sum(axis=1).astype(jnp.int32)


# -------------------------------------------------------------------------------------------------------- step by step


@traced_on_its_mesh
def prefill(
    model: Transformer,
    adapters: Adapter | Rows | Adjustments | None,
    tokens,
    prompt_length,
    length=None,
    *,
    max_length: int,
) -> tuple[Float[Array, "batch vocab"], DecodeState]:
    """Logits float32 [batch, vocab] at each row's last token, and the state from which decode continues.

    Args:
        length: each row's tokens without padding; default prompt_length. A larger length continues a completion that
            has begun, with the factors of its prompt.
        max_length: tokens per row that the cache has room for.

    Raises ValueError as forward does, and if the tokens exceed max_length.

    >>> logits, state = prefill(model, adapter, tokens, 5, max_length=16)
    >>> logits.shape
    (1, 256)
    """
    length = prompt_length if length is None else length
    tokens, prompt_length, length = checked(model, adapters, tokens, prompt_length, length)
    if tokens.shape[1] > max_length:
        raise ValueError(f"max_length {max_length} is less than the {tokens.shape[1]} tokens of a row; raise it")
    if isinstance(adapters, Rows):
        adapters = adapters.by_row()  # decode carries an adjustment for each row
    return _prefill(model, adapters, tokens, prompt_length, length, max_length)


def decode(model: Transformer, state: DecodeState, tokens) -> tuple[Float[Array, "batch vocab"], DecodeState]:
    """Logits float32 [batch, vocab] after one more token per row, int32 [batch], and the next state.

    The given state is donated. A row that already has max_length tokens stays unchanged and gets NaN logits. Raises
    ValueError for ids on the host that the vocabulary lacks.

    >>> logits, state = prefill(model, adapter, tokens, 5, max_length=16)
    >>> logits, state = decode(model, state, logits.argmax(-1))
    >>> state.length.tolist()
    [6]
    """
    if not isinstance(tokens, jax.Array):  # a step does not wait for ids on a device
        require_in_vocabulary(np.asarray(tokens), model.config.vocab_size)
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
    keep = lambda x, kept, adjustment: adjustment  # noqa: E731
    return residual_stream(model, adapters, tokens, prompt_length, keep=keep)[1]


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
    reach = None if adapters is None else reach_of(adapters, len(tokens))

    def keep(x, kept, adjustment):
        return padded(kept, max_length), carried(adjustment, reach, x.dtype)

    x, kept = residual_stream(model, adapters, tokens, prompt_length, keep=keep)
    cache, adjustments = zip(*kept, strict=True)
    state = DecodeState(cache, adjustments if reach is not None and reach.decodes else (), length)
    return model.logits(model.final_norm(token_of(x, length - 1))), state


@partial(jax.jit, static_argnames="max_length")
def prefill_after(
    model: Transformer, adapters: Adapter | Rows, tokens, prompt_length, *, states: PromptStates, max_length: int
) -> tuple[Float[Array, "batch vocab"], DecodeState]:
    """What `prefill` gives where every row has scope `response`, from the states of the prompts. Rows of one prompt can
    be given the same states."""
    if isinstance(adapters, Rows):
        adapters = adapters.by_row()
    reach = reach_of(adapters, len(tokens))
    start = tail_start(prompt_length, reach.window)
    position = start[:, None] + jnp.arange(min(reach.window, tokens.shape[1]))
    tails = Tokens(jnp.take_along_axis(tokens, jnp.minimum(position, tokens.shape[1] - 1), axis=1), position)
    adapted = reach.acts(prompt_length, position, None) & (position < prompt_length[:, None])
    written = jnp.where(adapted, position, max_length)

    def keep(of_prompts, of_tails, adjustment):
        cache = (with_tokens(*both, written) for both in zip(padded(of_prompts, max_length), of_tails, strict=True))
        return tuple(cache), carried(adjustment, reach, model.dtype)

    prompts = Tokens(tokens, jnp.arange(tokens.shape[1]))
    x, kept = tail_stream(model, adapters, prompts, prompt_length, tails, states=states, keep=keep, remat="none")
    cache, adjustments = zip(*kept, strict=True)
    logits = model.logits(model.final_norm(token_of(x, prompt_length - 1 - start)))
    return logits, DecodeState(cache, adjustments, prompt_length)


def token_of(x, position):
    """Each row's token [batch, width] at its position, of x [batch, T, width]."""
    return jnp.take_along_axis(x, position[:, None, None], axis=1)[:, 0]


@jax.jit
def stacked_state(state: DecodeState) -> StackedState:
    adjustments = stack_trees(state.adjustments) if state.adjustments else None
    return StackedState(stack_trees(state.cache), adjustments, state.length)


def decode_step(
    model: Transformer, state: DecodeState | StackedState, tokens: Int[Array, " batch"]
) -> tuple[Float[Array, "batch vocab"], DecodeState | StackedState]:
    """decode, for use inside a larger compiled program. A model in the stacked layout also takes a StackedState."""
    if model.layout == "stacked" and isinstance(state, DecodeState):
        logits, after = decode_step(model, stacked_state(state), tokens)
        cache = tuple(jax.tree.map(lambda a, i=i: a[i], after.cache) for i in range(model.config.num_layers))
        return logits, DecodeState(cache, state.adjustments, after.length)
    max_length = jax.tree.leaves(state.cache)[0].shape[-2]
    tables = rotary_tables_by_kind(model.config, state.length[:, None])

    def apply_layer(x, layer, cache, adjustment, index=None):
        attend = attend_cached(cache, state.length, layer.kind.window, index)
        return layer(x, batched_adjust(adjustment), tables[layer.kind.rotary], attend)

    x = model.embed(tokens[:, None])
    if isinstance(state, StackedState):

        def step(x_and_cache, layer, inputs):
            x, cache = x_and_cache
            index, adjustment = inputs
            return apply_layer(x, layer, cache, adjustment, index), None

        inputs = jnp.arange(model.config.num_layers), state.adjustments
        (x, cache), _ = through_layers(model, step, (x, state.cache), inputs)
    else:
        adjustments = state.adjustments or (None,) * model.config.num_layers
        inputs = list(zip(state.cache, adjustments, strict=True))
        x, cache = through_layers(model, lambda x, layer, inputs: apply_layer(x, layer, *inputs), x, inputs)
        cache = tuple(cache)
    logits = model.logits(model.final_norm(x[:, 0]))
    full = state.length >= max_length
    logits = jnp.where(full[:, None], jnp.nan, logits)
    return logits, state._replace(cache=cache, length=jnp.where(full, state.length, state.length + 1))


_decode = jax.jit(decode_step, donate_argnums=1)


def continue_rows(
    model: Transformer, state: DecodeState, row: Int[Array, " n"], tokens: Int[Array, "n C"]
) -> Float[Array, "n C width"]:
    """The hidden states, after the final norm, of tokens that continue rows of a state: tokens[i] follows the tokens of
    row[i], with that row's adjustments. The state is unchanged. For use inside a compiled program."""
    return continued(model, state, state.length[row], tokens, attend_prefix, lambda leaf: leaf[row])[0]


def continued(model, state: DecodeState, length, tokens, attend: Callable, take: Callable = lambda leaf: leaf):
    """The hidden states, after the final norm, of tokens from position length[row] on, and what `attend` keeps of each
    layer.

    Args:
        attend: attend(cache, length, window), as in cache.py.
        take: gives the rows of `tokens` from an array of the state's rows.
    """
    tables = rotary_tables_by_kind(model.config, length[:, None] + jnp.arange(tokens.shape[1]))

    def step(x, layer, inputs):
        cache, adjustment = inputs
        if not isinstance(adjustment, Shared):
            adjustment = jax.tree.map(take, adjustment)
        own = attend(jax.tree.map(take, cache), length, layer.kind.window)
        return layer(x, batched_adjust(adjustment), tables[layer.kind.rotary], own)

    adjustments = state.adjustments or (None,) * model.config.num_layers
    x, kept = through_layers(model, step, model.embed(tokens), list(zip(state.cache, adjustments, strict=True)))
    return model.final_norm(x), kept


def checked(model, adapters, tokens, prompt_length, length) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Tokens and lengths as int32 arrays. Raises ValueError for wrong ones, and for adapters of another backbone."""
    check_fits(adapters, model.config)
    if adapters is None:
        prompt_length = length
    elif prompt_length is None:
        raise ValueError("prompt_length is missing; adapters need it")
    limits = {"vocab_size": model.config.vocab_size, "positions": model.config.max_positions}
    return checked_sequences(tokens, prompt_length, length, **limits)
