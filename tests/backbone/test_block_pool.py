"""The pool of blocks: what is written where, and what a prompt's rows hold."""

import jax.numpy as jnp
import numpy as np

from para_jax.backbone.block_pool import rows_of_blocks, with_last, write_blocks

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


def test_last_tokens_take_their_places_and_nothing_stays_behind_the_end():
    rows, new = values(4, KV, 8, WIDTH), values(4, KV, 3, WIDTH)
    rows = rows.at[:, :, 7].set(jnp.nan)
    length, replaced = np.array([7, 5, 2, 0]), np.array([3, 1, 2, 0])
    keys, _ = with_last((rows, rows), (new, new), jnp.asarray(length), jnp.asarray(replaced))
    for row, (end, count) in enumerate(zip(length, replaced, strict=True)):
        expected = np.zeros((KV, 8, WIDTH), np.float32)
        expected[:, : end - count] = rows[row, :, : end - count]
        expected[:, end - count : end] = new[row, :, 3 - count :]
        np.testing.assert_array_equal(keys[row], expected)
