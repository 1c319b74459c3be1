"""A file of lines in a bucket. Objects can't grow, so the lines are in pieces: FILE/0001-000000-1f0c92ab.jsonl, ...

The first number is the version: it counts how often the file was replaced. Only the pieces of the newest version count,
so one write replaces them all. The second number is the position of the piece in the file. The last part is random and
differs from writer to writer, so a worker that was given up and still runs overwrites nothing of its successor.

An object with the file's own name is read if there are no pieces, or if the first piece is gone: then the pieces had
been joined into that object before a kill left the others.
"""

from __future__ import annotations

import io
import re
import secrets
import time
from collections.abc import Iterator
from typing import Any, BinaryIO

from .bucket import BLOCK, BucketPath, Place

NAME = re.compile(r"(\d{4,9})-(\d{6,9})-([0-9a-f]{8})\.jsonl")
#: Seconds and bytes after which waiting lines are written when another one is added.
MAX_SECONDS, MAX_BYTES = 30.0, 2**20


def pieces(file: BucketPath) -> list[BucketPath]:
    """The objects that make up the file, in order; none if it does not exist."""
    found, plain = numbered(file), BucketPath(file.bucket, file.key)
    newest = max((version for version, *_ in found), default=0)
    if not begins(found, newest) and plain.is_file():
        return [plain]
    return [path for (version, *_), path in sorted(found.items()) if version == newest]


def numbered(file: BucketPath) -> dict[tuple[int, int, str], BucketPath]:
    """All pieces of the file by version, position and writer, also of older versions."""
    matches = ((NAME.fullmatch(path.name), path) for path in file.iterdir())
    return {(int(match[1]), int(match[2]), match[3]): path for match, path in matches if match}


def begins(found: dict[tuple[int, int, str], BucketPath], version: int) -> bool:
    """Whether the first piece of a version is there."""
    return any(place[:2] == (version, 0) for place in found)


def open_pieces(file: Place) -> BinaryIO:
    """A stream of the complete file, which in a bucket is in pieces. Raises FileNotFoundError if it does not exist."""
    if not isinstance(file, BucketPath):
        return file.open("rb")
    found = pieces(file)
    if not found:
        raise FileNotFoundError(2, "no such file", str(file))
    return io.BufferedReader(ChainReader(found), BLOCK)


class ChainReader(io.RawIOBase):
    """Reads several objects, one after another."""

    def __init__(self, paths: list[BucketPath]):
        self.streams: Iterator[Any] = (path.open("rb") for path in paths)
        self.stream = next(self.streams, None)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while self.stream is not None:
            if count := self.stream.readinto(buffer):
                return count
            self.stream = next(self.streams, None)
        return 0


def replace_pieces(file: BucketPath, data: bytes) -> None:
    """Replaces the content of the file. A kill leaves the old content or the new."""
    old = numbered(file)
    version = 1 + max((version for version, *_ in old), default=0)
    piece(file, version, 0, secrets.token_hex(4)).write_bytes(data)
    for path in old.values():
        path.unlink(missing_ok=True)
    file.unlink(missing_ok=True)


def piece(file: BucketPath, version: int, number: int, writer: str) -> BucketPath:
    return file / f"{version:04d}-{number:06d}-{writer}.jsonl"


class Appender:
    """Adds pieces to a file. Another one that adds to it at the same time has pieces of its own."""

    def __init__(self, file: BucketPath):
        self.file, self.writer = file, secrets.token_hex(4)
        old = numbered(file)
        plain = BucketPath(file.bucket, file.key)
        self.version, last, _ = max(old, default=(1, -1, ""))
        if not begins(old, self.version) and plain.is_file():
            self.version, last = (self.version + 1, 0) if old else (1, 0)
            plain.copy_to(piece(file, self.version, 0, self.writer))
            plain.unlink(missing_ok=True)
        self.number = last + 1

    def add(self, data: bytes) -> None:
        """Adds complete lines. They are in the bucket when this returns."""
        piece(self.file, self.version, self.number, self.writer).write_bytes(data)
        self.number += 1


class BucketLines:
    """A file to which lines are added, one piece every few seconds. A kill loses the lines since the last `flush`."""

    def __init__(self, file: BucketPath):
        """Raises ValueError if the file is a folder with other content."""
        if others := [path.name for path in file.iterdir() if not NAME.fullmatch(path.name)]:
            raise ValueError(f"{file} is a folder, with {others[0]!r} in it; give the path of a file")
        self.appender, self.waiting, self.flushed = Appender(file), bytearray(), time.monotonic()

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


def join_pieces(file: BucketPath, data: bytes) -> None:
    """Replaces the pieces by one object with the file's own name."""
    old = numbered(file)
    file.write_bytes(data)
    for _, path in sorted(old.items()):  # first the first piece of a version: without it the others don't count
        path.unlink(missing_ok=True)
