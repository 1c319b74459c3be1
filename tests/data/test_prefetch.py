"""Prefetched batches: the same ones in the same order, and no thread is left behind."""

import threading
import time
from contextlib import closing

import numpy as np
import pytest

from para_jax.data.batches import Plan, collate, example_lengths, plan_buckets
from para_jax.data.examples import Example
from para_jax.data.schedule import AHEAD, prefetch


def maker(count=30, rows=4):
    """A function from a batch's number to its examples' indices and the batch; and how many make an epoch."""
    draw = np.random.default_rng(0)
    examples = [Example([i + 1] * int(draw.integers(1, 40)), [i + 1, 2]) for i in range(count)]
    buckets = plan_buckets(examples, 3)
    order = Plan(example_lengths(examples), buckets=buckets, rows=rows, seed=3)

    def make(step):
        bucket, chosen = order.batch_indices(step)
        return chosen, collate([examples[i] for i in chosen], buckets[bucket], rows)

    return make, order.batches_per_epoch


def assert_same(ours, theirs):
    for (mine, batch), (other, wanted) in zip(ours, theirs, strict=True):
        assert mine == other
        for a, b in zip(batch, wanted, strict=True):
            np.testing.assert_array_equal(a, b)


def grain_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]


def wait_until(holds):
    """Waits for other threads, for at most ten seconds."""
    end = time.monotonic() + 10
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    assert holds()


def test_prefetching_keeps_batches_and_order():
    make, epoch = maker()
    total = 3 * epoch  # the threads read over the ends of epochs
    assert_same(prefetch(make, total), [maker()[0](i) for i in range(total)])


def test_an_epoch_covers_every_example_once():
    make, epoch = maker()
    assert sorted(i for chosen, _ in list(prefetch(make, 2 * epoch))[epoch:] for i in chosen) == list(range(30))


def test_batches_are_prepared_ahead_but_not_all_at_once():
    made = []
    with closing(prefetch(lambda step: made.append(step) or step, 100)) as batches:
        for step in range(3):
            assert next(batches) == step
            wait_until(lambda step=step: len(made) == step + 1 + AHEAD)  # while the step runs
            assert sorted(made) == list(range(step + 1 + AHEAD))


@pytest.mark.parametrize("bad", [0, 5])
def test_an_error_is_raised_when_its_batch_is_due(bad):
    def make(step):
        if step == bad:
            raise ValueError(f"data.jsonl:{step}: wrong")
        return step

    seen = []
    with pytest.raises(ValueError) as error:
        for step in prefetch(make, 9):
            seen.append(step)
    assert str(error.value) == f"data.jsonl:{bad}: wrong"
    assert seen == list(range(bad))
    wait_until(lambda: not grain_threads())


@pytest.mark.parametrize("taken", [0, 1, 3])
def test_closing_early_stops_the_threads(taken):
    made = []

    def slow(step):
        time.sleep(0.01)
        made.append(step)
        return step

    with closing(prefetch(slow, 1000)) as batches:
        assert [next(batches) for _ in range(taken)] == list(range(taken))
        assert bool(grain_threads()) == (taken > 0)
    wait_until(lambda: not grain_threads())
    assert len(made) <= taken + AHEAD
