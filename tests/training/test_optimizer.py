"""The schedule's values at its ends, and AdamW on trained weights only."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_models import backbone, strong

from para_jax import Ia3Config, LoraConfig, ParaConfig, init_adapter
from para_jax.adapters.adapter import AdapterParam, BiasParam, named_leaves
from para_jax.config import TrainSection, allowed_values
from para_jax.runtime.sharding import is_variable
from para_jax.training.optimizer import clipped, decayed, learning_rates, make_direction

TRAIN = TrainSection(learning_rate=0.1, schedule="constant", warmup_ratio=0.0)
ONE = {"a": AdapterParam(jnp.array([3.0, 4.0]))}


def rates(total, **settings):
    made = schedule(total, **settings)
    return np.array([made(step) for step in range(total)])


def schedule(total, **settings):
    """The learning rate of the step with a number."""
    section = replace(TRAIN, **settings)
    return lambda step: learning_rates([section], [total]).at(step, section.schedule)[0]


@pytest.fixture(scope="module")
def adapter():
    config = ParaConfig(r=2, up_bias=True)
    return strong(init_adapter(config, backbone("llama").config))


def variables(tree):
    return jax.tree.leaves(tree, is_leaf=is_variable)


# ------------------------------------------------------------------------------------------------------------- schedule


@pytest.mark.parametrize("schedule", allowed_values(TrainSection, "schedule"))
def test_the_warm_up_rises_in_equal_parts_and_its_first_step_is_a_step(schedule):
    made = rates(100, schedule=schedule, warmup_ratio=0.06)
    np.testing.assert_allclose(made[:6], 0.1 * np.arange(1, 7) / 6, rtol=1e-5)
    assert made.max() == pytest.approx(0.1) and made[6] == pytest.approx(0.1)


def test_the_constant_schedule_stays():
    np.testing.assert_allclose(rates(20), 0.1)


def test_the_linear_schedule_falls_in_equal_parts_to_zero_after_the_last_step():
    np.testing.assert_allclose(rates(10, schedule="linear"), 0.1 * np.arange(10, 0, -1) / 10, rtol=1e-5)
    made = schedule(10, schedule="linear", warmup_ratio=0.2)
    assert made(9) == pytest.approx(0.1 / 8) and made(10) == pytest.approx(0) and made(50) == 0


def test_the_cosine_schedule_is_half_way_down_in_the_middle():
    made = schedule(10, schedule="cosine", warmup_ratio=0.2)
    assert made(6) == pytest.approx(0.05) and made(10) == pytest.approx(0, abs=1e-8)
    np.testing.assert_allclose(
        [made(s) for s in (3, 9)], [0.1 * (1 + np.cos(np.pi * x / 8)) / 2 for x in (1, 7)], rtol=1e-4
    )


@pytest.mark.parametrize("schedule", allowed_values(TrainSection, "schedule"))
@pytest.mark.parametrize("warmup", [0.0, 0.06, 0.5, 0.99])
def test_runs_of_one_and_two_steps_have_finite_rates_above_zero(schedule, warmup):
    for total in (1, 2):
        made = rates(total, schedule=schedule, warmup_ratio=warmup)
        assert np.isfinite(made).all() and (made > 0).all() and made.max() <= 0.1 + 1e-7


# ------------------------------------------------------------------------------------------------------------ optimiser


def first_update(gradient, weights, **settings):
    config = replace(TRAIN, **settings)
    direction = make_direction(config)
    given = clipped(gradient, optax.tree.norm(gradient), config)
    update = jax.jit(lambda g, w: direction.update(g, direction.init(w), w)[0])(given, weights)
    return jax.tree.map(lambda u: -TRAIN.learning_rate * u, update)


def test_the_first_update_is_adamw_by_hand(adapter):
    gradient = jax.tree.map(lambda leaf: jnp.full_like(leaf, 1e-4), adapter)
    update = first_update(gradient, adapter, adam_eps=1e-4, weight_decay=0.5)
    expected = -0.1 * (0.5 + 0.5 * np.asarray(adapter.down[...]))  # g / (|g| + eps) is a half
    np.testing.assert_allclose(update.down[...], expected, rtol=1e-4)


def test_weight_decay_leaves_biases_alone(adapter):
    update = first_update(jax.tree.map(jnp.zeros_like, adapter), adapter, weight_decay=0.5)
    moved = optax.apply_updates(adapter, update)
    for before, after in zip(variables(adapter), variables(moved), strict=True):
        factor = {AdapterParam: 0.95, BiasParam: 1.0}[type(before)]
        np.testing.assert_allclose(after.get_value(), factor * before.get_value(), rtol=1e-6)
    assert {type(v) for v in variables(adapter)} == {AdapterParam, BiasParam}


def test_weight_decay_draws_ia3_to_the_vectors_that_change_nothing():
    """Drawn to 0, they would switch the backbone's keys, values and feed-forward layers off."""
    ia3 = strong(init_adapter(Ia3Config(), backbone("llama").config))
    update = first_update(jax.tree.map(jnp.zeros_like, ia3), ia3, weight_decay=0.5)
    moved = named_leaves(optax.apply_updates(ia3, update))
    for name, before in named_leaves(ia3).items():
        assert np.abs(before - 1).max() > 0.1
        np.testing.assert_allclose(moved[name], 1 + 0.95 * (before - 1), rtol=1e-5)


def test_a_tree_says_what_has_weight_decay(adapter):
    says = decayed(adapter)
    assert not any(bias.get_value() for bias in says.up_bias.values())
    assert says.down.get_value() and all(up.get_value() for up in says.up.values())


def test_gradients_are_clipped_by_their_norm_over_all_weights():
    def update(gradient, most=1.0):
        return first_update(gradient, ONE, max_grad_norm=most, adam_eps=1.0)["a"][...]

    clipped = np.array([0.6, 0.8])
    np.testing.assert_allclose(update(ONE), -0.1 * clipped / (clipped + 1), rtol=1e-5)
    np.testing.assert_allclose(update(jax.tree.map(lambda g: 100 * g, ONE)), update(ONE), rtol=1e-5)
    np.testing.assert_allclose(update(ONE, most=10.0), -0.1 * np.array([3 / 4, 4 / 5]), rtol=1e-5)


def test_the_matrices_that_lead_out_of_the_rank_may_move_faster(adapter):
    def moved(ratio, of):
        gradient = jax.tree.map(jnp.cos, of)
        update = first_update(gradient, of, up_lr_ratio=ratio, weight_decay=0.5)
        return {name: np.asarray(leaf) for name, leaf in named_leaves(update).items()}

    for of, up in ((adapter, "up."), (init_adapter(LoraConfig(r=2), backbone("llama").config), "b.")):
        once, faster = moved(1.0, of), moved(16.0, of)
        assert any(name.startswith(up) for name in once) and not all(name.startswith(up) for name in once)
        for name in once:
            factor = 16 if name.startswith(up) else 1
            np.testing.assert_allclose(faster[name], factor * once[name], rtol=1e-6)


def test_biases_may_move_at_a_rate_of_their_own(adapter):
    gradient = jax.tree.map(jnp.cos, adapter)
    once, faster = (named_leaves(first_update(gradient, adapter, bias_lr_ratio=ratio)) for ratio in (1.0, 10.0))
    for name in once:
        factor = 10 if name.startswith("up_bias.") else 1
        assert abs(once[name]).max() > 0
        np.testing.assert_allclose(faster[name], factor * once[name], rtol=1e-6)


def test_betas_are_those_of_the_config():
    optimizer = make_direction(replace(TRAIN, adam_b1=0.5, adam_b2=0.25, max_grad_norm=10.0))
    _, state = optimizer.update(ONE, optimizer.init(ONE), ONE)
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "mu")["a"][...], [1.5, 2.0])
    np.testing.assert_allclose(optax.tree_utils.tree_get(state, "nu")["a"][...], [0.75 * 9, 0.75 * 16])
