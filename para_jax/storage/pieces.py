"""A file of lines in a bucket. An object can't be added to, so the lines lie in pieces: FILE/0001-000000.jsonl, ...

The first number counts how often the file was replaced. Only the pieces with the highest one count, so that one write
replaces them all. The second is the place of the piece in the file. An object of the file's own name is read if there
are no pieces, or if the first of them is gone: a kill left the others when they had been joined into that object.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from .bucket import BLOCK, BucketPath

NAME = re.compile(r"(\d{4,9})-(\d{6,9})\.jsonl")


def pieces(file: BucketPath) -> list[BucketPath]:
    """The objects that together are the file, in order; none where it is not there."""
    found = numbered(file)
    if not found:
        return [file] if BucketPath(file.bucket, file.key).is_file() else []
    newest = max(version for version, _ in found)
    if (newest, 0) not in found and (plain := BucketPath(file.bucket, file.key)).is_file():
        return [plain]
    return [path for (version, _), path in sorted(found.items()) if version == newest]


def numbered(file: BucketPath) -> dict[tuple[int, int], BucketPath]:
    """All pieces of the file by their numbers, older versions' too."""
    matches = ((NAME.fullmatch(path.name), path) for path in BucketPath(file.bucket, file.key).iterdir())
    return {(int(match[1]), int(match[2])): path for match, path in matches if match}


def open_pieces(file: BucketPath) -> BinaryIO:
    """A stream of the whole file's bytes. FileNotFoundError where it is not there."""
    found = pieces(file)
    if not found:
        raise FileNotFoundError(2, "no such file", str(file))
    return io.BufferedReader(Chain(found), BLOCK)


class Chain(io.RawIOBase):
    """The bytes of several objects, one after the other."""

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
    """Makes the file hold this, in the place of what it held before."""
    old = numbered(file)
    version = 1 + max((version for version, _ in old), default=0)
    piece(file, version, 0).create(data)
    for path in old.values():
        path.unlink(missing_ok=True)
    BucketPath(file.bucket, file.key).unlink(missing_ok=True)


def piece(file: BucketPath, version: int, number: int) -> BucketPath:
    return file / f"{version:04d}-{number:06d}.jsonl"


class Appender:
    """Adds pieces to a file. One process at a time may do so."""

    def __init__(self, file: BucketPath):
        self.file = file
        old = numbered(file)
        plain = BucketPath(file.bucket, file.key)
        self.version, last = max(old, default=(1, -1))
        if (self.version, 0) not in old and plain.is_file():
            self.version, last = (self.version + 1, 0) if old else (1, 0)
            plain.copy_to(piece(file, self.version, 0))
            plain.unlink()
        self.number = last + 1

    def add(self, data: bytes) -> None:
        """Adds whole lines; they are in the bucket when this returns."""
        piece(self.file, self.version, self.number).create(data)
        self.number += 1


def join_pieces(file: BucketPath, without: set[int] | frozenset[int] = frozenset()) -> None:
    """Makes one object of the pieces, under the file's own name, without the lines of these numbers (from 1)."""
    old = numbered(file)
    with open_pieces(file) as stream:
        data = b"".join(line for number, line in enumerate(stream, 1) if number not in without)
    BucketPath(file.bucket, file.key).write_bytes(data)
    for _, path in sorted(old.items()):  # each version's first piece first; without it the others don't count
        path.unlink(missing_ok=True)
