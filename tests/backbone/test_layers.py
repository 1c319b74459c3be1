"""The building blocks of a layer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax.backbone.layers import ACTIVATIONS


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_is_rounded_once(name, dtype):
    """A negative GELU of few digits is close to zero, and that of every Gemma model is the tanh form."""
    x = jnp.linspace(-8, 8, 1001, dtype=dtype)
    exact = ACTIVATIONS[name](x.astype(jnp.float32))
    for activation in (ACTIVATIONS[name], jax.jit(ACTIVATIONS[name])):
        found = activation(x)
        assert found.dtype == x.dtype
        np.testing.assert_allclose(found.astype(jnp.float32), exact, rtol=jnp.finfo(dtype).eps / 2 + 1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_backward_pass_keeps_no_float32_values_of_an_activation(name):
    """They would take a quarter more memory in a training step without remat."""
    _, backward = jax.vjp(ACTIVATIONS[name], jnp.ones((2, 3), "bfloat16"))
    assert all(leaf.dtype != jnp.float32 for leaf in jax.tree.leaves(backward))
