"""One compiled training step. Gradients and optimiser state are those of the adapter; the backbone is an argument and
stays."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..adapters.adapter import Adapter
from ..config import TrainSection
from ..data.batches import Batch
from ..data.packing import Packed
from ..model import residual_stream
from .loss import completion_nll, completion_states, of_logits, token_scores
from .optimizer import make_optimizer, make_schedule


class TrainState(NamedTuple):
    adapter: Any
    """an Adapter: Flax modules are trees of arrays, which optax takes, but whose type it does not know"""
    optimizer: optax.OptState
    step: jax.Array
    """int32, optimiser steps done"""


def init_state(adapter: Any, config: TrainSection, total_steps: int) -> TrainState:
    return TrainState(adapter, make_optimizer(config, total_steps).init(adapter), jnp.int32(0))


@partial(jax.jit, static_argnames=("completion", "config", "total_steps"), donate_argnames="state")
def train_step(
    state: TrainState, model, batch: Batch | Packed, *, completion: int, config: TrainSection, total_steps: int
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after one optimiser step, and loss (nats a token), grad_norm (before clipping), learning_rate and
    tokens (completion tokens in the loss).

    The loss is the mean over all completion tokens of the step, also where it is made in several passes. The given
    state is donated.

    Args:
        batch: its arrays lead with the passes (gradient accumulation): tokens int32 [passes, rows, T].
        completion: the most completion tokens of a row.
    """

    def summed_nll(adapter, part):
        total, count = completion_nll(model, adapter, part, completion, remat=config.remat)
        return total.sum(), count.sum()

    def accumulate(sums, part):
        (total, count), gradient = jax.value_and_grad(summed_nll, has_aux=True)(state.adapter, part)
        return jax.tree.map(jnp.add, sums, (total, count, gradient)), None

    zero = (jnp.float32(0), jnp.float32(0), jax.tree.map(jnp.zeros_like, state.adapter))
    if batch.tokens.shape[0] == 1:
        total, count, gradient = accumulate(zero, jax.tree.map(lambda a: a[0], batch))[0]
    else:
        (total, count, gradient), _ = jax.lax.scan(accumulate, zero, batch)
    count = jnp.maximum(count, 1)
    gradient = jax.tree.map(lambda g: g / count, gradient)
    update, optimizer = make_optimizer(config, total_steps).update(gradient, state.optimizer, state.adapter)
    values = {
        "loss": total / count,
        "grad_norm": optax.tree.norm(gradient),
        "learning_rate": jnp.asarray(make_schedule(config, total_steps)(state.step), jnp.float32),
        "tokens": count,
    }
    return TrainState(optax.apply_updates(state.adapter, update), optimizer, state.step + 1), values


@partial(jax.jit, static_argnames="completion")
def eval_nll(model, adapters, batch: Batch, *, completion: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """completion_nll, compiled: each row's summed nats and its number of completion tokens; and whether each of these
    is the likeliest, bool [rows]: then greedy decoding writes the completion."""
    hidden, targets, real = completion_states(model, adapters, batch, completion)
    nll, likeliest = of_logits(token_scores, model, hidden, targets)
    counts = real.sum(axis=1).astype(jnp.float32)
    return jnp.where(real, nll, 0).sum(axis=1), counts, (likeliest | ~real).all(axis=1)


@jax.jit
def prompt_summaries(model, batch: Batch, adapter: Adapter) -> jax.Array:
    """The summaries that the backbone alone gives an adapter's pooler, float32 [layers, rows, width]."""
    pool = jax.vmap(lambda x, length: adapter.pool(x, length))
    _, summaries = residual_stream(
        model, None, batch.tokens, batch.prompt_length, keep=lambda x, kept, adjustment: pool(x, batch.prompt_length)
    )
    return jnp.stack(summaries).astype(jnp.float32)


def standardise(model, adapter: Adapter, batches: list[Batch], count: int) -> Adapter:
    """The adapter with the statistics of training prompts: the first `count` rows of the batches. The other rows only
    fill up the last batch."""
    summaries = jnp.concatenate([prompt_summaries(model, batch, adapter) for batch in batches], axis=1)[:, :count]
    return adapter.with_statistics(summaries)
