"""Prepares batches in background threads (grain's), ahead of the step that needs them and in order."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

Item = TypeVar("Item")

THREADS = 2
AHEAD = 4  # batches that are ready or being prepared


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
