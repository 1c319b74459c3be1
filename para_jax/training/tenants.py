"""One compiled step of many tenants: one mixed batch, one pass through the backbone, and gradients that land in each
tenant's slice. What a tenant learns does not depend on who else is in the batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec

from ..adapters.adapter import Adapter
from ..adapters.groups import grouped, layers_first, of_places
from ..config import RunConfig, TrainSection
from ..data.batches import Batch
from ..sharding import everywhere, over_tenants, tenants_sharding
from .loss import completion_nll
from .optimizer import learning_rate_at, make_direction
from .passes import batch_devices, passes_allowed, require_divides


class TenantsState(NamedTuple):
    """Every array leads with the tenants, and is spread over the mesh along them (sharding.place_tenants). Of the steps
    of one tenant, no other's weights or moments know."""

    adapters: Any
    """an Adapter, whose arrays lead with (tenants, layers)"""
    optimizer: optax.OptState
    step: jax.Array
    """int32, each tenant's own optimiser steps done"""
    sound: jax.Array
    """bool: nothing of this tenant's steps was other than finite; one of which it was is not trained any more"""


class Settings(NamedTuple):
    """What may differ from tenant to tenant in one compiled step."""

    learning_rate: jax.Array
    """float32 [tenants], after the warm-up"""
    warmup_steps: jax.Array
    """int32 [tenants]"""
    total_steps: jax.Array
    """int32 [tenants]"""


class Layout(NamedTuple):
    """How a run's batches are cut."""

    slots: int
    """tenants that live on the devices"""
    groups: int
    """the most tenants of a pass"""
    rows: int
    """a group's rows of a pass"""
    passes: int
    turns: int = 1
    """passes of different tenants; the others hold more rows of the same ones"""

    @property
    def together(self) -> int:
        """The most tenants of a step."""
        return self.groups * self.turns

    @property
    def passes_of_tenant(self) -> int:
        """The passes that a tenant's rows of a step are cut into."""
        return self.passes // self.turns


def lay_out(config: RunConfig, tenants: int, mesh) -> Layout:
    """No batch has more groups than tenants can fill, but for the devices that need some rows each.

    With train.batch_size, a step has batch_size / rows_per_tenant tenants on any mesh. A pass holds some of them, and
    all their rows where it can.
    Raises ValueError as step_passes does.
    """
    train, slots = config.train, min(config.train.tenants_at_once or tenants, tenants)
    rows, over = config.rows_per_tenant, batch_devices(mesh)
    if train.batch_size is None:
        groups = over * min(train.per_device_batch_size // rows, math.ceil(slots / over))
        return Layout(slots, groups, rows, train.gradient_accumulation_steps)
    require_divides(train, over)
    most = train.batch_size // rows
    groups = next(n for n in range(min(slots, most), most + 1) if n * rows % over == 0)
    cuts = {
        turns * parts: (turns, parts)
        for parts in divisors(rows)  # the largest first: of equally many passes, those that part the fewest rows stay
        for turns in divisors(groups)
        if groups // turns * (rows // parts) % over == 0
    }
    passes = passes_allowed(train, sorted(cuts), groups * rows // over)
    turns, parts = cuts[passes]
    return Layout(slots, groups // turns, rows // parts, passes, turns)


def divisors(count: int) -> list[int]:
    """The largest first."""
    return [n for n in range(count, 0, -1) if count % n == 0]


@partial(jax.jit, static_argnames="config")
def init_tenants(adapters: Any, config: TrainSection) -> TenantsState:
    """The state of a fresh Adapter, whose arrays lead with (tenants, layers)."""
    tenants = jax.tree.leaves(adapters)[0].shape[0]
    optimizer = jax.vmap(make_direction(config).init)(adapters)
    state = TenantsState(adapters, optimizer, jnp.zeros(tenants, jnp.int32), jnp.ones(tenants, bool))
    return over_tenants(state)


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
    learning rate is that of its own step. A tenant that has no row, or whose loss, gradient or new weights are not
    finite or once were not, keeps weights, moments and step. The given state is donated.

    On a mesh each device updates its own tenants. Of the others' weights it receives, a layer at a time, those of the
    batch's groups, and sends these their gradients: the partitioner makes a sum over the devices of the indexing along
    the spread axis, of which one term is not zero. The bytes don't grow with the tenants (tests/test_tenant_meshes.py).

    Args:
        batch: its arrays lead with the passes (gradient accumulation): tokens int32 [passes, rows, T].
        tenant_of_group: int32 [passes, groups], whose the rows of each group are; -1 for rows that only fill up the
            batch. A tenant has at most one group a pass.
        completion: the most completion tokens of a row.
    """

    def summed_nll(adapters, part, index):
        groups = grouped(adapters, index)
        found = completion_nll(model, groups, part, completion, remat=config.remat)
        sums = [of_places(a.reshape(index.shape[0], -1).sum(axis=1), groups.place) for a in found]
        return found[0].sum(), tuple(sums)

    adapters = over_tenants(layers_first(state.adapters), axis=1)

    def accumulate(sums, part_and_index):
        (_, found), gradient = jax.value_and_grad(summed_nll, has_aux=True)(adapters, *part_and_index)
        return jax.tree.map(jnp.add, sums, (found, over_tenants(gradient, axis=1))), None

    nothing = jnp.zeros(state.step.shape)
    zero = ((nothing, nothing), jax.tree.map(jnp.zeros_like, adapters))
    if batch.tokens.shape[0] == 1:
        sums, _ = accumulate(zero, jax.tree.map(lambda a: a[0], (batch, tenant_of_group)))
    else:
        sums, _ = jax.lax.scan(accumulate, zero, (batch, tenant_of_group))
    (total, tokens), gradient = sums
    state, values = by_device(partial(updated, config=config))(state, gradient, total, tokens, settings)
    return over_tenants(state), everywhere(values)


def by_device(update: Callable) -> Callable:
    """`updated`, run by each device of the current mesh on its own tenants; as it is without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return update

    def on_mesh(state: TenantsState, *rest):
        own = tenants_sharding(state.step.shape[0], mesh).spec
        specs = (own, PartitionSpec(None, *own), own, own, own)
        return jax.shard_map(update, in_specs=specs, out_specs=own, check_vma=False)(state, *rest)

    return on_mesh


def updated(
    state: TenantsState, gradient: Any, total: jax.Array, tokens: jax.Array, settings: Settings, *, config: TrainSection
) -> tuple[TenantsState, dict[str, jax.Array]]:
    """The state after a step of each tenant that has tokens, one tenant after another and in place: the others cost
    nothing, and a tenant's weights, moments and gradient are read once from memory where they fit a processor's cache.

    Args:
        gradient: of the summed losses; its arrays lead with (layers, tenants).
        total: nats, and
        tokens: how many, float32 [tenants].
    """
    rate = learning_rate_at(
        state.step, config.schedule, settings.learning_rate, settings.warmup_steps, settings.total_steps
    )
    order = jnp.argsort(tokens == 0, stable=True)

    def step_of_one(i, carry):
        tenant = order[i]
        of_tenant = jax.tree.map(lambda a: a[tenant], (carry[0], rate, total, tokens))
        summed = jax.tree.map(lambda g: g[:, tenant], gradient)
        # The condition's results are whole before they are written: XLA would copy stacks that it reads as it writes.
        new = jax.lax.cond(of_tenant[0].sound, partial(updated_one, config=config), kept_one, *of_tenant, summed)
        return jax.tree.map(lambda a, one: a.at[tenant].set(one), carry, new)

    nothing = (jnp.zeros(tokens.shape), jnp.ones(tokens.shape, bool))
    state, norms, finite = jax.lax.fori_loop(0, jnp.sum(tokens > 0), step_of_one, (state, *nothing))
    loss = total / jnp.maximum(tokens, 1)
    return state, {"loss": loss, "grad_norm": norms, "learning_rate": rate, "tokens": tokens, "finite": finite}


def updated_one(old: TenantsState, rate, total, tokens, summed, *, config: TrainSection):
    """One tenant's state after its step, the norm of its gradient, and whether that, the loss and the new weights are
    finite; where they are not, the state is the old one but for `sound`."""
    mean = jax.tree.map(lambda g: g / tokens, summed)
    norm = optax.tree.norm(mean)
    finite = jnp.isfinite(total) & jnp.isfinite(norm)
    direction, optimizer = make_direction(config).update(mean, old.optimizer, old.adapters)
    adapters = jax.tree.map(lambda w, d: w - rate * d, old.adapters, direction)
    for leaf in jax.tree.leaves(adapters):
        finite &= jnp.isfinite(leaf).all()
    new = TenantsState(adapters, optimizer, old.step + 1, old.sound)
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)._replace(sound=finite), norm, finite


def kept_one(old: TenantsState, rate, total, tokens, summed):
    """What updated_one gives of a tenant that is not trained any more."""
    norm = optax.tree.norm(summed) / tokens
    return old, norm, jnp.isfinite(total) & jnp.isfinite(norm)


@jax.jit
def tenant_of(adapters: Adapter, tenant: jax.Array) -> Adapter:
    """One tenant's adapter out of the stack."""
    return jax.tree.map(lambda leaf: leaf[tenant], adapters)


@partial(jax.jit, static_argnames="config", donate_argnames="state")
def put_tenant(state: TenantsState, slot: jax.Array, adapter: Any, *, config: TrainSection) -> TenantsState:
    """The state with a fresh adapter in one slot, its moments and steps at zero. The given state is donated."""
    fresh = TenantsState(adapter, make_direction(config).init(adapter), jnp.int32(0), jnp.bool_(True))
    return over_tenants(jax.tree.map(lambda whole, one: whole.at[slot].set(one), state, fresh))


@partial(jax.jit, donate_argnames="state")
def put_adapter(state: TenantsState, slot: jax.Array, adapter: Any) -> TenantsState:
    """The state with another adapter in one slot, whose moments and steps stay. The given state is donated."""
    adapters = jax.tree.map(lambda whole, one: whole.at[slot].set(one), state.adapters, adapter)
    return over_tenants(state._replace(adapters=adapters))
