"""Training steps of a single adapter, as a run of one adapter takes them."""

import jax
import numpy as np

from para_jax.data.examples import Example
from para_jax.training.step import state_of_one, step_of_one


def fresh_state(adapter, config):
    """The state of the adapter. A step donates it, so the adapter's arrays are copied."""
    return state_of_one(jax.tree.map(lambda leaf: leaf.copy(), adapter), config)


def trained_step(state, model, batch, **static):
    """The state after a step, and its values as scalars."""
    state, values = step_of_one(state, model, batch, **static)
    return state, {name: value[0] for name, value in values.items()}


def only(tree):
    """The only tenant's part of a state, or of a part of one."""
    return jax.tree.map(lambda leaf: leaf[0], tree)


def examples_of(sizes):
    """Random examples of these (prompt, completion) tokens."""
    draw = np.random.default_rng(0)
    return [Example(*(draw.integers(3, 200, n).tolist() for n in size)) for size in sizes]


def value_and_gradient(of, adapter):
    value, gradient = jax.jit(jax.value_and_grad(of))(adapter)
    return float(value), gradient
