"""Many tenants on a mesh: their state is spread over the devices along the tenants, a batch's tenants alone are sent,
and no number changes. The devices are eight virtual ones."""

from functools import cache
from math import prod

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import strong
from hlo import collective_bytes
from long_cases import slow
from tiny_mesh import COMPLETION, CONFIG, LENGTH, ROWS, model

from para_jax import LoraConfig, ParaConfig, init_adapter, make_mesh, stack_adapters
from para_jax.config import TrainSection
from para_jax.data.batches import Batch
from para_jax.runtime.sharding import place, place_tenants, shard_rows, tenant_axes
from para_jax.training.optimizer import LearningRates
from para_jax.training.step import init_state, put_tenant, train_step

TENANTS = 8
GROUPS = [3, 0, 6, 1]  # whose the batch's rows are, two each: on most meshes a group lies on two devices
TRAIN = TrainSection(schedule="constant", warmup_ratio=0.0, weight_decay=0.1, adam_eps=1e-3)
PARA, LORA = ParaConfig(r=4), LoraConfig(r=4, target_modules=("q_proj", "up_proj"))


def on_mesh(sizes, *, config=PARA, tenants=TENANTS):
    """The mesh, the state of strong tenants on it, and the backbone."""
    mesh = make_mesh(*sizes)
    made = [strong(init_adapter(config, CONFIG, seed=i % TENANTS), i % TENANTS, scale=0.5) for i in range(tenants)]
    with jax.set_mesh(mesh):
        state = init_state(place_tenants(stack_adapters(made).adapters, mesh, CONFIG), TRAIN)
    return mesh, state, place(model("stacked"), mesh, CONFIG)


def given(mesh, groups, step=0, tenants=TENANTS):
    """The batch of these tenants' groups, the same rows for the same tenant and place, whose they are, and settings."""
    each = ROWS // len(groups)
    drawn = [np.random.default_rng([step, place, tenant + 1]) for place, tenant in enumerate(groups)]
    tokens = np.concatenate([draw.integers(3, CONFIG.vocab_size, (each, LENGTH)) for draw in drawn]).astype(np.int32)
    prompt_length = np.concatenate([draw.integers(3, 9, each) for draw in drawn]).astype(np.int32)
    length = prompt_length + np.repeat([tenant >= 0 for tenant in groups], each) * (1 + prompt_length % COMPLETION)
    batch = Batch(tokens, prompt_length, length.astype(np.int32))
    with jax.set_mesh(mesh):
        batch = jax.tree.map(lambda a: shard_rows(a[None]), batch)
    rates = jnp.linspace(5e-3, 1e-2, tenants)
    settings = LearningRates(rates, jnp.zeros(tenants, jnp.int32), jnp.full(tenants, 9, jnp.int32))
    return batch, np.array([groups], np.int32), settings


def stepped(mesh, state, backbone, groups, step=0):
    with jax.set_mesh(mesh):
        return train_step(state, backbone, *given(mesh, groups, step), completion=COMPLETION, config=TRAIN)


@cache
def two_steps(sizes, config=PARA):
    """The weights after two steps, and the values of both."""
    mesh, state, backbone = on_mesh(sizes, config=config)
    state, first = stepped(mesh, state, backbone, GROUPS)
    state, second = stepped(mesh, state, backbone, [6, 7, 3, -1], step=1)
    return jax.device_get((state.adapters, [first, second]))


def assert_close(ours, theirs):
    (mine, said), (other, expected) = ours, theirs
    for values, wanted in zip(said, expected, strict=True):
        np.testing.assert_allclose(values["loss"], wanted["loss"], atol=1e-5)
        np.testing.assert_allclose(values["grad_norm"], wanted["grad_norm"], rtol=1e-5, atol=1e-5)
        assert (values["tokens"] == wanted["tokens"]).all()
    for leaf, like in zip(jax.tree.leaves(mine), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(leaf, like, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("sizes", [slow((8, 1, 1)), slow((1, 8, 1)), (2, 2, 2)])
def test_losses_and_updates_are_those_of_one_device(sizes):
    assert_close(two_steps(sizes), two_steps((1, 1, 1)))
    assert np.ptp([values["loss"] for values in two_steps(sizes)[1]]) > 0.1


@pytest.mark.long
def test_updates_of_shared_matrices_are_those_of_one_device():
    assert_close(two_steps((2, 2, 2), LORA), two_steps((1, 1, 1), LORA))


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_each_device_holds_its_own_tenants_alone_before_and_after_a_step(sizes):
    mesh, state, backbone = on_mesh(sizes)
    whole, before = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), bytes_of_devices(state)
    after = bytes_of_devices(stepped(mesh, state, backbone, GROUPS)[0])
    assert before == after and len(before) == 8 and set(before.values()) == {whole // 8} and whole % 8 == 0


def bytes_of_devices(state):
    found = {}
    for leaf in jax.tree.leaves(state):
        for shard in leaf.addressable_shards:
            found[shard.device.id] = found.get(shard.device.id, 0) + shard.data.nbytes
    return found


def test_a_tenants_bits_do_not_depend_on_who_else_is_in_the_batch_on_a_mesh():
    ends = []
    for others in ([0, 6, 1], [7, -1, 2]):
        mesh, state, backbone = on_mesh((2, 2, 2))
        for step in range(3):
            state, _ = stepped(mesh, state, backbone, [3, *others], step)
        ends.append([np.asarray(leaf)[3] for leaf in jax.tree.leaves(state)])
    fresh = [np.asarray(leaf)[3] for leaf in jax.tree.leaves(on_mesh((2, 2, 2))[1])]
    for one, other in zip(*ends, strict=True):
        np.testing.assert_array_equal(one, other)
    assert any((one != other).any() for one, other in zip(ends[0], fresh, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_what_the_devices_send_does_not_grow_with_the_tenants_of_the_run(sizes):
    sent, whole = [], []
    for tenants in (8, 64):
        mesh, state, backbone = on_mesh(sizes, tenants=tenants)
        arguments = (state, backbone, *given(mesh, GROUPS, tenants=tenants))
        with jax.set_mesh(mesh):
            step = train_step.lower(*arguments, completion=COMPLETION, config=TRAIN).compile()
        sent.append(sum(collective_bytes(step.as_text()).values()))
        whole.append(sum(leaf.nbytes for leaf in jax.tree.leaves(state.adapters)))
    reported = 4 * 4 + 1  # bytes of a tenant's values, which every device gets
    assert 0 <= sent[1] - sent[0] <= 2 * 56 * reported < (whole[1] - whole[0]) / 200


def test_a_tenant_is_put_into_its_place_where_that_lies():
    mesh, state, _ = on_mesh((2, 2, 2))
    new = strong(init_adapter(PARA, CONFIG, seed=11), 11)
    before, expected = jax.device_get(state), jax.device_get(new)
    with jax.set_mesh(mesh):
        put = put_tenant.lower(state, jnp.int32(5), new, config=TRAIN).compile()
        state = put_tenant(state, jnp.int32(5), new, config=TRAIN)
    assert not collective_bytes(put.as_text()) and len(set(bytes_of_devices(state).values())) == 1
    for leaf, old, one in zip(*map(jax.tree.leaves, (state.adapters, before.adapters, expected)), strict=True):
        np.testing.assert_array_equal(leaf[5], one)
        np.testing.assert_array_equal(np.delete(leaf, 5, axis=0), np.delete(old, 5, axis=0))


SPREAD = [
    (64, (2, 2, 2), 8),
    (6, (1, 8, 1), 1),
    (6, (2, 2, 2), 2),
    (12, (2, 1, 4), 4),
    (4, (4, 2, 1), 4),
    (1, (8, 1, 1), 1),
]


@pytest.mark.long
@pytest.mark.parametrize(("tenants", "sizes", "used"), SPREAD)
def test_tenants_that_the_devices_do_not_divide_are_spread_over_as_many_as_do(tenants, sizes, used):
    mesh = make_mesh(*sizes)
    assert prod(mesh.shape[axis] for axis in tenant_axes(tenants, mesh.shape)) == used
    placed = place_tenants(jnp.zeros((tenants, 2, 3)), mesh, CONFIG)
    assert placed.addressable_shards[0].data.nbytes == placed.nbytes // used
