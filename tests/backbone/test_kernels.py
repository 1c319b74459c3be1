"""Every attention kernel computes what plain attention does, forward and backward; splash is interpreted here, and
cuDNN's arguments are given to JAX's own implementation of them."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from golden_models import backbone

from para_jax import forward, make_mesh
from para_jax.backbone import kernels
from para_jax.backbone.kernels import cudnn, plain, platform, splash, splash_both

LENGTH, HEAD = 250, 8  # not a multiple of splash's 128
# (heads, kv heads, window, soft cap, segments)
CASES = [
    pytest.param(2, 2, None, None, False, id="MHA", marks=pytest.mark.long),
    pytest.param(4, 2, None, None, True, id="GQA in segments"),
    pytest.param(2, 1, 100, None, True, id="MQA with a window in segments", marks=pytest.mark.long),
    pytest.param(2, 1, 130, None, False, id="MQA with a window", marks=pytest.mark.long),
    pytest.param(4, 2, 30, 3.0, True, id="GQA with a window and a soft cap in segments"),
]


def drawn(heads, seed):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(2, LENGTH, heads, HEAD)), jnp.float32)


def segments():
    """Two rows: five segments and padding; two segments."""
    ends = np.array([[10, 60, 61, 190, 240], [128, 250, 250, 250, 250]])
    found = (np.arange(LENGTH)[None, :, None] >= ends[:, None]).sum(-1)
    return jnp.asarray(np.where(found == 5, -1, found), jnp.int32)


def values_and_gradients(kernel, heads, kv_heads, window, cap, segment):
    q, k, v = drawn(heads, 0), drawn(kv_heads, 1), drawn(kv_heads, 2)

    def weighed(q, k, v):
        mixed, kept = kernel(LENGTH, window, segment)(q, k, v, 0.5, cap)
        return (mixed * drawn(heads, 3)).sum(), (mixed, kept)

    (_, made), gradient = jax.jit(jax.value_and_grad(weighed, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    return made, gradient


def assert_close(ours, theirs, atol=2e-5):
    for mine, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(mine, other, atol=atol)


@pytest.mark.parametrize(("heads", "kv_heads", "window", "cap", "packed"), CASES)
def test_splash_equals_plain_forward_and_backward(heads, kv_heads, window, cap, packed, monkeypatch):
    monkeypatch.setattr(kernels, "BLOCK", 128)  # several blocks, some of them skipped
    given = (heads, kv_heads, window, cap, segments() if packed else None)
    assert_close(values_and_gradients(splash, *given), values_and_gradients(plain, *given))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("window", [None, 100])
def test_the_arguments_for_cudnn_mean_what_plain_does(window, packed):
    given = (4, 2, window, None, segments() if packed else None)
    ours = values_and_gradients(partial(cudnn, implementation="xla"), *given)
    assert_close(ours, values_and_gradients(plain, *given))


@pytest.mark.parametrize("length", [1, 17])
def test_cudnn_gets_rows_of_even_length(length, monkeypatch):
    """JAX refuses the backward pass of others."""
    monkeypatch.setattr(sys.modules[__name__], "LENGTH", length)
    lengths, attention = set(), jax.nn.dot_product_attention
    seen = lambda q, *others, **more: (lengths.add(q.shape[1]), attention(q, *others, **more))[1]  # noqa: E731
    monkeypatch.setattr(jax.nn, "dot_product_attention", seen)
    for segment in (None, jnp.arange(2 * length).reshape(2, length) // 5):
        given = (4, 2, None, None, segment)
        ours = values_and_gradients(partial(cudnn, implementation="xla"), *given)
        assert_close(ours, values_and_gradients(plain, *given))
    assert lengths == {length + 1}


@pytest.mark.parametrize(("sizes", "kv_heads"), [((2, 1, 2), 2), ((1, 2, 2), 1)])
def test_over_a_mesh_each_device_has_its_own_rows_and_heads(sizes, kv_heads):
    given = (4, kv_heads, None, None, segments())
    expected = values_and_gradients(plain, *given)
    with jax.set_mesh(make_mesh(*sizes)):
        found = values_and_gradients(splash, *given)
        assert_close(found, expected)


def test_a_model_computes_the_same_by_splash(monkeypatch):
    model = backbone("gemma2")  # windows of 6 in two of three layers, soft caps
    tokens = np.random.default_rng(0).integers(3, 200, (2, 128)).astype(np.int32)
    expected = forward(model, None, tokens, None)
    monkeypatch.setattr(kernels, "attention_kernel", lambda *given, **also: ("splash", ""))
    jax.clear_caches()
    found = forward(model, None, tokens, None)
    jax.clear_caches()
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert not np.array_equal(found, expected)  # it was another kernel


@pytest.mark.parametrize("tails", [False, True])
def test_splash_scales_bfloat16_queries_by_the_exact_factor(tails, monkeypatch):
    """1 / 12, the factor of Gemma 2 27B, would itself be 0.2 % too large in bfloat16."""
    given = []
    monkeypatch.setattr(kernels, "splash_rows", lambda q, k, v, segments, **how: (given.append(q), q)[1])
    q, k, v = (drawn(2, seed).astype(jnp.bfloat16) for seed in range(3))
    of_row = jnp.zeros((2, LENGTH), jnp.int32)
    attend = splash_both((k.swapaxes(1, 2),) * 2, of_row, of_row) if tails else splash(LENGTH, None, None)
    attend(q, k, v, 1 / 12, None)
    exact = q.astype(jnp.float32).swapaxes(1, 2) / 12
    ratio = jnp.vdot(given[0][:, :, :LENGTH], exact) / jnp.vdot(exact, exact)
    np.testing.assert_allclose(ratio, 1, atol=2e-4)


def test_the_mesh_decides_and_not_the_process_devices():
    assert platform() == jax.default_backend()
    mesh = make_mesh()
    with jax.set_mesh(mesh):
        assert platform() == jax.default_backend()
    device = jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh.update(abstract_device=device)):
        assert platform() == "tpu"
