"""An error refers to the frames of the functions that it has left, and they to all that these functions held."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager


def forget_frames(error: BaseException | None) -> None:
    """Empties the frames of an error and of those before it, so that whoever keeps the error keeps nothing else."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__context__


@contextmanager
def errors_forget() -> Iterator[None]:
    """Lets errors of a function that it decorates keep no arrays. A notebook keeps the last error, so the next cell
    would find the devices full of what this one had loaded."""
    try:
        yield
    except BaseException as error:
        forget_frames(error)
        raise
