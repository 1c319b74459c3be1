"""Whose examples each step of a mixed run holds: a pure function of where the run stands, made ahead of the steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from threading import Lock
from typing import NamedTuple

import numpy as np

from .batches import Batch, Bucket, Plan, collate
from .examples import Example
from .tenants import next_tenants


class Order(NamedTuple):
    """One tenant's examples, and which of them each of its own steps holds."""

    examples: Sequence[Example]
    plan: Plan
    total_steps: int


class Turn(NamedTuple):
    """A tenant's part in one step of the run."""

    tenant: int
    slot: int
    """its place in the stack of those whose weights are on the devices"""
    step: int
    """how many steps it did before"""


class Mixed(NamedTuple):
    """The batch of one step: arrays of NumPy."""

    turns: list[Turn]
    bucket: Bucket
    batch: Batch
    """arrays [passes, groups * rows of a group, ...]"""
    slots: np.ndarray
    """int32 [passes, groups], whose the rows of each group are; -1 for none"""
    tokens: int
    """without padding"""


def admitted(slots: Sequence[int], ended: Sequence[bool]) -> list[int]:
    """The tenant in each slot (-1: none) when those that wait, in their order, have taken the free ones."""
    held_already = set(slots)
    waiting = (t for t in range(len(ended)) if not ended[t] and t not in held_already)
    return [next(waiting, -1) if held < 0 else held for held in slots]


class Turns:
    """Mixed batches from a given state of the run on, while no tenant ends before its last step."""

    def __init__(
        self,
        orders: Sequence[Order],
        buckets: Sequence[Bucket],
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
            shares: each tenant's share of the batches, float64 [tenants].
            groups: the most tenants of a batch; each has `rows` rows in each of `passes` passes.
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

    def batch(self, i: int) -> Mixed | None:
        """The batch of step i from here on, once; None after the last one. Several threads may call this at once."""
        with self.lock:
            while self.known <= i:
                self.made[self.known] = next(self.coming, [])
                self.known += 1
            chosen = self.made.pop(i)
        return self.collated(chosen) if chosen else None

    def collated(self, chosen: list[Turn]) -> Mixed:
        picked = [self.orders[turn.tenant].plan.batch_indices(turn.step) for turn in chosen]
        bucket = self.buckets[max(index for index, _ in picked)]
        parts = [
            collate([self.orders[turn.tenant].examples[e] for e in examples], bucket, self.rows * self.passes)
            for turn, (_, examples) in zip(chosen, picked, strict=True)
        ]
        parts += [collate([], bucket, self.rows * self.passes)] * (self.groups - len(parts))
        by_pass = [by_passes(part, self.passes, self.rows) for part in parts]
        batch = Batch(*(np.concatenate(arrays, axis=1) for arrays in zip(*by_pass, strict=True)))
        slots = np.array([turn.slot for turn in chosen] + [-1] * (self.groups - len(chosen)), np.int32)
        tokens = sum(int(part.length[: len(e)].sum()) for part, (_, e) in zip(parts, picked, strict=False))
        return Mixed(chosen, bucket, batch, np.tile(slots, (self.passes, 1)), tokens)


def by_passes(batch: Batch, passes: int, rows: int) -> Batch:
    return Batch(*(array.reshape(passes, rows, *array.shape[1:]) for array in batch))


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
    one that waits, also one that a run which was stopped right then still holds.

    Args:
        length: from a tenant and one of its steps to the padded length of that step's rows.
    """
    ended = [done or step >= total for done, step, total in zip(ended, steps, totals, strict=True)]
    lengths = [0] * len(steps)  # of each tenant's next rows, where it has a slot
    held: dict[int, int] = {}
    while True:
        slots = admitted([-1 if t >= 0 and ended[t] else t for t in slots], ended)
        if max(slots) < 0:
            return
        before, held = held, {tenant: slot for slot, tenant in enumerate(slots) if tenant >= 0}
        for t in held.keys() - before.keys():
            lengths[t] = length(t, steps[t])
        chosen = next_tenants(steps, shares, [t in held for t in range(len(steps))], groups, lengths)
        yield sorted((Turn(t, held[t], steps[t]) for t in chosen), key=lambda turn: turn.slot)
        for t in chosen:
            steps[t] += 1
            ended[t] = steps[t] >= totals[t]
            if not ended[t]:
                lengths[t] = length(t, steps[t])
