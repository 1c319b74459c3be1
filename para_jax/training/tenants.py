"""One compiled step of many tenants: one mixed batch, one pass through the backbone, and gradients that land in each
tenant's slice. What a tenant learns does not depend on who else is in the batch."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from ..adapters.adapter import Adapter
from ..adapters.groups import grouped, of_places
from ..config import TrainSection
from ..data.batches import Batch
from .loss import completion_nll
from .optimizer import learning_rate_at, make_direction


class TenantsState(NamedTuple):
    """Every array leads with the tenants. Of the steps of one tenant, no other's weights or moments know."""

    adapters: Any
    """an Adapter, whose arrays lead with (tenants, layers)"""
    optimizer: optax.OptState
    step: jax.Array
    """int32, each tenant's own optimiser steps done"""
    sound: jax.Array
    """bool: no loss or gradient of this tenant was other than finite; one that was is not trained any more"""


class Settings(NamedTuple):
    """What may differ from tenant to tenant in one compiled step."""

    learning_rate: jax.Array
    """float32 [tenants], after the warm-up"""
    warmup_steps: jax.Array
    """int32 [tenants]"""
    total_steps: jax.Array
    """int32 [tenants]"""


def init_tenants(adapters: Any, config: TrainSection) -> TenantsState:
    """The state of a fresh Adapter, whose arrays lead with (tenants, layers)."""
    tenants = jax.tree.leaves(adapters)[0].shape[0]
    optimizer = jax.vmap(make_direction(config).init)(adapters)
    return TenantsState(adapters, optimizer, jnp.zeros(tenants, jnp.int32), jnp.ones(tenants, bool))


@partial(jax.jit, static_argnames=("completion", "config"), donate_argnames="state")
def tenants_step(
    state: TenantsState,
    model,
    batch: Batch,
    tenant_of_group: jax.Array,
    settings: Settings,
    *,
    completion: int,
    config: TrainSection,
) -> tuple[TenantsState, dict[str, jax.Array]]:
    """The state after one optimiser step of each tenant in the batch, and a value a tenant of: loss (nats a token),
    grad_norm (before clipping), learning_rate, tokens (completion tokens in the loss) and finite.

    A tenant's loss is the mean over its own completion tokens; its gradient is clipped by its own norm, and its
    learning rate is that of its own step. A tenant that has no row, or whose loss or gradient is not finite or once was
    not, keeps weights, moments and step. The given state is donated.

    Args:
        batch: its arrays lead with the passes (gradient accumulation): tokens int32 [passes, rows, T].
        tenant_of_group: int32 [passes, groups], whose the rows of each group are; -1 for rows that only fill up the
            batch. A tenant has at most one group a pass.
        completion: the most completion tokens of a row.
    """
    tenants = state.step.shape[0]

    def summed_nll(adapters, part, index):
        groups = grouped(adapters, index)
        found = completion_nll(model, groups, part, completion, remat=config.remat)
        sums = [of_places(a.reshape(index.shape[0], -1).sum(axis=1), groups.place) for a in found]
        return found[0].sum(), tuple(sums)

    def accumulate(sums, part_and_index):
        (_, found), gradient = jax.value_and_grad(summed_nll, has_aux=True)(state.adapters, *part_and_index)
        return jax.tree.map(jnp.add, sums, (found, gradient)), None

    nothing = jnp.zeros(tenants)
    zero = ((nothing, nothing), jax.tree.map(jnp.zeros_like, state.adapters))
    if batch.tokens.shape[0] == 1:
        sums, _ = accumulate(zero, jax.tree.map(lambda a: a[0], (batch, tenant_of_group)))
    else:
        sums, _ = jax.lax.scan(accumulate, zero, (batch, tenant_of_group))
    (total, tokens), gradient = sums
    count = jnp.maximum(tokens, 1)
    gradient = jax.tree.map(lambda g: g / led(count, g), gradient)
    norm = jax.vmap(optax.tree.norm)(gradient)
    finite = jnp.isfinite(total) & jnp.isfinite(norm)
    rate = learning_rate_at(
        state.step, config.schedule, settings.learning_rate, settings.warmup_steps, settings.total_steps
    )
    direction, optimizer = jax.vmap(make_direction(config).update)(gradient, state.optimizer, state.adapters)
    adapters = jax.tree.map(lambda w, d: w - led(rate, d) * d, state.adapters, direction)
    steps = (tokens > 0) & finite & state.sound

    def kept(new, old):
        return jax.tree.map(lambda n, o: jnp.where(led(steps, n), n, o), new, old)

    moved = TenantsState(adapters, optimizer, state.step + 1, state.sound)
    values = {"loss": total / count, "grad_norm": norm, "learning_rate": rate, "tokens": tokens, "finite": finite}
    return kept(moved, state)._replace(sound=state.sound & finite), values


def led(of_tenants: jax.Array, like: jax.Array) -> jax.Array:
    """A value a tenant, in a shape that goes with an array that leads with the tenants."""
    return of_tenants.reshape(-1, *[1] * (like.ndim - 1))


@jax.jit
def tenant_of(adapters: Adapter, tenant: jax.Array) -> Adapter:
    """One tenant's adapter out of the stack."""
    return jax.tree.map(lambda leaf: leaf[tenant], adapters)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def put_tenant(state: TenantsState, slot: jax.Array, adapter: Any, *, config: TrainSection) -> TenantsState:
    """The state with a fresh adapter in one slot, its moments and steps at zero. The given state is donated."""
    fresh = TenantsState(adapter, make_direction(config).init(adapter), jnp.int32(0), jnp.bool_(True))
    return jax.tree.map(lambda whole, one: whole.at[slot].set(one), state, fresh)
