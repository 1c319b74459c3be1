"""Which tenants share a batch: those furthest behind their share, and those whose rows have the same length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

#: How a tenant's share of the batches grows with its number of examples.
SAMPLING = {"proportional": 1.0, "sqrt": 0.5, "uniform": 0.0}
#: How many of its own steps a tenant may be early or late, so that rows of one padded length can share a batch. With 2,
#: 64 tenants of different lengths in 16 groups cost at most 5 % more tokens than alone. Ignoring lengths costs 90 to
#: 120 % more.
SLACK = 2


def batch_shares(examples: Sequence[int], sampling: str) -> np.ndarray:
    """Each tenant's share of the batches, float64 [tenants], from its number of examples.

    Args:
        sampling: a key of SAMPLING.
    """
    raised = np.asarray(examples, np.float64) ** SAMPLING[sampling]
    return raised / raised.sum()


def next_tenants(
    steps: Sequence[int], shares: np.ndarray, running: Sequence[bool], groups: int, lengths: Sequence[int] | None = None
) -> list[int]:
    """The tenants in the next batch, each at most once and at most `groups` of them: those furthest behind their share,
    but tenants whose next rows have the same padded length go together if that saves padding.

    The reference is the tenant that would get the last group if lengths were ignored. A tenant runs at most SLACK steps
    ahead of it, and one that is SLACK steps behind it is always in the batch. Each tenant therefore stays within
    2 * SLACK + 1 steps of its share, unless its share exceeds one group of every batch.

    The result depends only on the arguments, so a resumed run continues as it would have. Tenants that have finished
    leave their groups to the others.

    Args:
        steps: optimiser steps of each tenant so far.
        running: which tenants have not finished.
        lengths: the padded length of each tenant's next rows; None if all are equal.
    """
    behind = (np.asarray(steps) + 0.5) / shares  # Webster's method; ties go to the first
    order = np.argsort(np.where(running, behind, np.inf), kind="stable")[: np.count_nonzero(running)]
    if lengths is None or len(order) <= groups:
        return order[:groups].tolist()
    late = (behind[order[groups - 1]] - behind[order]) * shares[order]  # in each tenant's own steps
    due, free = order[late >= SLACK], order[(-SLACK <= late) & (late < SLACK)]
    return cheapest(due, free, np.asarray(lengths), groups)


def cheapest(due: np.ndarray, free: np.ndarray, lengths: np.ndarray, groups: int) -> list[int]:
    """All tenants that are due and some that are free, chosen for the batch with the smallest share of padding.

    Args:
        due, free: tenants, furthest behind first. There are fewer than `groups` due, and at least `groups` in total.
        lengths: of each tenant's next rows. A batch is as long as its longest rows.
    """
    most_filled, best = -1.0, due
    shortest = lengths[due].max(initial=0)
    for length in np.unique(lengths[np.concatenate([due, free])]):
        if length < shortest:
            continue
        fit = free[lengths[free] <= length]
        fit = fit[np.argsort(-lengths[fit], kind="stable")]
        chosen = np.concatenate([due, fit])[:groups]
        filled = lengths[chosen].sum() / (groups * length)
        if filled > most_filled:
            most_filled, best = filled, chosen
    return best.tolist()
