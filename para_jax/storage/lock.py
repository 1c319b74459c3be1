"""The lock of a folder in a bucket: an object that its owner writes again every few seconds, as long as it lives.

A killed owner stops doing so. Its lock is dead LEASE seconds after it was last written, by the service's clock, and
whoever comes then takes it over. An owner that could not reach the service for so long stops writing in the folder: it
may have been taken over.
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

from .bucket import DEADLINES, BucketPath

#: Seconds after which a lock that was not renewed is dead, and between two renewals.
LEASE, RENEW = 60.0, 15.0
#: The most bytes that are read of a lock.
MOST = 2**12


@contextmanager
def held(file: BucketPath, say: Callable[[str], None]) -> Iterator[None]:
    """Holds the lock `file` of its folder. One whose owner may have been killed is waited for, for LEASE at most.

    Raises ValueError that names the folder if another process holds it. When the block has ended and the lock was lost
    in it, raises OSError.
    """
    content = json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "token": secrets.token_hex(8)}).encode()
    generation, DEADLINES[file.parent] = acquired(file, content, say)
    ended = threading.Event()
    renewal = Renewal(file, content, generation, ended)
    thread = threading.Thread(target=renewal.run, daemon=True, name="bucket lock")
    thread.start()
    try:
        yield
        file.require_held()
    finally:
        ended.set()
        thread.join()
        del DEADLINES[file.parent]
        with suppress(OSError):  # of another owner by now; or it dies by itself
            file.unlink(generation=renewal.generation)


def deadline() -> float:
    """Until when a lock that is written now is good, on this host's clock: less than LEASE, for it must be sure."""
    return time.monotonic() + LEASE - RENEW


def acquired(file: BucketPath, content: bytes, say: Callable[[str], None]) -> tuple[int, float]:
    """The generation of the lock that this process now has, and its deadline."""
    before: int | None = None
    while True:
        try:
            found = file.stat()
        except FileNotFoundError:
            found = None
        if found and before not in (None, found.generation):  # somebody renews it, or was faster
            raise ValueError(
                f"{file.parent}: another process is writing it ({owner(file)}); wait until it ends, or "
                "choose another one"
            )
        if found and found.age < LEASE:
            if before is None:
                say(
                    f"{file.parent}: locked by {owner(file)}, {max(0, found.age):.0f} s ago. Waiting up to "
                    f"{LEASE - found.age:.0f} s, in case it was killed"
                )
            before = found.generation
            time.sleep(min(1.0, LEASE / 10))
            continue
        until = deadline()
        with suppress(FileExistsError):
            return file.write_bytes(content, generation=found.generation if found else 0), until
        with suppress(OSError):  # a request that was sent twice, of which the first got through
            if file.read_bytes() == content:
                return file.stat().generation, until
        before = -1  # whoever was faster holds it now


def owner(file: BucketPath) -> str:
    """Who holds a lock, as far as it says."""
    try:
        with file.open("rb") as stream:
            found = json.loads(stream.read(MOST))
        return f"{str(found['host'])[:100]!r}, process {int(found['pid'])}"
    except (OSError, ValueError, KeyError, TypeError):
        return "somebody else"


class Renewal:
    """Writes the lock again until `ended`, or until it is somebody else's."""

    def __init__(self, file: BucketPath, content: bytes, generation: int, ended: threading.Event):
        self.file, self.content, self.generation, self.ended = file, content, generation, ended

    def run(self) -> None:
        while not self.ended.wait(RENEW):
            until = deadline()
            try:
                # Also after the deadline: as long as the generation is ours, nobody has taken over.
                self.generation = self.file.write_bytes(self.content, generation=self.generation, is_lock=True)
            except FileExistsError:
                if not self.still_mine():
                    DEADLINES[self.file.parent] = 0.0
                    return
            except OSError:  # it is tried again; after the deadline nothing else is written meanwhile
                continue
            DEADLINES[self.file.parent] = until

    def still_mine(self) -> bool:
        """Whether the object is what this process wrote, in a request that was sent twice."""
        try:
            if self.file.read_bytes() != self.content:
                return False
            self.generation = self.file.stat().generation
            return True
        except OSError:
            return False
