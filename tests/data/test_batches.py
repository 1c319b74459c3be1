from itertools import combinations

import numpy as np
import pytest

from para_jax.data.batches import (
    Bucket,
    Plan,
    collate,
    example_lengths,
    full_batches,
    lengths_worth_compiling,
    plan_buckets,
)
from para_jax.data.examples import Example


def examples(count=60, seed=0, longest=90):
    draw = np.random.default_rng(seed)
    sizes = [(int(draw.integers(1, longest)), int(draw.integers(1, 12))) for _ in range(count)]
    return [Example(list(range(1, p + 1)), list(range(100, 100 + c))) for p, c in sizes]


def padded_tokens(lengths, buckets):
    return sum(min(b for b in buckets if b >= n) for n in lengths)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_the_planned_lengths_pad_least_of_all_choices(count, seed):
    made = examples(20, seed, longest=50)
    lengths = example_lengths(made)
    rounded = sorted({-(-n // 8) * 8 for n in lengths})
    planned = [bucket.length for bucket in plan_buckets(made, count)]
    others = [(*some, rounded[-1]) for some in combinations(rounded[:-1], min(count, len(rounded)) - 1)]
    assert len(planned) <= count and set(planned) <= set(rounded) and planned[-1] == rounded[-1]
    assert padded_tokens(lengths, planned) == min(padded_tokens(lengths, other) for other in others)


def test_a_short_run_compiles_for_fewer_lengths_than_a_long_one():
    """A compilation of minutes must save more padding than it costs, which a run of 66 steps has too little of."""
    lengths = np.clip(np.random.default_rng(0).lognormal(3.5, 0.4, 2000), 4, 400).astype(int)
    counts = [lengths_worth_compiling(lengths, 3, steps) for steps in (1, 5, 66, 1000, 10**6)]
    assert counts[:3] == [1, 1, 2] and counts[3:] == [3, 3]
    assert lengths_worth_compiling(np.full(9, 30), 3, 10**6) == lengths_worth_compiling(lengths, 1, 10**6) == 1


def test_few_different_lengths_need_few_buckets():
    assert plan_buckets([Example([1] * 5, [1]), Example([1] * 6, [1, 1])], 3) == (Bucket(8, 2, 8),)
    assert plan_buckets([Example([1] * 5, [1]), Example([1] * 9, [1] * 4)], 3) == (Bucket(8, 1, 8), Bucket(16, 4, 16))


def test_a_batch_holds_prompt_then_completion_and_pads_right():
    batch = collate([Example([5, 6, 7], [8, 9]), Example([4], [3])], Bucket(8, 2), rows=3)
    assert batch.tokens.tolist() == [[5, 6, 7, 8, 9, 0, 0, 0], [4, 3, 0, 0, 0, 0, 0, 0], [0] * 8]
    assert batch.prompt_length.tolist() == [3, 1, 1] and batch.length.tolist() == [5, 2, 1]
    assert all(array.dtype == np.int32 for array in batch)


@pytest.mark.parametrize("rows", [1, 7, 16, 100])
def test_an_epoch_holds_every_example_once_in_its_bucket(rows):
    made = examples()
    buckets = plan_buckets(made, 3)
    order = Plan(example_lengths(made), buckets=buckets, rows=rows, seed=1)
    for epoch in range(2):
        first = epoch * order.batches_per_epoch
        batches = [order.batch_indices(first + i) for i in range(order.batches_per_epoch)]
        assert sorted(i for _, indices in batches for i in indices) == list(range(len(made)))
        for bucket, indices in batches:
            assert 1 <= len(indices) <= rows
            collate([made[i] for i in indices], buckets[bucket], rows)


def test_a_batch_depends_only_on_seed_and_number():
    lengths, buckets = example_lengths(examples()), plan_buckets(examples(), 3)
    new = lambda seed=1: Plan(lengths, buckets=buckets, rows=8, seed=seed)  # noqa: E731
    order = new()
    forwards = [order.batch_indices(i) for i in range(3 * order.batches_per_epoch)]
    assert [new().batch_indices(i) for i in reversed(range(len(forwards)))] == forwards[::-1]
    assert [new(2).batch_indices(i) for i in range(len(forwards))] != forwards


def test_the_order_of_a_seed_never_changes():
    order = Plan([4] * 8, buckets=[Bucket(8, 1)], rows=3, seed=7)
    assert [order.batch_indices(i)[1] for i in range(3)] == [[5, 1], [0, 2, 7], [6, 3, 4]]


@pytest.mark.parametrize("rows", [1, 8, 100])
def test_evaluation_sees_every_example_once_shortest_first(rows):
    made = examples(30)
    buckets = plan_buckets(made, 3)
    batches = list(full_batches(made, rows, buckets))
    seen = [i for indices, _ in batches for i in indices]
    assert sorted(seen) == list(range(30)) and np.all(np.diff(np.array(example_lengths(made))[seen]) >= 0)
    for indices, batch in batches:
        assert batch.tokens.shape[0] == rows and batch.tokens.shape[1] in [b.length for b in buckets]
        for row, i in enumerate(indices):
            assert batch.tokens[row, : batch.length[row]].tolist() == made[i].prompt_ids + made[i].completion_ids
        assert (batch.length[len(indices) :] == 1).all()
