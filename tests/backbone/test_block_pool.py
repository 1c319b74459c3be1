"""The pool of blocks: what is written where, and what rows hold."""

import jax.numpy as jnp
import numpy as np
import pytest

from para_jax.backbone.block_pool import by_head, by_token, rows_of_blocks, write_together, write_tokens

BLOCKS, KV, SIZE, WIDTH = 6, 2, 4, 3


def values(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


@pytest.mark.parametrize("write", [write_together, write_tokens])
def test_tokens_are_written_where_the_table_says(write):
    pool, new, count = values(BLOCKS, KV, SIZE, WIDTH), values(4, 2, KV, WIDTH), jnp.array([2, 2, 1, 2])
    table, start = jnp.array([[4, 0], [3, 5], [2, 1], [1, 2]]), jnp.array([2, 4, 2, 8])  # the last is beyond its table
    expected = np.array(pool)
    for block, offset, row in ((4, 2, 0), (5, 0, 1), (2, 2, 2)):
        expected[block, :, offset : offset + 2] = new[row].swapaxes(0, 1)
    np.testing.assert_array_equal(write(pool, table, start, count, new)[1:], expected[1:])


def test_a_row_without_tokens_writes_nowhere_but_into_block_0():
    pool, table = values(BLOCKS, KV, SIZE, WIDTH), jnp.array([[4, 3]])
    written = write_together(pool, table, jnp.array([4]), jnp.array([0]), values(1, SIZE, KV, WIDTH))
    np.testing.assert_array_equal(written[1:], pool[1:])


def test_both_ways_to_write_a_token_write_the_same():
    pool, new = values(BLOCKS, KV, SIZE, WIDTH), values(2, 3, KV, WIDTH)
    block, offset = jnp.array([[1, 1, 4], [2, 2, 2]]), jnp.array([[2, 3, 0], [0, 1, 2]])
    np.testing.assert_array_equal(*(write(pool, block, offset, new) for write in (by_head, by_token)))


def test_a_row_holds_its_blocks_in_the_order_of_its_table():
    pool = values(BLOCKS, KV, SIZE, WIDTH)
    keys, _ = rows_of_blocks((pool, pool), jnp.array([[3, 0], [5, 5]]))
    assert keys.shape == (2, KV, 2 * SIZE, WIDTH)
    np.testing.assert_array_equal(keys[0, :, :SIZE], pool[3])
    np.testing.assert_array_equal(keys[0, :, SIZE:], pool[0])
    np.testing.assert_array_equal(keys[1, :, :SIZE], pool[5])
