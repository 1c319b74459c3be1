"""A file of lines in a bucket that one process adds to, one piece every few seconds."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack

from .bucket import BucketPath
from .lock import bucket_lock
from .pieces import NAME, Appender

LOCK = ".lock"
#: Seconds and bytes after which waiting lines are written when another one is added.
MAX_SECONDS, MAX_BYTES = 10.0, 2**20


class BucketLines:
    """The file, locked until `close`, or until this object is no longer used. A kill loses the lines since the last
    `flush`."""

    def __init__(self, file: BucketPath, say: Callable[[str], None]):
        """Raises ValueError if another process writes the file, or if it is a folder with other content."""
        others = [path.name for path in file.iterdir() if path.name != LOCK and not NAME.fullmatch(path.name)]
        if others:
            raise ValueError(f"{file} is a folder, with {others[0]!r} in it; give the path of a file")
        lock = ExitStack()
        lock.enter_context(bucket_lock(file / LOCK, say))
        self.appender, self.waiting, self.flushed = Appender(file), bytearray(), time.monotonic()
        self.close = weakref.finalize(self, write_and_unlock, lock, self.appender, self.waiting)

    def add(self, data: bytes) -> None:
        """Adds complete lines."""
        self.waiting += data
        if len(self.waiting) > MAX_BYTES or time.monotonic() > self.flushed + MAX_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the waiting lines. They survive a kill once this returns."""
        if self.waiting:
            self.appender.add(bytes(self.waiting))
        self.waiting.clear()
        self.flushed = time.monotonic()


def write_and_unlock(lock: ExitStack, appender: Appender, waiting: bytearray) -> None:
    """Writes the waiting lines and releases the lock."""
    with lock:
        if waiting:
            appender.add(bytes(waiting))
