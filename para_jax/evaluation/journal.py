"""Answers, kept on disk as they come. A killed evaluation loses none of them, and asks none of their questions again.

Each line has the answer's key (questions.py), which identifies the adapter by its content.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import BinaryIO
from weakref import WeakValueDictionary

from ..io import atomic
from ..io.checks import shorten
from ..io.record_file import lock_output
from ..io.storage.bucket import BucketPath, Place
from ..io.storage.pieces import BucketLines, open_pieces, pieces
from .questions import Answer, Scored, Written

#: The start of each line; `Journal.add` and `answers_of` agree on it.
HEAD = b'{"key": '
#: A line has at most this many bytes.
LONGEST = 1 << 24
TYPES = {Scored: (float, bool), Written: (str, int, bool)}
#: This process's open files, by device and inode: journals of one file share it and its lock.
OPEN: WeakValueDictionary[tuple[int, int], BinaryIO] = WeakValueDictionary()
#: Held by the thread that opens a journal or adds a line.
LOCK = threading.Lock()


class Journal:
    """Answers by key, in memory and in a JSON-lines file that one process at a time may write. A bucket has no
    lock, but processes that write the same file there lose no answers."""

    def __init__(self, file: Place | None = None):
        """
        Args:
            file: created if it is missing; None: answers stay in memory.

        Cuts off an unfinished last line, which a kill leaves. Raises ValueError for a file that another process writes,
        and for a line that is not an answer, by its number.
        """
        self.file = file
        self._answers: dict[Hashable, Answer] = {}
        self._stream = self._lines = None
        if file is not None:
            if isinstance(file, BucketPath):
                self._lines = BucketLines(file)
                self._answers |= answers_of(file)
                return
            if file.exists() and not file.is_file():
                raise ValueError(f"{file}: not a regular file; choose another folder")
            file.parent.mkdir(parents=True, exist_ok=True)
            with LOCK:
                self._stream = opened(file)
                self._answers |= answers_of(file)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._answers

    def __getitem__(self, key: Hashable) -> Answer:
        return self._answers[key]

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, key: Hashable, answer: Answer) -> None:
        """Keeps an answer. It survives a kill when this returns; in a bucket after `sync` or some seconds."""
        if self.file is None:
            self._answers[key] = answer
            return
        if self._lines is None and self._stream is None:
            raise ValueError(f"{self.file}: this journal is closed")
        line = json.dumps({"key": key, **line_fields(answer)}, ensure_ascii=False) + "\n"
        if self._lines is not None:
            self._lines.add(line.encode())
        if self._stream is not None:
            try:
                with LOCK:  # opening the journal in another thread would cut off half a line
                    atomic.append(self._stream, line.encode())
            except OSError as error:  # a full disk; without the file's name
                raise OSError(error.errno, error.strerror, str(self.file)) from error
        self._answers[key] = answer

    def sync(self) -> None:
        """Forces the file to the disk, so that its answers survive a power failure too."""
        if self._lines is not None:
            self._lines.flush()
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Unlocks the file, unless other journals share it. Answers stay, and no more may be added. A journal that is
        not closed holds the lock until it is no longer used."""
        self._stream = None
        lines, self._lines = self._lines, None
        if lines is not None:
            lines.flush()


def line_fields(answer: Answer) -> dict:
    """An answer as a line has it. `finite` is written only where it is false."""
    fields = answer._asdict()
    return {name: value for name, value in fields.items() if (name, value) != ("finite", True)}


def opened(file: Path) -> BinaryIO:
    """The file, open for adding lines and locked against other processes until it is closed."""
    stream = file.open("ab", buffering=0)
    found = os.fstat(stream.fileno())
    place = found.st_dev, found.st_ino
    shared = OPEN.get(place)
    if shared is None:
        lock_output(stream, file)
        shared = OPEN[place] = stream
    return shared


def answers_of(file: Place) -> Iterator[tuple[str, Answer]]:
    """The answers of a file. Afterwards, a last line without an end is cut off. Raises ValueError for a line that is
    not an answer, and then leaves the file as it is."""
    complete = 0  # bytes
    for line, key, answer in journal_lines(file):
        yield key, answer
        complete += len(line)
    if not isinstance(file, BucketPath) and complete < file.stat().st_size:
        os.truncate(file, complete)


def journal_lines(file: Place) -> Iterator[tuple[bytes, str, Answer]]:
    """The complete lines of a file, each with its key and answer; none if there is no file. Raises ValueError for one
    that is not an answer."""
    if not (pieces(file) if isinstance(file, BucketPath) else file.exists()):
        return
    with open_pieces(file) as lines:
        for number, line in enumerate(iter(lambda: lines.readline(LONGEST), b""), 1):
            if atomic.is_torn(line, HEAD) and len(line) < LONGEST:
                break
            try:
                key, answer = answer_of(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ValueError(
                    f"{file}: line {number} is not an answer: {shorten(line[:200].decode(errors='replace'))}. Delete "
                    "the line, and its question is asked again; or choose another folder"
                ) from None
            yield line, key, answer


def answer_of(line: dict) -> tuple[str, Answer]:
    """A line's key and answer. Raises a Python error for a line that `Journal.add` would not write."""
    key = line.pop("key")
    answer = (Scored if "logprob" in line else Written)(**line)
    if (type(key), *map(type, answer)) != (str, *TYPES[type(answer)]):
        raise TypeError(line)
    return key, answer
