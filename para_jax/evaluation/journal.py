"""Answers, kept on disk as they come: a run that is killed loses none of them, and the same questions are not asked
again. A line has the answer's key (asked.py), which knows the adapter that answered by its content."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO
from weakref import WeakValueDictionary

from ..serving.answers import cut_off
from .asked import Answer, Scored, Written

try:
    import fcntl
except ImportError:  # not on Windows, where nothing is locked
    fcntl = None

#: How each line begins; `Journal.add` and `answers_of` agree on it.
HEAD = b'{"key": '
TYPES = {Scored: (float, bool), Written: (str, int)}
#: This process's open files, by device and inode: journals of one file share it and its lock.
OPEN: WeakValueDictionary[tuple[int, int], TextIO] = WeakValueDictionary()


class Journal:
    """Answers by key, in memory and in a JSON-lines file, which one process at a time may write."""

    def __init__(self, file: Path | None = None):
        """
        Args:
            file: made where it is not there; None: in memory alone.

        Raises ValueError for a file that holds something else, and for one that another process writes. What was being
        written in a kill is cut off.
        """
        self.file = file
        self._answers: dict[str, Answer] = {}
        self._stream = None
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = opened(file)
            self._answers |= answers_of(file)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Answer:
        return self._answers[key]

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, key: str, answer: Answer) -> None:
        """Keeps an answer; it outlives a kill when this returns."""
        self._answers[key] = answer
        if self._stream is not None:
            self._stream.write(json.dumps({"key": key, **answer._asdict()}, ensure_ascii=False) + "\n")
            self._stream.flush()


def opened(file: Path) -> TextIO:
    """The file, to add lines to, locked against other processes until it is closed."""
    stream = file.open("a", encoding="utf-8")
    found = os.fstat(stream.fileno())
    place = found.st_dev, found.st_ino
    if place in OPEN:
        return OPEN[place]
    try:
        if fcntl is not None:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ValueError(f"{file}: another process writes there; wait for its end or choose another folder") from None
    OPEN[place] = stream
    return stream


def answers_of(file: Path) -> Iterator[tuple[str, Answer]]:
    """The answers of a file, after which what follows its last whole line is cut off."""
    whole = 0
    with file.open("rb") as lines:
        for line in lines:
            try:
                if cut_off(line, HEAD):
                    break
                yield answer_of(json.loads(line))
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise ValueError(f"{file}: holds something else than answers; choose another folder") from None
            whole += len(line)
    if whole < file.stat().st_size:
        os.truncate(file, whole)


def answer_of(line: dict) -> tuple[str, Answer]:
    """A line's key and answer. Raises an error of Python's where it is not as `Journal.add` writes it."""
    key = line.pop("key")
    answer = (Scored if "logprob" in line else Written)(**line)
    if (type(key), *map(type, answer)) != (str, *TYPES[type(answer)]):
        raise TypeError(line)
    return key, answer
