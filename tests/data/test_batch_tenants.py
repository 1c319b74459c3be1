"""Each tenant's share of the batches."""

import numpy as np
import pytest

from para_jax.data.schedule import SAMPLING, batch_shares, next_tenants


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


def test_tenants_of_one_epoch_end_together():
    examples = np.array([40, 80, 120, 160])
    steps, batches = np.zeros(4, int), 0
    while (steps < examples).any():
        chosen = next_tenants(steps, batch_shares(examples, "proportional"), steps < examples, 2)
        assert len(chosen) == 2 or (examples - steps).sum() <= 2
        steps[chosen] += 1
        batches += 1
    assert batches == examples.sum() // 2
