"""The KV cache: what one more token writes, what it reads, and that no copy of the cache is made on the way."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from para_jax.backbone.cache import attend_cached, with_token, write_by_head, write_by_row

LENGTHS = np.array([5, 0, 8, 7, 12], np.int32)  # of 8: the third row is full, the last one beyond it


def drawn(*shape, seed: int = 0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def attend(cache, length, q, k, v, window=None):
    return attend_cached(cache, length, window)(q, k, v, 0.5, None)


def one_token(batch: int, max_length: int = 8):
    """A cache, and the queries, keys and values of one more token a row: 4 heads over 2 kv heads."""
    cache = (drawn(batch, 2, max_length, 16), drawn(batch, 2, max_length, 16, seed=1))
    return cache, (drawn(batch, 1, 4, 16), drawn(batch, 1, 2, 16), drawn(batch, 1, 2, 16, seed=1))


@pytest.mark.parametrize("write", (with_token, write_by_head, write_by_row))
def test_a_token_is_written_at_its_row_length_unless_full(write):
    held, new = drawn(5, 2, 8, 16), drawn(5, 2, 16)
    expected = np.array(held)
    for row in (0, 1, 3):
        expected[row, :, LENGTHS[row]] = new[row]
    np.testing.assert_array_equal(write(held, new, jnp.asarray(LENGTHS)), expected)


def test_attention_of_a_row_never_depends_on_other_rows():
    cache, new = one_token(3)
    length = jnp.array([5, 2, 7])
    mixed, kept = jax.jit(attend)(cache, length, *new)
    hostile = jax.tree.map(lambda x: x.at[1].set(jnp.nan), (cache, new))
    together, kept_together = jax.jit(attend)(hostile[0], length, *hostile[1])
    order = jnp.array([2, 0, 1])
    turned, _ = jax.jit(attend)(*jax.tree.map(lambda x: x[order], (cache, length)), *(x[order] for x in new))
    np.testing.assert_array_equal(turned, mixed[order])
    for row in (0, 2):
        for clean, other in zip((mixed, *kept), (together, *kept_together), strict=True):
            np.testing.assert_array_equal(clean[row], other[row])


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA makes of it on a CPU")
@pytest.mark.parametrize("batch", (1, 4))
def test_a_step_writes_into_the_donated_cache_without_a_copy(batch):
    cache, new = one_token(batch, 128)
    compiled = jax.jit(attend, donate_argnums=0).lower(cache, jnp.full(batch, 3), *new).compile()
    program, shape = compiled.as_text(), f"f32[{batch},2,128,16]"
    assert shape in program  # the cache does stand in the program's text like this
    assert not [line for line in program.splitlines() if f"= {shape}" in line and " copy(" in line]
