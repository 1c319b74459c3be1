"""One training step: what it may change, what it may not, and that passes, filling and meshes do not matter."""

import math
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from golden_models import FIXTURES, prompts, strong
from long_cases import quick
from one_adapter import fresh_state, only, trained_step
from tiny_run import ADAPTER, COMPLETION, LENGTH, ROWS, STEPS, TRAIN

from para_jax import init_adapter, load_backbone
from para_jax.data.batches import Batch
from para_jax.runtime.sharding import make_mesh, place, shard_rows
from para_jax.training.step import eval_nll

ONE_DEVICE = (1, 1, 1)
CONFIG = replace(TRAIN, per_device_batch_size=ROWS)


@cache
def model_on(sizes=ONE_DEVICE, dtype="float32"):
    mesh = make_mesh(*sizes)
    return load_backbone(FIXTURES / "llama", layout="stacked", mesh=mesh, dtype=dtype)


@cache
def adapter_values():
    return strong(init_adapter(ADAPTER, model_on().config))


@cache
def batch():
    """8 rows; the completions have 1 to 6 tokens."""
    prompt_length = np.array([6, 3, 8, 5, 6, 4, 9, 7], np.int32)
    length = prompt_length + np.array([6, 5, 2, 3, 1, 1, 3, 1], np.int32)
    return Batch(prompts(model_on(), ROWS, LENGTH), prompt_length, length)


def step(given, passes=1, sizes=ONE_DEVICE, config=CONFIG, state=None, dtype="float32"):
    """The state after a step over `given`, which is cut into passes, and its values."""
    mesh = make_mesh(*sizes)
    model = model_on(sizes, dtype)
    with jax.set_mesh(mesh):
        state = state or fresh_state(place(adapter_values(), mesh, model.config), config)
        cut = jax.tree.map(lambda a: shard_rows(np.asarray(a).reshape(passes, -1, *a.shape[1:])), given)
        return trained_step(state, model, cut, completion=COMPLETION, config=config, total_steps=STEPS)


@cache
def one_step():
    return step(batch())


def assert_same_step(ours, theirs, atol):
    """Loss, gradient norm, first moments (the gradients) and the new weights agree."""
    for name in theirs[1]:
        np.testing.assert_allclose(ours[1][name], theirs[1][name], rtol=1e-5, atol=atol)
    for tree in (lambda s: s.adapters, lambda s: optax.tree_utils.tree_get(s.optimizer, "mu")):
        for mine, other in zip(jax.tree.leaves(tree(ours[0])), jax.tree.leaves(tree(theirs[0])), strict=True):
            np.testing.assert_allclose(mine, other, atol=atol)


# ----------------------------------------------------------------------------------------------------- what a step does


def test_the_loss_is_the_mean_over_tokens_and_not_over_rows():
    total, count, _ = map(np.asarray, eval_nll(model_on(), adapter_values(), batch(), completion=COMPLETION))
    np.testing.assert_array_equal(count, batch().length - batch().prompt_length)
    _, values = one_step()
    np.testing.assert_allclose(values["loss"], total.sum() / count.sum(), rtol=1e-5)
    assert values["tokens"] == count.sum() and abs((total / count).mean() - values["loss"]) > 1e-2


def test_the_gradient_is_that_of_the_mean_loss_by_central_differences():
    state, values = one_step()
    gradient = only(optax.tree_utils.tree_get(state.optimizer, "mu"))  # but for its size, which clipping changes
    size = optax.tree.norm(gradient)

    def loss(distance):
        moved = jax.tree.map(lambda weight, g: weight + distance * g / size, adapter_values(), gradient)
        total, count, _ = eval_nll(model_on(), moved, batch(), completion=COMPLETION)
        return total.sum() / count.sum()

    assert values["grad_norm"] > CONFIG.max_grad_norm  # as before clipping
    np.testing.assert_allclose((loss(1e-2) - loss(-1e-2)) / 2e-2, values["grad_norm"], rtol=1e-2)


def test_steps_lower_the_loss_and_say_the_learning_rate():
    state, losses, rates = None, [], []
    for _ in range(STEPS):
        state, values = step(batch(), state=state)
        losses.append(float(values["loss"]))
        rates.append(float(values["learning_rate"]))
    assert losses[-1] < losses[0] - 0.3 and state.step == STEPS
    np.testing.assert_allclose(rates, np.array([1 / 2, 1, 1, 3 / 4, 2 / 4, 1 / 4]) * TRAIN.learning_rate, rtol=1e-5)


def test_the_state_is_donated_and_the_backbone_stays_as_it_was():
    model = model_on()
    before = jax.tree.map(np.asarray, model)
    with jax.set_mesh(make_mesh()):
        state = fresh_state(place(adapter_values(), make_mesh(), model.config), CONFIG)
    step(batch(), state=state)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves((state.adapters, state.optimizer)))
    for mine, other in zip(jax.tree.leaves(model), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(mine, other)


def test_the_optimiser_holds_two_moments_of_the_adapter_and_nothing_of_the_backbone():
    state, _ = one_step()
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))  # noqa: E731
    counters = sum(leaf.ndim == 1 for leaf in jax.tree.leaves(state.optimizer))
    assert size(state.optimizer) == 2 * size(state.adapters) + counters


def test_all_weights_change():
    adapter, before = only(one_step()[0].adapters), adapter_values()
    for old, new in [(before.down, adapter.down), *((up, adapter.up[s]) for s, up in before.up.items())]:
        assert (np.abs(np.asarray(new[...]) - np.asarray(old[...])).max(axis=(1, 2)) > 1e-4).all()  # in each layer


def test_a_step_that_is_not_finite_leaves_the_weights_and_all_later_steps_do_too():
    broken = jax.tree.map(lambda leaf: leaf.at[0, 0].set(1e30), adapter_values())
    state = fresh_state(broken, CONFIG)
    before = jax.device_get(state.adapters)
    for _ in range(2):
        state, values = step(batch(), state=state)
        assert not values["finite"] and state.finite.tolist() == [False] and state.step.tolist() == [0]
    for mine, other in zip(jax.tree.leaves(state.adapters), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(mine, other)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.optimizer))
    once = fresh_state(adapter_values(), CONFIG)._replace(finite=jnp.zeros(1, bool))
    state, values = step(batch(), state=once)  # its own loss and gradient are finite
    assert math.isfinite(values["grad_norm"]) and state.finite.tolist() == [False]
    jax.tree.map(np.testing.assert_array_equal, only(state.adapters), adapter_values())


# --------------------------------------------------------------------------------------------- what makes no difference


def test_several_passes_equal_one_big_batch():
    counts = batch().length - batch().prompt_length
    assert counts[:4].sum() > 2 * counts[4:].sum()  # the mean of the passes' means would be another number
    assert_same_step(step(batch(), passes=2), one_step(), atol=2e-6)


def with_filling(rows, token=0):
    """The batch with some rows as filling ones, and this token in them and at all padding."""
    made = Batch(*map(np.array, batch()))
    made.prompt_length[rows], made.length[rows] = 1, 1
    made.tokens[np.arange(LENGTH) >= made.length[:, None]] = token
    return made


def test_rows_that_fill_up_and_padding_change_nothing():
    filled = step(with_filling([1, 6]))
    assert_same_step(step(with_filling([1, 6], token=99)), filled, atol=1e-6)
    assert filled[1]["tokens"] == one_step()[1]["tokens"] - 8


def test_a_pass_of_filling_rows_only_changes_nothing():
    half = with_filling(slice(4, 8))
    assert_same_step(step(half, passes=2), step(half), atol=2e-6)


@pytest.mark.parametrize("sizes", quick([(8, 1, 1), (2, 2, 2)], (2, 2, 2)))
def test_a_mesh_equals_one_device(sizes):
    config = replace(CONFIG, per_device_batch_size=ROWS // (sizes[0] * sizes[1]))
    ours = step(batch(), sizes=sizes, config=config)
    assert len(ours[1]["loss"].sharding.device_set) == 8
    assert_same_step(ours, one_step(), atol=1e-5)


@pytest.mark.filterwarnings("ignore:a bfloat16 backbone")
def test_a_bfloat16_backbone_trains_a_float32_adapter():
    state, values = step(batch(), dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(model_on(dtype="bfloat16"))} == {"bfloat16"}
    assert {leaf.dtype.name for leaf in jax.tree.leaves(state.adapters)} == {"float32"}
    np.testing.assert_allclose(values["loss"], one_step()[1]["loss"], rtol=2e-2)
    assert math.isfinite(values["grad_norm"])
