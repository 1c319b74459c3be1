"""Many tenants in one step: each learns what it would learn alone, and nothing of who else is in the batch."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import one_adapter
import optax
import pytest
from golden_models import FIXTURES, prompts, strong
from long_cases import long, quick
from one_adapter import only, trained_step
from tiny_run import COMPLETION, LENGTH, TRAIN

from para_jax import Ia3Config, LoraConfig, ParaConfig, forward, init_adapter, load_backbone, pick, stack_adapters
from para_jax.adapters.rows import Rows, group_of_tenant
from para_jax.data.batches import Batch
from para_jax.model.residual import residual_stream
from para_jax.training.optimizer import LearningRates, learning_rates
from para_jax.training.step import init_state, tenant_of, train_step

METHODS = [ParaConfig(r=4, summary="rms", up_bias=True), LoraConfig(r=4), Ia3Config()]
SOME_LAYERS = ParaConfig(r=4, summary="rms", layers_to_transform=(0, 2))
NAME = lambda m: "some layers" if m is SOME_LAYERS else type(m).__name__  # noqa: E731
A, B, C = 0, 1, 2
EACH = 4  # rows of a tenant's group
CONFIG = replace(TRAIN, warmup_ratio=0.0, bias_lr_ratio=1.0)
RATES, TOTALS = np.array([3e-2, 1e-2, 2e-2], np.float32), np.array([40, 6, 10], np.int32)


@cache
def model():
    return load_backbone(FIXTURES / "llama", layout="stacked", dtype="float32")


@cache
def tenants(method):
    """Three strong adapters of different size."""
    return [strong(init_adapter(method, model().config, seed=i), seed=i, scale=0.05 * (i + 1)) for i in range(3)]


def fresh_state(method):
    return init_state(stack_adapters(tenants(method)).adapters, CONFIG)


def rows_of(tenant, step=0):
    """A tenant's batch: as many completion tokens as differ from tenant to tenant."""
    draw = np.random.default_rng([tenant, step])
    prompt_length = draw.integers(3, 9, EACH).astype(np.int32)
    length = prompt_length + draw.integers(1, COMPLETION + 1 - tenant, EACH).astype(np.int32)
    return Batch(prompts(model(), EACH, LENGTH, seed=10 * step + tenant), prompt_length, length)


FILLING = Batch(np.zeros((EACH, LENGTH), np.int32), np.ones(EACH, np.int32), np.ones(EACH, np.int32))


def mixed(groups, step=0):
    """The batch of these tenants' groups (-1: filling rows), and whose they are; one pass."""
    parts = [FILLING if tenant < 0 else rows_of(tenant, step) for tenant in groups]
    batch = jax.tree.map(lambda *arrays: np.concatenate(arrays)[None], *parts)
    return batch, np.array([groups], np.int32)


def stepped(state, batch, index, rates=RATES, config=CONFIG):
    warmup = np.zeros(3, np.int32)
    given = batch, index, LearningRates(rates, warmup, TOTALS)
    return train_step(state, model(), *given, completion=COMPLETION, config=config)


def of_tenant(state, tenant):
    """A tenant's weights, moments and step, as bytes that can be compared."""
    return [np.asarray(leaf)[tenant] for leaf in jax.tree.leaves((state.adapters, state.optimizer, state.step))]


def assert_same_bits(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(mine, other)


def differ(ours, theirs):
    return any((mine != other).any() for mine, other in zip(ours, theirs, strict=True))


# ------------------------------------------------------------------------------------------------------- each as alone


@pytest.mark.parametrize("method", quick([*METHODS, SOME_LAYERS], METHODS[0], slow=(SOME_LAYERS,)), ids=NAME)
def test_each_tenant_steps_as_it_would_alone(method):
    batch, index = mixed([B, C, A])
    state, values = stepped(fresh_state(method), batch, index)
    for tenant in (A, B, C):
        config, total = replace(CONFIG, learning_rate=float(RATES[tenant])), int(TOTALS[tenant])
        alone = one_adapter.fresh_state(tenants(method)[tenant], config)
        rows = jax.tree.map(lambda a: a[None], rows_of(tenant))
        alone, said = trained_step(alone, model(), rows, completion=COMPLETION, config=config, total_steps=total)
        for name in ("loss", "grad_norm", "learning_rate", "tokens"):
            np.testing.assert_allclose(values[name][tenant], said[name], rtol=1e-5)
        for key in ("mu", "nu"):
            ours = jax.tree.leaves(optax.tree_utils.tree_get(state.optimizer, key))
            theirs = jax.tree.leaves(only(optax.tree_utils.tree_get(alone.optimizer, key)))
            largest = max(float(jnp.abs(leaf).max()) for leaf in theirs)
            for mine, other in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(mine[tenant], other, atol=1e-5 * largest)
        for mine, other in zip(jax.tree.leaves(state.adapters), jax.tree.leaves(only(alone.adapters)), strict=True):
            np.testing.assert_allclose(mine[tenant], other, atol=1e-5)
    norms = np.asarray(values["grad_norm"])
    assert norms.max() > CONFIG.max_grad_norm or type(method) is not ParaConfig  # some are clipped


@pytest.mark.parametrize("method", [*METHODS, long(SOME_LAYERS)], ids=NAME)
def test_groups_of_rows_compute_what_rows_of_their_own_do(method):
    batch, index = mixed([B, -1, A])
    tokens, lengths = jnp.asarray(batch.tokens[0]), jnp.asarray(batch.prompt_length[0])
    stack = stack_adapters(tenants(method))
    groups = Rows((stack,), jnp.asarray(index), EACH, distinct=True)
    found = model().logits(model().final_norm(residual_stream(model(), groups, tokens, lengths)[0]))
    rows = pick(stack, np.repeat(index[0], EACH))
    np.testing.assert_allclose(found, forward(model(), rows, tokens, lengths), atol=2e-5)
    assert group_of_tenant(groups.index[0], stack.size).tolist() == [2, 0, -1]
    np.testing.assert_array_equal(groups.by_row().index, rows.index)


@pytest.mark.long
def test_passes_of_one_step_make_one_gradient_a_tenant():
    method = METHODS[0]
    batch, index = mixed([A, B])
    once, values = stepped(fresh_state(method), batch, index)
    two = jax.tree.map(lambda a: a.reshape(2, EACH, *a.shape[2:]), batch)
    twice, said = stepped(fresh_state(method), two, index.reshape(2, 1))
    np.testing.assert_allclose(said["loss"], values["loss"], rtol=1e-5)
    for mine, other in zip(jax.tree.leaves(twice.adapters), jax.tree.leaves(once.adapters), strict=True):
        np.testing.assert_allclose(mine, other, atol=1e-5)


# -------------------------------------------------------------------------------------------------- whoever else is in


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_a_tenants_bits_do_not_depend_on_who_else_is_in_the_batch(method):
    ends = []
    for others in ([B, C], [C, -1]):
        state = fresh_state(method)
        for i in range(20):
            state, _ = stepped(state, *mixed([A, *others], step=i))
        ends.append(of_tenant(state, A))
    assert_same_bits(*ends)
    assert differ(ends[0], of_tenant(fresh_state(method), A))


def test_an_absent_tenant_keeps_weights_moments_and_step():
    state, _ = stepped(fresh_state(METHODS[0]), *mixed([A, B, C]))
    before = [of_tenant(state, tenant) for tenant in (A, B, C)]
    state, values = stepped(state, *mixed([C, -1, A], step=1))
    assert_same_bits(of_tenant(state, B), before[B])
    assert differ(of_tenant(state, A), before[A]) and differ(of_tenant(state, C), before[C])
    assert state.step.tolist() == [2, 1, 2] and values["tokens"][B] == 0 and bool(values["finite"].all())


def test_the_schedule_runs_on_a_tenants_own_steps():
    state, found = fresh_state(METHODS[0]), []
    for i, groups in enumerate([[A, B, C], [A, -1, C], [A, B, C]]):
        state, values = stepped(state, *mixed(groups, step=i))
        found.append(np.asarray(values["learning_rate"]))
    own = [(A, [0, 1, 2]), (B, [0, 1, 1]), (C, [0, 1, 2])]
    for tenant, steps in own:
        rates = learning_rates([replace(CONFIG, learning_rate=float(RATES[tenant]))], TOTALS[[tenant]])
        expected = [rates.at(step, CONFIG.schedule)[0] for step in steps]
        np.testing.assert_allclose([rate[tenant] for rate in found], expected, rtol=1e-6)


@pytest.mark.long
def test_each_tenant_is_clipped_by_its_own_norm():
    batch, index = mixed([A, B, C])
    _, values = stepped(fresh_state(METHODS[0]), batch, index)
    norms = np.asarray(values["grad_norm"])
    limit = float(np.sort(norms)[1] * 0.999 + 1e-6 * norms.max())
    config = replace(CONFIG, max_grad_norm=limit)
    free = replace(CONFIG, max_grad_norm=1e9)
    clipped, _ = stepped(init_state(stack_adapters(tenants(METHODS[0])).adapters, config), batch, index, config=config)
    whole, _ = stepped(init_state(stack_adapters(tenants(METHODS[0])).adapters, free), batch, index, config=free)
    for tenant in (A, B, C):
        mine, other = (
            optax.tree.norm(tenant_of(optax.tree_utils.tree_get(s.optimizer, "mu"), tenant)) for s in (clipped, whole)
        )
        np.testing.assert_allclose(mine / other, min(1.0, limit / norms[tenant]), rtol=1e-4)
    assert (norms > limit).sum() == 2


@pytest.mark.parametrize("method", METHODS, ids=lambda m: type(m).__name__)
def test_a_tenant_that_is_not_finite_stops_and_changes_no_others_bits(method):
    def run(broken):
        made = stack_adapters(tenants(method)).adapters
        if broken:
            made = jax.tree.map(lambda leaf: leaf.at[B].set(jnp.inf), made)
        state, says = init_state(made, CONFIG), []
        for i in range(3):
            state, values = stepped(state, *mixed([A, B, C], step=i))
            says.append(np.asarray(values["finite"]).tolist())
        return state, says

    state, says = run(broken=True)
    sound, _ = run(broken=False)
    assert says == [[True, False, True]] * 3 and state.finite.tolist() == [True, False, True]
    assert_same_bits(of_tenant(state, A), of_tenant(sound, A))
    assert_same_bits(of_tenant(state, C), of_tenant(sound, C))
    assert state.step.tolist() == [3, 0, 3]


def test_a_step_to_weights_that_are_not_finite_is_not_taken():
    before = [of_tenant(fresh_state(METHODS[0]), tenant) for tenant in (A, B)]
    rates = np.where(np.arange(3) == B, np.float32(np.inf), RATES)
    state, values = stepped(fresh_state(METHODS[0]), *mixed([A, B, C]), rates=rates)
    assert np.asarray(values["finite"]).tolist() == state.finite.tolist() == [True, False, True]
    assert np.isfinite(np.asarray(values["loss"])).all() and np.isfinite(np.asarray(values["grad_norm"])).all()
    assert_same_bits(of_tenant(state, B), before[B])
    assert differ(of_tenant(state, A), before[A])


def test_a_tenant_that_was_not_finite_once_is_not_trained_again():
    state, _ = stepped(fresh_state(METHODS[0]), *mixed([A, B, C]))
    state = state._replace(finite=jnp.array([True, False, True]))
    before = of_tenant(state, B)
    state, values = stepped(state, *mixed([A, B, C], step=1))
    assert_same_bits(of_tenant(state, B), before)
    assert values["finite"].tolist() == state.finite.tolist() == [True, False, True]


def test_who_is_in_the_batch_and_their_rates_need_no_new_compilation():
    state, _ = stepped(fresh_state(METHODS[0]), *mixed([A, B, C]))
    compiled = train_step._cache_size()
    for groups, rates in (([B, -1, -1], RATES), ([C, A, -1], RATES * 2)):
        state, _ = stepped(state, *mixed(groups), rates=rates)
    assert train_step._cache_size() == compiled
