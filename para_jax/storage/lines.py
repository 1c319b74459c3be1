"""A file of lines in a bucket that one process adds to, a piece every few seconds."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack

from .bucket import BucketPath
from .lock import held
from .pieces import NAME, Appender

LOCK = ".lock"
#: The longest that lines are kept back, in seconds, if others follow, and the most bytes of them.
SECONDS, MOST = 10.0, 2**20


class BucketLines:
    """The file, locked until `close`, or until nobody uses this any more. A kill loses the lines since the last
    `flush`."""

    def __init__(self, file: BucketPath, say: Callable[[str], None]):
        """Raises ValueError if another process writes the file, and for a folder of other things."""
        others = [path.name for path in file.iterdir() if path.name != LOCK and not NAME.fullmatch(path.name)]
        if others:
            raise ValueError(f"{file}: a folder, with {others[0]!r} in it; give the path of a file")
        lock = ExitStack()
        lock.enter_context(held(file / LOCK, say))
        self.appender, self.waiting, self.flushed = Appender(file), bytearray(), time.monotonic()
        self.close = weakref.finalize(self, ended, lock, self.appender, self.waiting)

    def add(self, data: bytes) -> None:
        """Adds whole lines."""
        self.waiting += data
        if len(self.waiting) > MOST or time.monotonic() > self.flushed + SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes what was added; it outlives a kill when this returns."""
        if self.waiting:
            self.appender.add(bytes(self.waiting))
        self.waiting.clear()
        self.flushed = time.monotonic()


def ended(lock: ExitStack, appender: Appender, waiting: bytearray) -> None:
    """Writes the lines that wait, and gives the lock back."""
    with lock:
        if waiting:
            appender.add(bytes(waiting))
