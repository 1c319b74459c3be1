"""Attention to the filled blocks of a cache equals attention to all of it, and a row's bits do not depend on how long
its neighbours are."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from long_cases import quick

from para_jax.backbone import cache_blocks
from para_jax.backbone.cache import whole_values
from para_jax.backbone.cache_blocks import block_size, has_blocks, values_in_blocks

# (heads, kv heads, window, soft cap)
CASES = [
    pytest.param(2, 2, None, None, id="MHA"),
    pytest.param(6, 2, None, 3.0, id="GQA with a soft cap"),
    pytest.param(4, 1, 40, None, id="MQA with a window"),
    pytest.param(4, 2, 1, 3.0, id="GQA that sees itself alone"),
]
LENGTHS = jnp.array([299, 0, 127, 128, 41, 256], jnp.int32)


def drawn(*shape, seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).normal(size=shape), jnp.float32)


def given(heads, kv_heads, rows, max_length):
    held = (drawn(rows, kv_heads, max_length, 16, seed=i) for i in (1, 2))
    return drawn(rows, 1, heads, 16), *held


@pytest.fixture(autouse=True)
def blocks_of_128(monkeypatch):
    monkeypatch.setattr(cache_blocks, "SMALLEST", 128)


@pytest.mark.parametrize("max_length", quick([384, 300, 100], 300))  # whole blocks; the last overlaps; one block
@pytest.mark.parametrize(("heads", "kv_heads", "window", "cap"), CASES)
def test_blocks_give_what_the_whole_cache_gives(heads, kv_heads, window, cap, max_length):
    arrays = *given(heads, kv_heads, 6, max_length), jnp.minimum(LENGTHS, max_length - 1)
    settings = dict(window=window, scale=0.5, cap=cap)
    ours, theirs = (partial(read, **settings)(*arrays) for read in (values_in_blocks, whole_values))
    np.testing.assert_allclose(ours, theirs, atol=2e-6)


@pytest.mark.parametrize(("heads", "kv_heads", "window", "cap"), CASES)
def test_a_row_has_the_same_bits_next_to_any_other_rows(heads, kv_heads, window, cap):
    q, keys, values = given(heads, kv_heads, 6, 384)
    read = jax.jit(partial(values_in_blocks, window=window, scale=0.5, cap=cap))
    alike = [read(q, keys, values, jnp.full(6, n, jnp.int32)) for n in LENGTHS]
    together = read(q, keys, values, LENGTHS)
    for row, alone in enumerate(alike):
        np.testing.assert_array_equal(together[row], alone[row])


def test_blocks_outside_every_row_and_window_are_not_read():
    q, keys, values = given(2, 2, 2, 384)
    poisoned = jnp.full((2, 2, 128, 16), jnp.nan)
    length = jnp.array([255, 200], jnp.int32)
    for window, unread in ((None, slice(256, 384)), (50, slice(0, 128))):
        read = partial(values_in_blocks, length=length, window=window, scale=0.5, cap=None)
        hidden = (held.at[:, :, unread].set(poisoned) for held in (keys, values))
        np.testing.assert_array_equal(read(q, *hidden), read(q, keys, values))


def test_a_full_row_changes_nothing_for_other_rows():
    q, keys, values = given(2, 2, 2, 384)
    read = jax.jit(partial(values_in_blocks, window=None, scale=0.5, cap=None))
    together, alone = (read(q, keys, values, jnp.array([5, n], jnp.int32)) for n in (384, 5))
    np.testing.assert_array_equal(together[0], alone[0])


def test_a_cache_has_at_most_eight_blocks_of_whole_lanes(monkeypatch):
    monkeypatch.undo()
    sizes = {length: block_size(length) for length in (16, 512, 600, 4096, 5000, 32768)}
    assert [has_blocks(length) for length in sizes] == [False, False, True, True, True, True]
    assert sizes == {16: 16, 512: 512, 600: 512, 4096: 512, 5000: 640, 32768: 4096}
