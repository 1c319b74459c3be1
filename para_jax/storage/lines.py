"""A file of lines in a bucket that one process adds to, one piece every few seconds."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from queue import SimpleQueue

from .bucket import BucketPath
from .lock import bucket_lock
from .pieces import NAME, Appender

LOCK = ".lock"
#: Seconds and bytes after which waiting lines are written when another one is added.
MAX_SECONDS, MAX_BYTES = 10.0, 2**20
#: The open files.
OPEN: weakref.WeakSet[BucketLines] = weakref.WeakSet()
#: Calls that close the files no longer used. A thread of its own makes them, because the garbage collector may run in
#: any thread, also in the one that sends this process's requests and can't wait for one.
UNUSED: SimpleQueue[Callable[[], None]] = SimpleQueue()
STARTING = threading.Lock()


class BucketLines:
    """The file, locked until `close`, or soon after this object is no longer used. A kill loses the lines since the
    last `flush`."""

    def __init__(self, file: BucketPath, say: Callable[[str], None]):
        """Raises ValueError if another process writes the file, or if it is a folder with other content."""
        others = [path.name for path in file.iterdir() if path.name != LOCK and not NAME.fullmatch(path.name)]
        if others:
            raise ValueError(f"{file} is a folder, with {others[0]!r} in it; give the path of a file")
        close_unused()
        self.users = 0
        """the journals that share it"""
        with ExitStack() as lock:
            lock.enter_context(bucket_lock(file / LOCK, say))
            self.appender, self.waiting, self.flushed = Appender(file), bytearray(), time.monotonic()
            self._close = functools.partial(write_and_unlock, os.getpid(), lock.pop_all(), self.appender, self.waiting)
        self._when_unused = weakref.finalize(self, UNUSED.put, self._close)
        self._when_unused.atexit = False  # `close_all` does it
        OPEN.add(self)

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

    def close(self) -> None:
        """Writes the waiting lines and releases the lock. Raises OSError if either fails."""
        if self._when_unused.detach():
            self._close()


def write_and_unlock(process: int, lock: ExitStack, appender: Appender, waiting: bytearray) -> None:
    if process != os.getpid():  # a fork has neither the lines nor the lock
        return
    with lock:
        if waiting:
            appender.add(bytes(waiting))


def close_unused() -> None:
    """Waits until all files are closed that are no longer used."""
    with STARTING:
        closer(os.getpid())
    closed = threading.Event()
    UNUSED.put(closed.set)
    closed.wait()


@functools.cache
def closer(process: int) -> threading.Thread:
    thread = threading.Thread(target=close_each, daemon=True, name="bucket lines")
    thread.start()
    # before the executors end that resolve the service's name, which is before what `atexit` calls
    getattr(threading, "_register_atexit", atexit.register)(functools.partial(close_all, process))
    return thread


def close_each() -> None:
    while True:
        try:
            UNUSED.get()()
        except BaseException as error:  # the files after this one are closed all the same
            logging.getLogger("para_jax").warning(str(error))


def close_all(process: int) -> None:
    """Closes what is open at the exit of the process. A fork of it has nothing to close."""
    if process == os.getpid():
        for lines in list(OPEN):
            if lines._when_unused.detach():
                UNUSED.put(lines._close)
        close_unused()
