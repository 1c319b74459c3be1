"""The pool of blocks: what is written where, and what a prompt's rows hold."""

import jax.numpy as jnp
import numpy as np

from para_jax.backbone.block_pool import rows_of_blocks, write_blocks

BLOCKS, KV, SIZE, WIDTH = 6, 2, 4, 3


def values(*shape):
    return jnp.asarray(np.random.default_rng(sum(shape)).standard_normal(shape), jnp.float32)


def test_blocks_are_written_where_they_belong_and_nowhere_outside_the_pool():
    pool, new = (values(BLOCKS, KV, SIZE, WIDTH),) * 2, (values(3, KV, SIZE, WIDTH),) * 2
    for held in write_blocks(pool, jnp.array([4, BLOCKS, 1]), new):
        expected = np.array(pool[0])
        expected[[4, 1]] = new[0][jnp.array([0, 2])]
        np.testing.assert_array_equal(held, expected)


def test_a_row_holds_its_blocks_in_the_order_of_its_table():
    pool = values(BLOCKS, KV, SIZE, WIDTH)
    keys, _ = rows_of_blocks((pool, pool), jnp.array([[3, 0], [5, 5]]))
    assert keys.shape == (2, KV, 2 * SIZE, WIDTH)
    np.testing.assert_array_equal(keys[0, :, :SIZE], pool[3])
    np.testing.assert_array_equal(keys[0, :, SIZE:], pool[0])
    np.testing.assert_array_equal(keys[1, :, :SIZE], pool[5])
