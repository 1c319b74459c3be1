"""Padded batches of examples in a few shapes, in an order that is a pure function of (seed, batch number, lengths)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from .example_arrays import arrays_of
from .examples import Example

COMPILING = 20  # steps in the time of one compilation: a few on a CPU, hundreds on an accelerator
MULTIPLE = 8  # padded lengths are multiples of this many tokens


def rounded_up(count: Any, multiple: int = MULTIPLE) -> Any:
    """The number, or an array of them, rounded up to a multiple: by default that of padded lengths."""
    return -(-count // multiple) * multiple


class Batch(NamedTuple):
    """Rows of prompt and completion, padded on the right with token 0.

    A padding row has length 1 and prompt_length 1: no completion token, and so no loss.
    """

    tokens: np.ndarray
    """int32 [rows, T]"""
    prompt_length: np.ndarray
    """int32 [rows]"""
    length: np.ndarray
    """int32 [rows]: prompt and completion"""


class Bucket(NamedTuple):
    """One compiled shape: tokens per row with padding (T), and the largest number of completion tokens in a row."""

    length: int
    completion: int
    prompt: int | None = None
    """the largest number of prompt tokens in a row, with padding; None: as many as the row has"""


def plan_buckets(examples: Sequence[Example], count: int) -> tuple[Bucket, ...]:
    """At most `count` buckets, shortest first, that hold all examples with the least padding in total."""
    return plan_buckets_of_sizes(arrays_of(examples).sizes, count)


def plan_buckets_of_sizes(sizes: np.ndarray, count: int) -> tuple[Bucket, ...]:
    """`plan_buckets` from the tokens of each prompt and completion, [examples, 2]."""
    needed = rounded_up(sizes.sum(axis=1))
    lengths = best_lengths(needed, count)
    shorter = [0, *lengths[:-1]]
    buckets = []
    for a, b in zip(shorter, lengths, strict=True):
        prompt, completion = sizes[(needed > a) & (needed <= b)].max(axis=0).tolist()
        buckets.append(Bucket(b, completion, rounded_up(prompt)))
    return tuple(buckets)


def for_mixed_rows(buckets: Sequence[Bucket]) -> tuple[Bucket, ...]:
    """The buckets, each with room for the prompts and completions of all shorter ones.

    For batches that mix rows of several buckets: all rows then use the longest of these buckets.
    """
    prompts = [bucket.length if bucket.prompt is None else bucket.prompt for bucket in buckets]
    completions = [bucket.completion for bucket in buckets]
    return tuple(
        Bucket(bucket.length, max(completions[:i]), max(prompts[:i])) for i, bucket in enumerate(buckets, start=1)
    )


def collate(examples: Sequence[Example], bucket: Bucket, rows: int) -> Batch:
    """The examples as one batch in the bucket's shape, padded to `rows` rows."""
    most = bucket.length if bucket.prompt is None else bucket.prompt
    assert all(len(prompt) <= most and len(answer) <= bucket.completion for prompt, answer in examples), bucket
    tokens, lengths = right_padded([[*prompt, *completion] for prompt, completion in examples], rows, bucket.length)
    prompt_lengths = np.ones(rows, np.int32)  # 1 for padding rows, whose last token is read too
    prompt_lengths[: len(examples)] = [len(prompt) for prompt, _ in examples]
    return Batch(tokens, prompt_lengths, lengths)


def right_padded(sequences: Sequence[Sequence[int]], rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """The sequences as tokens int32 [rows, length], padded on the right, and their lengths; 1 for rows without one."""
    tokens, lengths = np.zeros((rows, length), np.int32), np.ones(rows, np.int32)
    for i, ids in enumerate(sequences):
        tokens[i, : len(ids)], lengths[i] = ids, len(ids)
    return tokens, lengths


class Plan:
    """The order of training: which examples are in batch i, for every i from 0. Every process computes the same plan.

    An epoch holds every example once: examples are permuted and assigned to buckets, each bucket is cut into batches of
    `rows` (the last may be shorter), and the batches are permuted. Resuming needs only the batch number.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        *,
        buckets: Sequence[Bucket],
        rows: int,
        seed: int,
        shapes: Sequence[Bucket] | None = None,
    ):
        """
        Args:
            lengths: tokens of each example, prompt and completion together (`example_lengths`).
            rows: examples in a global batch, over all devices.
            shapes: the buckets that batches are padded to, if others than those that they are cut by.
        """
        self.bucket_of = assign_buckets(lengths, buckets)
        padded = buckets if shapes is None else shapes
        self.shape_of = assign_buckets([bucket.length for bucket in buckets], padded).tolist()
        self.rows, self.seed = rows, seed
        self.batches_per_epoch = int(sum(-(-n // rows) for n in np.bincount(self.bucket_of)))
        # two epochs, because threads prefetch past the end of one; lru_cache is safe to call from several threads
        self.epoch = lru_cache(2)(lambda epoch: epoch_batches(self.bucket_of, rows, seed, epoch))

    def batch_indices(self, i: int) -> tuple[int, list[int]]:
        """Global batch i: the index of its shape, and the indices of its examples (1 to `rows`)."""
        epoch, position = divmod(i, self.batches_per_epoch)
        bucket, chosen = self.epoch(epoch)[position]
        return self.shape_of[bucket], chosen


def full_batches(
    examples: Sequence[Example], rows: int, buckets: Sequence[Bucket]
) -> Iterator[tuple[list[int], Batch]]:
    """(indices, batch) for every example once, shortest first; for evaluation."""
    lengths = example_lengths(examples)
    order = np.argsort(lengths, kind="stable")
    for index, indices in cut_by_bucket(order, assign_buckets(lengths, buckets), rows):
        yield indices, collate([examples[i] for i in indices], buckets[index], rows)


def example_lengths(examples: Sequence[Example]) -> Sequence[int]:
    """Tokens of each example, prompt and completion together."""
    return arrays_of(examples).lengths.tolist()


def assign_buckets(lengths: Sequence[int], buckets: Sequence[Bucket]) -> np.ndarray:
    """The index of the shortest bucket that holds each length."""
    index = np.searchsorted([bucket.length for bucket in buckets], lengths)
    assert index.max(initial=0) < len(buckets), (max(lengths), buckets)
    return index


def epoch_batches(bucket_of: np.ndarray, rows: int, seed: int, epoch: int) -> list[tuple[int, list[int]]]:
    bits = epoch_bits(seed, epoch)  # both permutations draw from one stream
    batches = list(cut_by_bucket(permutation(bits, len(bucket_of)), bucket_of, rows))
    return [batches[i] for i in permutation(bits, len(batches))]


def epoch_bits(*seed: int) -> np.random.PCG64:
    """A source of raw bits. NumPy keeps their stream the same in all versions, unlike that of its permutations."""
    return np.random.PCG64(np.random.SeedSequence(seed))


def permutation(bits: np.random.PCG64, size: int) -> np.ndarray:
    return np.argsort(bits.random_raw(size), kind="stable")


def cut_by_bucket(order: np.ndarray, bucket_of: np.ndarray, rows: int) -> Iterator[tuple[int, list[int]]]:
    """(bucket, examples) of batches of at most `rows` examples of one bucket. Each bucket keeps the given order."""
    for index in range(int(bucket_of.max(initial=-1)) + 1):
        members = order[bucket_of[order] == index].tolist()
        for start in range(0, len(members), rows):
            yield index, members[start : start + rows]


def lengths_worth_compiling(lengths: np.ndarray, count: int, steps: int) -> int:
    """How many padded lengths, at most `count`, a run should compile its training step for. In one of few steps a
    compilation may take longer than the padding that it saves.

    Args:
        lengths: tokens of each example.
    """
    needed = rounded_up(lengths)
    planned = [np.array(best_lengths(needed, few)) for few in range(1, count + 1)]
    padded = [int(each[np.searchsorted(each, needed)].sum()) for each in planned]
    costs = [few * COMPILING + steps * tokens / padded[-1] for few, tokens in enumerate(padded, 1)]
    return 1 + int(np.argmin(costs))


def best_lengths(needed: np.ndarray, count: int) -> list[int]:
    """At most `count` of the lengths, such that rounding each length up to one of them adds the least padding.

    Exact, by dynamic programming: `cost[j]` is the minimum for the j shortest lengths with the buckets so far.
    """
    lengths, repeats = np.unique(needed, return_counts=True)
    below = np.concatenate([[0], np.cumsum(repeats)])  # examples among the j shortest lengths
    cost, cuts = np.array([0.0] + [np.inf] * len(lengths)), []
    for _ in range(min(count, len(lengths))):
        # entry [i, j]: another bucket, of length lengths[j - 1], for the lengths from i to j
        step = cost[:, None] + (below[None, :] - below[:, None]) * np.concatenate([[0], lengths])[None, :]
        step[np.tril_indices(len(cost))] = np.inf  # a bucket holds at least one length
        cuts.append(step.argmin(axis=0))
        cost = step.min(axis=0)
    best, j = [], len(lengths)
    for cut in reversed(cuts):  # from the longest bucket down
        best.append(int(lengths[j - 1]))
        j = int(cut[j])
    return best[::-1]
