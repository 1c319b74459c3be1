"""Journal: a file of JSON lines that are added as they come. A kill leaves at most a torn last line, which is cut off
when the file is opened again. In a bucket the lines are added every few seconds, and a kill loses those since then."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

from . import atomic
from .checks import shorten
from .record_file import lock_output
from .storage.bucket import BucketPath, Place, open_now

#: In a bucket: seconds and bytes after which waiting lines are written when another one is added.
MAX_SECONDS, MAX_BYTES = 30.0, 2**20

#: This process's open files, by device and inode: journals of one file share it and its lock. A notebook that runs a
#: cell again opens its file before the last journal is gone.
OPEN: WeakValueDictionary[tuple[int, int], BinaryIO] = WeakValueDictionary()
#: Held by the thread that opens a journal or adds a line: opening would cut off half a line of another thread.
LOCK = threading.Lock()


class Journal:
    """An open journal. On a disk, one process at a time may write it. A bucket has no lock, but processes that write
    the same file there lose no lines. A pipe or a device is only written to."""

    def __init__(self, file: Place, head: str, keep: Callable[[dict], object]):
        """
        Args:
            file: created if it is missing.
            head: what each line begins with. A last line that does not is of another file, and not a torn one.
            keep: gets each line. Raises ValueError, KeyError or TypeError for one that is not the journal's.
        """
        self.file, self.closed = file, False
        self.regular = isinstance(file, BucketPath) or not file.exists() or file.is_file()
        """whether the lines can be read back"""
        self._stream: Any = None
        self._waiting, self._written = bytearray(), time.monotonic()
        if isinstance(file, BucketPath):
            for _ in kept_lines(file, head, keep):
                pass
        elif self.regular:
            file.parent.mkdir(parents=True, exist_ok=True)
            with LOCK:
                self._stream = opened(file)
                end = sum(map(len, kept_lines(file, head, keep)))
                if end < file.stat().st_size:
                    os.truncate(file, end)  # the torn line
        else:
            self._stream = file.open("wb", buffering=0)

    def add(self, row: dict) -> None:
        """Adds a line. It survives a kill when this returns; in a bucket after `sync` or some seconds. Raises OSError,
        naming the file, where it can't be written; the file then ends with the line before."""
        if self.closed:
            raise ValueError(f"{self.file}: this journal is closed")
        data = (json.dumps(row, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")  # half a character
        if isinstance(self.file, BucketPath):
            self._waiting += data  # a request for each line would take too long
            if len(self._waiting) > MAX_BYTES or time.monotonic() > self._written + MAX_SECONDS:
                self.sync()
            return
        with LOCK, atomic.errors_named(self.file):
            atomic.append(self._stream, data)

    def sync(self) -> None:
        """Forces the lines to the disk or the bucket, so that they survive a power failure too."""
        if isinstance(self.file, BucketPath):
            if self._waiting:
                self.file.append(bytes(self._waiting))
            self._waiting, self._written = bytearray(), time.monotonic()
        elif self.regular:
            os.fsync(self._stream.fileno())

    def sort(self, place: Callable[[dict], Any]) -> None:
        """Closes the journal and orders its lines by their place. Lines without one go; of several lines with one
        place, the last stays."""
        self.close()
        if not self.regular or not self.file.is_file():
            return
        spans, start = {}, 0  # by place: where a line begins, and its length
        with open_now(self.file) as lines:
            for line in lines:
                if (to := place(json.loads(line))) is not None:
                    spans[to] = start, len(line)  # not the lines: they may not fit the memory
                start += len(line)
            ordered = (line_at(lines, *spans[place]) for place in sorted(spans))
            on_disk = isinstance(self.file, Path)
            with atomic.replacing(Path(os.path.realpath(self.file)) if on_disk else self.file) as part:
                if on_disk:
                    os.chmod(part.name, os.fstat(lines.fileno()).st_mode & 0o777)  # a private file stays private
                part.writelines(ordered)

    def close(self) -> None:
        """Writes what waits, and unlocks the file, unless other journals of this process share it. No more may be
        added."""
        if isinstance(self.file, BucketPath):
            self.sync()
        self.closed, self._stream = True, None  # the last one to go unlocks the file

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.close()


def line_at(lines: BinaryIO, start: int, length: int) -> bytes:
    lines.seek(start)
    return lines.read(length)


def opened(file: Path) -> BinaryIO:
    """The file, open for adding lines and locked against other processes until it is no longer used."""
    stream = file.open("ab", buffering=0)
    found = os.fstat(stream.fileno())
    place = found.st_dev, found.st_ino
    shared = OPEN.get(place)
    if shared is None:
        lock_output(stream, file)
        if not file.exists() or not os.path.samestat(found, file.stat()):  # `sort` has just replaced it
            raise ValueError(f"{file}: another process is writing it; wait until it ends, or choose another")
        shared = OPEN[place] = stream
    return shared


def kept_lines(file: Place, head: str, keep: Callable[[dict], object]) -> Iterator[bytes]:
    """The complete lines of a journal, each given to `keep`; none if there is no file. Raises ValueError, naming the
    line, for one that is not the journal's."""
    if not file.is_file():
        return
    with open_now(file) as lines:
        for number, line in enumerate(lines, 1):
            if atomic.is_torn(line, head.encode()):
                return
            try:
                keep(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(
                    f"{file}: line {number} is not an answer: {shorten(line[:200].decode(errors='replace'))}. Delete "
                    "the line, and it is asked again; or choose another output"
                ) from None
            yield line
