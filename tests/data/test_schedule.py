"""Which tenants are in which step of a run: a pure function of where the run stands."""

import threading
import time
from collections import Counter
from contextlib import closing

import numpy as np
import pytest

from para_jax.data.batches import Bucket, Plan, best_lengths, example_lengths, for_mixed_rows, plan_buckets
from para_jax.data.examples import Example
from para_jax.data.schedule import (
    AHEAD,
    SAMPLING,
    SLACK,
    Schedule,
    TenantOrder,
    admitted,
    batch_shares,
    next_tenants,
    prefetch,
    turns,
)

BUCKETS = (Bucket(8, 4), Bucket(16, 4))
SIZES = (20, 6, 11, 1, 9)
ROWS, GROUPS, PASSES = 2, 3, 2


def orders(sizes=SIZES, epochs=2):
    made = []
    for tenant, size in enumerate(sizes):
        draw = np.random.default_rng(tenant)
        examples = [
            Example([100 * tenant + i] * int(draw.integers(2, 12)), [7] * int(draw.integers(1, 5))) for i in range(size)
        ]
        order = Plan(example_lengths(examples), buckets=BUCKETS, rows=ROWS * PASSES, seed=0)
        made.append(TenantOrder(examples, order, epochs * order.batches_per_epoch))
    return made


def turns_from(steps, slots, ended, sampling="proportional", made=None):
    made = made or orders()
    shares = batch_shares([len(order.examples) for order in made], sampling)
    return Schedule(
        made, BUCKETS, shares, groups=GROUPS, rows=ROWS, passes=PASSES, steps=steps, slots=slots, ended=ended
    )


def all_batches(coming):
    found = []
    while (batch := coming.batch(len(found))) is not None:
        found.append(batch)
    return found


def fresh(slots=5, **options):
    return turns_from([0] * 5, [-1] * slots, [False] * 5, **options)


@pytest.mark.parametrize("slots", [5, 3, 1])
@pytest.mark.parametrize("sampling", ["proportional", "uniform"])
def test_every_tenant_does_its_own_steps_in_order_whoever_else_there_is(slots, sampling):
    made = orders()
    seen = {tenant: [] for tenant in range(5)}
    for mixed in all_batches(fresh(slots, sampling=sampling)):
        assert len({turn.tenant for turn in mixed.turns}) == len(mixed.turns) <= min(GROUPS, slots)
        assert [turn.slot for turn in mixed.turns] == sorted({turn.slot for turn in mixed.turns})
        for turn in mixed.turns:
            seen[turn.tenant].append(turn.step)
    assert seen == {tenant: list(range(order.total_steps)) for tenant, order in enumerate(made)}


def test_a_batch_holds_each_tenants_own_rows_in_its_group_and_filling_in_the_rest():
    made, taken = orders(), Counter()
    for mixed in all_batches(fresh()):
        assert mixed.batch.tokens.shape == (PASSES, GROUPS * ROWS, mixed.bucket.length)
        assert mixed.tenant_of_group.shape == (PASSES, GROUPS) and mixed.bucket in BUCKETS
        real = 0
        for group in range(GROUPS):
            rows = slice(group * ROWS, (group + 1) * ROWS)
            tokens, lengths = mixed.batch.tokens[:, rows], mixed.batch.length[:, rows]
            if group >= len(mixed.turns):
                assert (lengths == 1).all() and (mixed.tenant_of_group[:, group] == -1).all()
                continue
            turn = mixed.turns[group]
            assert (mixed.tenant_of_group[:, group] == turn.slot).all()
            _, chosen = made[turn.tenant].plan.batch_indices(turn.step)
            flat, flat_lengths = tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1)
            for row, example in enumerate(chosen):
                prompt, completion = made[turn.tenant].examples[example]
                assert flat[row, : flat_lengths[row]].tolist() == [*prompt, *completion]
                real += len(prompt) + len(completion)
                taken[turn.tenant] += 1
            assert (flat_lengths[len(chosen) :] == 1).all()
        assert mixed.tokens == real
    assert dict(taken) == {tenant: 2 * size for tenant, size in enumerate(SIZES)}  # two epochs


@pytest.mark.parametrize("slots", [5, 2])
@pytest.mark.parametrize("after", [1, 4, 9])
def test_from_where_a_run_stands_it_goes_on_as_it_would_have(slots, after):
    made, whole = orders(), all_batches(fresh(slots))
    steps, held, ended = [0] * 5, [-1] * slots, [False] * 5
    for mixed in whole[:after]:
        held = admitted(held, ended)
        for turn in mixed.turns:
            assert held[turn.slot] == turn.tenant
            steps[turn.tenant] += 1
            ended[turn.tenant] = steps[turn.tenant] == made[turn.tenant].total_steps
    rest = all_batches(turns_from(steps, held, ended))
    assert [mixed.turns for mixed in rest] == [mixed.turns for mixed in whole[after:]]
    for ours, theirs in zip(rest, whole[after:], strict=True):
        np.testing.assert_array_equal(ours.batch.tokens, theirs.batch.tokens)


def test_a_tenant_that_ended_is_never_in_a_batch_and_its_slot_goes_to_the_next():
    found = all_batches(turns_from([3, 0, 0, 0, 0], [-1, 1], [True, False, False, False, False]))
    assert all(turn.tenant != 0 for mixed in found for turn in mixed.turns)
    assert found[0].turns[0] == (2, 0, 0)  # tenant 2 takes slot 0, tenant 1 keeps slot 1
    assert admitted([-1, 1, -1], [True, False, True, False, False]) == [3, 1, 4]
    assert admitted([-1, 1], [True, False, True, True, True]) == [-1, 1]
    assert admitted([0, 1], [True, False, False, True, True]) == [2, 1]
    assert admitted([0, 1], [True, False, True, True, True]) == [0, 1]  # nobody waits


def test_batches_may_be_asked_for_out_of_order():
    ours, theirs = fresh(), all_batches(fresh())
    last = len(theirs) - 1
    assert ours.batch(last + 3) is None
    assert ours.batch(last).turns == theirs[last].turns and ours.batch(0).turns == theirs[0].turns


def test_rows_of_long_completions_and_of_long_prompts_go_into_one_batch():
    """One tenant has short prompts and long completions, the other the contrary: their buckets were planned apart."""
    tenants = [[Example([1] * 2, [2] * 12)] * 4, [Example([1] * 40, [2] * 2)] * 4]
    planned = plan_buckets([example for each in tenants for example in each], 3)
    assert planned == (Bucket(16, 12, 8), Bucket(48, 2, 40))
    buckets = for_mixed_rows(planned)
    made = [TenantOrder(each, Plan(example_lengths(each), buckets=buckets, rows=2, seed=0), 2) for each in tenants]
    shares = batch_shares([4, 4], "uniform")
    start = dict(steps=[0, 0], slots=[-1, -1], ended=[False, False])
    mixed = Schedule(made, buckets, shares, groups=2, rows=2, passes=1, **start).batch(0)
    assert mixed is not None and mixed.bucket == Bucket(48, 12, 40)
    assert (mixed.batch.length - mixed.batch.prompt_length).tolist() == [[12, 12, 2, 2]]


# ---------------------------------------------------------------------------------------------------- varied lengths

TENANTS, EXAMPLES, TENANT_ROWS = 64, 64, 4


def of_varied_lengths(sigma, sizes=(EXAMPLES,) * TENANTS):
    """Tenants whose examples have lengths around 120 tokens, three buckets, and each with an order of its own."""
    draw = np.random.default_rng(0)
    lengths = [np.clip(np.rint(draw.lognormal(np.log(120), sigma, size)), 8, 512).astype(int) for size in sizes]
    padded = np.concatenate(lengths) + 7 & ~7
    buckets = tuple(Bucket(length, 1) for length in best_lengths(padded, 3))
    made = []
    for tenant, own in enumerate(lengths):
        order = Plan(own.tolist(), buckets=buckets, rows=TENANT_ROWS, seed=tenant)
        made.append(TenantOrder([Example([], [])] * len(own), order, order.batches_per_epoch))
    return made, buckets


def all_turns(made, buckets, groups):
    shares = batch_shares([len(order.examples) for order in made], "proportional")
    length = lambda tenant, step: buckets[made[tenant].plan.batch_indices(step)[0]].length  # noqa: E731
    count, totals = len(made), [order.total_steps for order in made]
    return shares, list(turns(shares, groups, totals, [0] * count, [-1] * count, [False] * count, length)), length


@pytest.mark.parametrize("sigma", [0.3, 0.6, 0.9])
@pytest.mark.parametrize("groups", [4, 16])
def test_mixed_batches_cost_little_more_tokens_than_the_tenants_alone(sigma, groups):
    _, chosen, length = all_turns(*of_varied_lengths(sigma), groups)
    each = [[length(turn.tenant, turn.step) for turn in batch] for batch in chosen]
    assert sum(groups * max(lengths) for lengths in each) <= 1.15 * sum(map(sum, each))


@pytest.mark.parametrize("groups", [4, 16])
@pytest.mark.parametrize("sizes", [(EXAMPLES,) * TENANTS, (40, 90, 160, 250) * 16], ids=["equal", "unequal"])
def test_whatever_the_lengths_each_tenant_stays_near_its_share_in_any_window(sizes, groups):
    shares, chosen, _ = all_turns(*of_varied_lengths(0.9, sizes), groups)
    taken = np.zeros((len(chosen) + 1, len(sizes)))
    for i, batch in enumerate(chosen):
        taken[i + 1] = taken[i]
        taken[i + 1, [turn.tenant for turn in batch]] += 1
    taken = taken[: int((taken < taken[-1]).all(axis=1).sum())]  # while nobody has ended
    assert len(taken) > 0.7 * len(chosen)
    ahead = taken - shares * taken.sum(axis=1, keepdims=True)
    assert np.abs(ahead).max() <= 2 * SLACK + 1
    assert np.ptp(ahead, axis=0).max() <= 2 * (2 * SLACK + 1)  # from any batch to any other


def drawn(examples, sampling, groups, batches, running=None):
    steps = np.zeros(len(examples), int)
    for _ in range(batches):
        steps[next_tenants(steps, batch_shares(examples, sampling), running or [True] * len(examples), groups)] += 1
    return steps


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("groups", [1, 2])
def test_every_tenant_has_its_share_of_the_batches_at_any_time(sampling, groups):
    examples = np.array([100, 400, 400, 900, 1600])
    shares = {"proportional": examples, "sqrt": np.sqrt(examples), "uniform": np.ones(5)}[sampling]
    for batches in (7, 50, 300):
        found = drawn(examples, sampling, groups, batches)
        assert found.sum() == groups * batches
        assert np.abs(found - groups * batches * shares / shares.sum()).max() <= 1.5


def test_a_finished_tenant_leaves_its_rows_to_the_others():
    shares = batch_shares([10, 10, 1000], "proportional")
    assert sorted(next_tenants([5, 5, 5], shares, [True] * 3, 8)) == [0, 1, 2]
    assert drawn([10, 10, 1000], "proportional", 2, 50, running=[True, True, False]).tolist() == [50, 50, 0]
    assert next_tenants([1, 1, 1], shares, [False] * 3, 2) == []


# -------------------------------------------------------------------------------------------------------- prefetching


def grain_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("grain")]


def wait_until(holds):
    """Waits for other threads, for at most ten seconds."""
    end = time.monotonic() + 10
    while not holds() and time.monotonic() < end:
        time.sleep(0.005)
    assert holds()


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
