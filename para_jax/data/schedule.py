"""Which tenants' examples each step of a run holds: a pure function of where the run stands, made ahead of time in
background threads."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from threading import Lock
from typing import NamedTuple, TypeVar

import numpy as np

from .batches import Batch, Bucket, Plan, collate
from .examples import Example
from .packing import Packed, PackingPlan, RowShape, collate_packed

Item = TypeVar("Item")

THREADS = 2
AHEAD = 4  # batches that are ready or being prepared
#: How a tenant's share of the batches grows with its number of examples.
SAMPLING = {"proportional": 1.0, "sqrt": 0.5, "uniform": 0.0}
#: How many of its own steps a tenant may be early or late, so that rows of one padded length can share a batch. With 2,
#: 64 tenants of different lengths in 16 groups cost at most 5 % more tokens than alone. Ignoring lengths costs 90 to
#: 120 % more.
SLACK = 2


class TenantOrder(NamedTuple):
    """One tenant's examples, and which of them each of its own steps holds."""

    examples: Sequence[Example]
    plan: Plan | PackingPlan
    total_steps: int

    def batch(self, step: int, bucket: Bucket | RowShape, rows: int) -> tuple[Batch | Packed, int]:
        """The batch of one of its steps, arrays [rows, ...], and how many tokens it holds without padding."""
        if isinstance(self.plan, PackingPlan):
            assert isinstance(bucket, RowShape)
            packed = collate_packed([[self.examples[i] for i in r] for r in self.plan.batch_rows(step)], bucket, rows)
            return packed, int((packed.segment >= 0).sum())
        assert isinstance(bucket, Bucket)
        _, chosen = self.plan.batch_indices(step)
        batch = collate([self.examples[i] for i in chosen], bucket, rows)
        return batch, int(batch.length[: len(chosen)].sum())


class Turn(NamedTuple):
    """A tenant's part in one step of the run."""

    tenant: int
    slot: int
    """its place in the stack of those whose weights are on the devices"""
    step: int
    """how many steps it did before"""


class StepBatch(NamedTuple):
    """The batch of one step: arrays of NumPy."""

    turns: list[Turn]
    bucket: Bucket | RowShape
    batch: Batch | Packed
    """arrays [passes, groups * rows of a group, ...]"""
    tenant_of_group: np.ndarray
    """int32 [passes, groups], the slot of each group's tenant; -1 for none"""
    tokens: int
    """without padding"""


def admitted(slots: Sequence[int], ended: Sequence[bool]) -> list[int]:
    """The tenant in each slot (-1: none) after those that wait, in their order, have taken the slots that are empty or
    whose tenant has ended."""
    held_already = set(slots)
    waiting = (t for t in range(len(ended)) if not ended[t] and t not in held_already)
    return [next(waiting, held) if held < 0 or ended[held] else held for held in slots]  # else it stays


class Schedule:
    """The batches of a run's steps, from a given state on. They hold while no tenant ends before its last step."""

    def __init__(
        self,
        orders: Sequence[TenantOrder],
        buckets: Sequence[Bucket | RowShape],
        shares: np.ndarray,
        *,
        groups: int,
        rows: int,
        passes: int,
        steps: Sequence[int],
        slots: Sequence[int],
        ended: Sequence[bool],
    ):
        """
        Args:
            buckets: the compiled shapes; of packed rows there is one.
            shares: each tenant's share of the batches, float64 [tenants].
            groups: the maximum number of tenants in a batch; each has `rows` rows in each of `passes` passes.
            steps, ended: of each tenant, so far.
            slots: the tenant in each slot; -1: none.
        """
        self.orders, self.buckets = orders, buckets
        self.groups, self.rows, self.passes = groups, rows, passes
        lengths = [bucket.length for bucket in self.buckets]
        next_length = lambda tenant, step: lengths[orders[tenant].plan.batch_indices(step)[0]]  # noqa: E731
        totals = [order.total_steps for order in orders]
        self.coming = turns(shares, groups, totals, list(steps), list(slots), list(ended), next_length)
        self.made: dict[int, list[Turn]] = {}
        self.known, self.lock = 0, Lock()

    def batch(self, i: int) -> StepBatch | None:
        """The batch of step i from here on, once; None after the last one. Several threads may call this at once."""
        with self.lock:
            while self.known <= i:
                self.made[self.known] = next(self.coming, [])  # in order, whichever thread asks
                self.known += 1
            chosen = self.made.pop(i)  # once: the arrays would pile up
        return self.collated(chosen) if chosen else None  # without the lock: this is the slow part

    def collated(self, chosen: list[Turn]) -> StepBatch:
        bucket = self.buckets[max(self.orders[turn.tenant].plan.batch_indices(turn.step)[0] for turn in chosen)]
        rows = self.rows * self.passes
        made = [self.orders[turn.tenant].batch(turn.step, bucket, rows) for turn in chosen]
        filling = collate([], bucket, rows) if isinstance(bucket, Bucket) else collate_packed([], bucket, rows)
        parts = [batch for batch, _ in made] + [filling] * (self.groups - len(made))
        by_pass = [[a.reshape(self.passes, self.rows, *a.shape[1:]) for a in part] for part in parts]
        batch = type(parts[0])(*(np.concatenate(arrays, axis=1) for arrays in zip(*by_pass, strict=True)))
        slots = np.array([turn.slot for turn in chosen] + [-1] * (self.groups - len(chosen)), np.int32)
        return StepBatch(chosen, bucket, batch, np.tile(slots, (self.passes, 1)), sum(tokens for _, tokens in made))


def turns(
    shares: np.ndarray,
    groups: int,
    totals: list[int],
    steps: list[int],
    slots: list[int],
    ended: list[bool],
    length: Callable[[int, int], int],
) -> Iterator[list[Turn]]:
    """Each step's turns, in the order of their slots. A tenant that has done its last step leaves its slot to the next
    one that waits, also where a run was stopped before it could.

    Args:
        length: from a tenant and one of its steps to the padded length of that step's rows.
    """
    ended = [done or step >= total for done, step, total in zip(ended, steps, totals, strict=True)]
    lengths = [0] * len(steps)  # of each tenant's next rows, where it has a slot
    held: dict[int, int] = {}
    while True:
        slots = admitted(slots, ended)
        before, held = held, {t: slot for slot, t in enumerate(slots) if t >= 0 and not ended[t]}
        if not held:
            return
        for t in held.keys() - before.keys():  # those that have just got a slot
            lengths[t] = length(t, steps[t])
        chosen = next_tenants(steps, shares, [t in held for t in range(len(steps))], groups, lengths)
        yield sorted((Turn(t, held[t], steps[t]) for t in chosen), key=lambda turn: turn.slot)
        for t in chosen:
            steps[t] += 1
            ended[t] = steps[t] >= totals[t]
            if not ended[t]:
                lengths[t] = length(t, steps[t])


# ------------------------------------------------------------------------------------- which tenants share a batch


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
    if lengths is None or len(order) <= groups:  # all of them, or no padding to save
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
        if length < shortest:  # those that are due would not fit
            continue
        fit = free[lengths[free] <= length]
        fit = fit[np.argsort(-lengths[fit], kind="stable")]
        chosen = np.concatenate([due, fit])[:groups]
        filled = lengths[chosen].sum() / (groups * length)
        if filled > most_filled:  # of equal ones the shortest batch
            most_filled, best = filled, chosen
    return best.tolist()


# ------------------------------------------------------------------------------------------------ ahead of time


def prefetch(batch: Callable[[int], Item], total: int) -> Generator[Item, None, None]:
    """Yields batch(0), ..., batch(total - 1), each prepared before it is needed.

    An error in `batch` is raised when its result is due. Close the iterator to stop the threads early
    (`contextlib.closing`).

    Args:
        batch: a pure function of the batch's number. Several threads call it at once.
    """
    import grain

    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    batches = iter(grain.MapDataset.range(total).map(batch).to_iter_dataset(options))
    try:
        yield from batches
    finally:
        batches.close()
