"""Batches ahead of the step that needs them, made by grain's background threads, in the order of their numbers."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import TypeVar

Made = TypeVar("Made")

THREADS = 2
AHEAD = 4  # batches that are ready or in the making


def read(batch: Callable[[int], Made], start: int, total: int) -> Generator[Made, None, None]:
    """Yields batch(start), ..., batch(total - 1), each made before it is asked for; to go on at `start` costs nothing.

    What `batch` raises is raised where the batch is asked for. Close the iterator to stop the threads early
    (`contextlib.closing`).

    Args:
        batch: a pure function of the batch's number; several threads call it at once.
    """
    import grain

    options = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=AHEAD)
    made = iter(grain.MapDataset.range(start, total).map(batch).to_iter_dataset(options))
    try:
        yield from made
    finally:
        made.close()
