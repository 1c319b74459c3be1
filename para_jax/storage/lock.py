"""The lock of a folder in a bucket: an object that its owner writes again every few seconds while it runs.

A lock expires LEASE seconds after it was last written, by the clock of the service, so the lock of a killed process can
be taken over. An owner that could not reach the service for that long stops writing in the folder, because another
process may have taken over.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from .bucket import DEADLINES, BucketPath, clock

#: Seconds until a lock that is not renewed expires, and between two renewals.
LEASE, RENEW = 60.0, 15.0
#: The maximum number of bytes read from a lock.
MAX_LOCK_BYTES = 2**12


@contextmanager
def bucket_lock(file: BucketPath, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock `file` of its folder during the block. Waits up to LEASE for a lock whose owner may be dead.

    Raises ValueError, naming the folder, if another process holds the lock, and OSError after the block if the lock was
    lost in it.
    """
    content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}).encode()
    generation, until = acquire(file, content, say)
    ended = threading.Event()
    renewal = Renewal(file, content, generation, ended)
    thread = threading.Thread(target=renewal.run, daemon=True, name="bucket lock")
    process = os.getpid()
    try:
        DEADLINES[file.parent] = until
        thread.start()
        yield
        file.require_held()
    finally:
        if process == os.getpid():  # a fork ends a copy of this, and does not hold the lock
            ended.set()
            try:
                if thread.ident is not None:
                    thread.join()
            finally:  # also after a second Ctrl-C: an old deadline would forbid all writes
                DEADLINES.pop(file.parent, None)
            with suppress(OSError):  # another owner has it by now, or else it expires
                file.unlink(generation=renewal.generation)


def deadline() -> float:
    """Until when a lock that is written now is surely valid, by `clock`: RENEW earlier than it expires."""
    return clock() + LEASE - RENEW


def acquire(file: BucketPath, content: bytes, say: Callable[[str], None]) -> tuple[int, float]:
    """Takes the lock. Returns its generation and its deadline."""
    before: int | None = None
    while True:
        try:
            found = file.stat()
        except FileNotFoundError:
            found = None
        if found and before not in (None, found.generation):  # another process renews it, or was faster
            raise ValueError(
                f"{file.parent}: another process is writing it ({owner(file)}); wait until it ends, or choose another "
                "folder"
            )
        if found and found.age < LEASE:
            if before is None:
                say(
                    f"{file.parent}: locked by {owner(file)} {max(0, found.age):.0f} s ago; waiting up to "
                    f"{LEASE - found.age:.0f} s in case that process was killed"
                )
            before = found.generation
            time.sleep(min(1.0, LEASE / 10))
            continue
        until = deadline()
        with suppress(FileExistsError):
            return file.write_bytes(content, generation=found.generation if found else 0), until
        if (generation := own_generation(file, content)) is not None:
            return generation, until
        before = -1  # another process was faster and has the lock


def own_generation(file: BucketPath, content: bytes) -> int | None:
    """The generation of a lock that this process wrote in a request that gcsfs sent twice; None if it did not."""
    with suppress(OSError):
        if file.read_bytes() == content:
            return file.stat().generation
    return None


def owner(file: BucketPath) -> str:
    """The owner of a lock, as its content says."""
    try:
        with file.open("rb") as stream:
            found = json.loads(stream.read(MAX_LOCK_BYTES))
        return f"{str(found['host'])[:100]!r}, process {int(found['pid'])}"
    except (OSError, ValueError, KeyError, TypeError):
        return "an unknown process"


class Renewal:
    """Writes the lock again until `ended`, or until another process has taken it over."""

    def __init__(self, file: BucketPath, content: bytes, generation: int, ended: threading.Event):
        self.file, self.content, self.generation, self.ended = file, content, generation, ended

    def run(self) -> None:
        while not self.ended.wait(RENEW):
            until = deadline()
            try:
                # Also after the deadline: while the generation is ours, no other process has taken over.
                self.generation = self.file.write_bytes(self.content, generation=self.generation, is_lock=True)
            except FileExistsError:
                found = own_generation(self.file, self.content)
                if found is None:
                    DEADLINES[self.file.parent] = 0.0
                    return
                self.generation = found
            except OSError:  # try again; after the deadline nothing else is written
                continue
            if not self.ended.is_set():
                DEADLINES[self.file.parent] = until
