"""Packing holds every example once, in rows that never overflow, and is the same wherever it is asked for."""

from itertools import chain

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from para_jax.data.examples import Example
from para_jax.data.packing import RowShape, collate_packed, first_fit, plan_packing

LENGTHS = st.lists(st.integers(2, 40), min_size=1, max_size=60)


def examples_of(lengths, completion=1):
    return [Example([5] * (n - completion), [7] * completion) for n in lengths]


@given(LENGTHS, st.integers(0, 3), st.integers(1, 5))
def test_every_epoch_holds_every_example_once_and_no_row_overflows(lengths, seed, rows):
    plan = plan_packing(examples_of(lengths), length=40, rows=rows, seed=seed)
    for epoch in range(2):
        batches = [plan.batch_rows(epoch * plan.batches_per_epoch + i) for i in range(plan.batches_per_epoch)]
        assert all(1 <= len(batch) <= rows for batch in batches)
        held = list(chain(*batches))
        assert sorted(chain(*held)) == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in row) <= plan.shape.length for row in held)
        assert max(map(len, held)) == plan.shape.segments


def test_a_row_takes_the_longest_that_fits_it():
    lengths = np.array([3, 9, 5, 4, 2])
    assert first_fit(np.arange(5), lengths, 10) == [[1], [2, 3], [0, 4]]


def test_batches_are_a_pure_function_of_seed_and_number():
    lengths = np.random.default_rng(0).integers(4, 30, 500).tolist()
    ours, theirs = (plan_packing(examples_of(lengths), length=64, rows=8, seed=3) for _ in range(2))
    later = [theirs.batch_rows(i) for i in (70, 3, 0)]  # asked for in any order
    assert [ours.batch_rows(i) for i in (0, 3, 70)] == later[::-1]
    assert ours.batch_rows(0) != ours.batch_rows(ours.batches_per_epoch)  # epochs differ
    other = plan_packing(examples_of(lengths), length=64, rows=8, seed=4)
    assert other.batch_rows(0) != ours.batch_rows(0)
    assert ours.batch_indices(3) == (0, list(chain(*ours.batch_rows(3))))


def test_a_packed_row_holds_its_examples_and_where_they_stand():
    examples = [Example([5, 6, 7], [8]), Example([9], [10, 11]), Example([12, 13], [14, 15])]
    batch = collate_packed([[examples[0], examples[1]], [examples[2]]], RowShape(8, 3, 2), rows=3)
    np.testing.assert_array_equal(batch.tokens, [[5, 6, 7, 8, 9, 10, 11, 0], [12, 13, 14, 15, 0, 0, 0, 0], [0] * 8])
    np.testing.assert_array_equal(batch.segment, [[0, 0, 0, 0, 1, 1, 1, -1], [0] * 4 + [-1] * 4, [-1] * 8])
    np.testing.assert_array_equal(batch.start, [[0, 4], [0, 0], [0, 0]])
    np.testing.assert_array_equal(batch.prompt_length, [[3, 1], [2, 1], [1, 1]])
    np.testing.assert_array_equal(batch.length, [[4, 3], [4, 1], [1, 1]])
    np.testing.assert_array_equal(batch.predicted, [[3, 5, 6], [2, 3, 0], [0, 0, 0]])
