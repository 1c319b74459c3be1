"""One compiled training step for the adapters of one or many tenants: one batch, one pass through the frozen backbone,
and gradients that land in each tenant's slice. A tenant's step never changes another tenant's weights or moments."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec

from ..adapters.adapter import Adapter
from ..adapters.rows import Rows, Stack, group_of_tenant, layers_first, of_tenants
from ..config import TrainSection
from ..data.batches import Batch
from ..data.packing import Packed
from ..model.tail import PromptStates
from ..runtime.sharding import constrain_tenants, replicate, tenants_sharding
from .loss import completion_nll, completion_states, of_logits, token_scores
from .optimizer import LearningRates, clipped, learning_rates, make_direction


class TrainState(NamedTuple):
    """Adapters and optimiser state. Every array leads with the slots, which hold one tenant each. A mesh splits a stack
    of one by the names of its axes, a larger one along the slots (`sharding.place_tenants`)."""

    adapters: Any
    """an Adapter, whose arrays lead with (slots, layers)"""
    optimizer: optax.OptState
    step: jax.Array
    """int32 [slots], each tenant's own optimiser steps done"""
    finite: jax.Array
    """bool [slots]: false once a loss, gradient or new weight was not finite. Such a tenant is no longer trained"""


@partial(jax.jit, static_argnames="config")
def init_state(adapters: Any, config: TrainSection) -> TrainState:
    """The state of a fresh Adapter whose arrays lead with (slots, layers)."""
    slots = jax.tree.leaves(adapters)[0].shape[0]
    optimizer = jax.vmap(make_direction(config).init)(adapters)
    return constrain_tenants(TrainState(adapters, optimizer, jnp.zeros(slots, jnp.int32), jnp.ones(slots, bool)))


@partial(jax.jit, static_argnames=("completion", "prompt", "config", "many"), donate_argnames="state")
def train_step(
    state: TrainState,
    model,
    batch: Batch | Packed,
    tenant_of_group: jax.Array,
    rates: LearningRates,
    states: PromptStates | None = None,
    *,
    completion: int,
    prompt: int | None = None,
    config: TrainSection,
    many: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after one optimiser step of each tenant in the batch. Also a value per slot of: loss (nats per token),
    grad_norm (before clipping), learning_rate, tokens (completion tokens in the loss) and finite.

    A tenant's loss is the mean over its own completion tokens of all passes. Its gradient is clipped by its own norm,
    and its learning rate follows its own steps. A tenant without rows keeps its weights, moments and step. One whose
    loss, gradient or new weights are not finite keeps its weights from then on. The given state is donated.

    On a mesh each device updates its own tenants. It receives the weights of the batch's other tenants one layer at a
    time, and sends back their gradients: the partitioner turns indexing along the split axis into a sum over the
    devices with one nonzero term. The bytes don't grow with the tenants (tests/training/test_tenant_meshes.py).

    Args:
        batch: its arrays lead with the passes (gradient accumulation): tokens int32 [passes, rows, T].
        tenant_of_group: int32 [passes, groups], the slot of each group of consecutive rows; -1 for padding rows, which
            have no completion token. A slot has at most one group per pass.
        states: of the prompts, with leading passes (train.cache_prompts); None: the step computes them.
        completion, prompt: the maximum number of completion tokens, and of prompt tokens, in a row; None: a whole row.
        many: other tenants go on when one is not finite. Without it, new weights in a stack of one are not checked.
    """
    weights, summed_nll = (sums_of_one if state.step.shape[0] == 1 else sums_of_many)(state.adapters)

    def accumulate(sums, of_pass):
        part, index, states = of_pass
        nll = partial(completion_nll, model, completion=completion, prompt=prompt, states=states, remat=config.remat)
        (_, found), gradient = jax.value_and_grad(summed_nll, has_aux=True)(weights, nll, part, index)
        return jax.tree.map(jnp.add, sums, (found, gradient)), None

    nothing = jnp.zeros(state.step.shape)
    zero = ((nothing, nothing), jax.tree.map(jnp.zeros_like, weights))
    passes = batch, tenant_of_group, states
    if batch.tokens.shape[0] == 1:
        sums, _ = accumulate(zero, jax.tree.map(lambda a: a[0], passes))
    else:
        sums, _ = jax.lax.scan(accumulate, zero, passes)
    (total, tokens), gradient = sums
    if state.step.shape[0] == 1:
        return updated_alone(state, gradient, total, tokens, rates, config=config, many=many)
    state, values = by_device(partial(updated, config=config))(state, gradient, total, tokens, rates)
    return constrain_tenants(state), replicate(values)


def state_of_one(adapter: Adapter, config: TrainSection) -> TrainState:
    """The state of a single fresh adapter, for `step_of_one`."""
    return init_state(jax.tree.map(lambda leaf: leaf[None], adapter), config)


def step_of_one(
    state: TrainState,
    model,
    batch: Batch | Packed,
    *,
    completion: int,
    prompt: int | None = None,
    config: TrainSection,
    total_steps: int,
    states: PromptStates | None = None,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """train_step for a single adapter, for training loops other than a run's."""
    index, rates = np.zeros((len(batch.tokens), 1), np.int32), learning_rates([config], [total_steps])
    return train_step(state, model, batch, index, rates, states, completion=completion, prompt=prompt, config=config)


# ------------------------------------------------------------------------------------------------------------ gradients


def sums_of_one(adapters: Adapter) -> tuple[Adapter, Callable]:
    """The weights of the only slot, and a function from them to a batch's summed loss, as `sums_of_many` gives them.
    All rows use this adapter: padding rows have no token in the loss."""

    def summed_nll(adapter, nll, part, index):
        total, tokens = (a.sum() for a in nll(adapter, part))
        return total, (total[None], tokens[None])

    return jax.tree.map(lambda leaf: leaf[0], adapters), summed_nll


def sums_of_many(adapters: Adapter) -> tuple[Adapter, Callable]:
    """The weights of all slots with arrays that lead with (layers, slots), as a scan over the layers takes them. Also a
    function from them to a batch's summed loss, and each slot's loss and tokens, float32 [slots]."""

    def summed_nll(weights, nll, part, index):
        stack = Stack(layers_first(constrain_tenants(weights, axis=1)))  # swaps the two axes back; XLA drops both swaps
        each = part.tokens.shape[0] // index.shape[0]
        found = nll(Rows((stack,), index[None], each, distinct=True), part)
        group = group_of_tenant(index, stack.size)
        return found[0].sum(), tuple(of_tenants(a.reshape(-1, each).sum(axis=1), group) for a in found)

    return layers_first(adapters), summed_nll


# -------------------------------------------------------------------------------------------------------------- updates


def updated_alone(
    state: TrainState,
    gradient: Any,
    total: jax.Array,
    tokens: jax.Array,
    rates: LearningRates,
    *,
    config: TrainSection,
    many: bool,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """`updated` for a stack of one, without its loop and without a choice between two states, for which compilers copy
    arrays. If the loss or gradient is not finite, the step has a gradient and a rate of zero: the weights stay, and the
    moments, which are not used again, decay. New weights are checked in a run of many: it goes on with the others. In a
    run of one, weights that overflow end it with the next loss."""
    rate, count = rates.at(state.step, config.schedule), jnp.maximum(tokens, 1)  # no token, no division by zero
    old = jax.tree.map(lambda a: a[0], state)
    mean = jax.tree.map(lambda g: g / count[0], gradient)
    norm = optax.tree.norm(mean)
    finite = old.finite & jnp.isfinite(total[0]) & jnp.isfinite(norm)
    usable = jax.tree.map(lambda g: jnp.where(finite, g, 0), clipped(mean, norm, config))  # zero times NaN would be NaN
    direction, optimizer = make_direction(config).update(usable, old.optimizer, old.adapters)
    applied = jnp.where(finite, rate[0], 0)
    adapters = jax.tree.map(lambda w, d: w - applied * d, old.adapters, direction)
    if many:
        for leaf in jax.tree.leaves(adapters):
            finite &= jnp.isfinite(leaf).all()
        adapters = jax.tree.map(lambda n, o: jnp.where(finite, n, o), adapters, old.adapters)
    new = TrainState(adapters, optimizer, old.step + finite.astype(jnp.int32), finite)
    values = {"loss": total / count, "grad_norm": norm[None], "learning_rate": rate, "tokens": tokens}
    return jax.tree.map(lambda a: a[None], new), values | {"finite": finite[None]}


def by_device(update: Callable) -> Callable:
    """`updated`, run by each device of the current mesh on its own tenants; as it is without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return update

    def on_mesh(state: TrainState, *rest):
        own = tenants_sharding(state.step.shape[0], mesh).spec
        specs = (own, PartitionSpec(None, *own), own, own, own)
        return jax.shard_map(update, in_specs=specs, out_specs=own, check_vma=False)(state, *rest)

    return on_mesh


def updated(
    state: TrainState, gradient: Any, total: jax.Array, tokens: jax.Array, rates: LearningRates, *, config: TrainSection
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The state after a step of each tenant that has tokens, one tenant after another and in place: the others cost
    nothing, and a tenant's weights, moments and gradient are read from memory once where they fit a processor's cache.

    Args:
        gradient: of the summed losses; its arrays lead with (layers, slots).
        total, tokens: summed loss (nats) and its number of tokens, float32 [slots].
    """
    rate = rates.at(state.step, config.schedule)
    order = jnp.argsort(tokens == 0, stable=True)  # tenants with tokens first

    def step_of_one(i, carry):
        slot = order[i]
        of_tenant = jax.tree.map(lambda a: a[slot], (carry[0], rate, total, tokens))
        summed = jax.tree.map(lambda g: g[:, slot], gradient)
        # The condition's results are whole before they are written: XLA would copy stacks that it reads as it writes.
        new = jax.lax.cond(of_tenant[0].finite, partial(updated_one, config=config), kept_one, *of_tenant, summed)
        return jax.tree.map(lambda a, one: a.at[slot].set(one), carry, new)

    nothing = (jnp.zeros(tokens.shape), jnp.ones(tokens.shape, bool))
    state, norms, finite = jax.lax.fori_loop(0, jnp.sum(tokens > 0), step_of_one, (state, *nothing))
    loss = total / jnp.maximum(tokens, 1)
    return state, {"loss": loss, "grad_norm": norms, "learning_rate": rate, "tokens": tokens, "finite": finite}


def updated_one(old: TrainState, rate, total, tokens, summed, *, config: TrainSection):
    """One tenant's state after its step, the norm of its gradient, and whether the tenant is finite as TrainState says.
    Where it is not, its weights, moments and step are the old ones."""
    mean = jax.tree.map(lambda g: g / tokens, summed)
    norm = optax.tree.norm(mean)
    finite = old.finite & jnp.isfinite(total) & jnp.isfinite(norm)  # once false, it stays false
    usable = clipped(mean, norm, config)
    direction, optimizer = make_direction(config).update(usable, old.optimizer, old.adapters)
    adapters = jax.tree.map(lambda w, d: w - rate * d, old.adapters, direction)
    for leaf in jax.tree.leaves(adapters):
        finite &= jnp.isfinite(leaf).all()
    new = TrainState(adapters, optimizer, old.step + 1, old.finite)
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)._replace(finite=finite), norm, finite


def kept_one(old: TrainState, rate, total, tokens, summed):
    """What updated_one gives for a tenant that is no longer trained."""
    return old, optax.tree.norm(summed) / tokens, old.finite


# ---------------------------------------------------------------------------------------------------------------- slots


@jax.jit
def tenant_of(tree: Any, slot: jax.Array) -> Any:
    """One tenant's part of a tree whose arrays lead with the slots: of a stack's adapters, or of a whole TrainState."""
    return jax.tree.map(lambda leaf: leaf[slot], tree)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def put_tenant(state: TrainState, slot: jax.Array, adapter: Any, *, config: TrainSection) -> TrainState:
    """The state with a fresh adapter in one slot, its moments and steps at zero. The given state is donated."""
    fresh = TrainState(adapter, make_direction(config).init(adapter), jnp.int32(0), jnp.bool_(True))
    return constrain_tenants(jax.tree.map(lambda whole, new: whole.at[slot].set(new), state, fresh))


@partial(jax.jit, donate_argnames="state")
def put_adapter(state: TrainState, slot: jax.Array, adapter: Any) -> TrainState:
    """The state with another adapter in one slot, whose moments and steps stay. The given state is donated."""
    adapters = jax.tree.map(lambda whole, one: whole.at[slot].set(one), state.adapters, adapter)
    return constrain_tenants(state._replace(adapters=adapters))


# ----------------------------------------------------------------------------------------------------------- evaluation


@partial(jax.jit, static_argnames=("completion", "prompt"))
def eval_nll(
    model,
    adapters,
    batch: Batch,
    states: PromptStates | None = None,
    *,
    completion: int,
    prompt: int | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """completion_nll, compiled: each row's summed nats and its number of completion tokens. Also whether every one of
    these is the most likely token, bool [rows]: then greedy decoding writes the completion."""
    hidden, targets, real = completion_states(model, adapters, batch, completion, prompt, states)
    nll, likeliest = of_logits(token_scores, model, hidden, targets)
    counts = real.sum(axis=1).astype(jnp.float32)
    return jnp.where(real, nll, 0).sum(axis=1), counts, (likeliest | ~real).all(axis=1)
