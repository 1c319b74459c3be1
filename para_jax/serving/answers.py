"""The file of a job's answers: JSON lines, added as they come. A kill leaves at most a torn last line, which is cut off
when the file is opened again. Only one process at a time may write it. On a disk a lock sees to that, in a bucket the
launcher."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

from ..io.atomic import append, is_torn, replacing
from ..io.checks import shorten
from ..io.record_file import lock_output
from ..io.shards import Shard, begin_part, job_shard_file
from ..io.storage.bucket import BucketPath, Place
from ..io.storage.pieces import BucketLines, join_pieces, open_pieces, pieces

#: How each answer begins.
HEAD = b'{"line": '
#: Bytes of the longest line in a job's input, and in its answers.
MAX_LINE, MAX_ANSWER = 2**24, 2**26


class KeptAnswer(NamedTuple):
    """The answer to one sample in the file, without its text."""

    key: str
    """a hash of what the answer depends on (job_lines.line_key)"""
    error: str | None
    row: int
    """the answer's line in the file, from 1"""
    date: str | None = None
    """the date that the chat template wrote, YYYY-MM-DD; None if it writes none"""


class Answers:
    """An open file of answers. On a disk it is locked until it is closed."""

    def __init__(self, file: Place):
        """Opens or creates the file. A pipe or a device is only written to; it is neither read back nor locked.

        Raises ValueError, and does not change the file, if another process is writing it or if it holds anything but
        answers.
        """
        self.file = file
        self.kept: dict[tuple[int, int], KeptAnswer] = {}
        """the answers of earlier runs, by line and sample"""
        self.stale: set[int] = set()
        """rows that `finish` removes"""
        self._made = not file.exists()
        self.regular = self._made or file.is_file() or isinstance(file, BucketPath)
        """whether the answers can be read back"""
        self._stream: Any = None
        self._lines: BucketLines | None = None
        if isinstance(file, BucketPath):
            self._lines = BucketLines(file)
        else:
            self._stream = locked(file) if self.regular else file.open("wb", buffering=0)
        try:
            if self.regular:
                self._read()
        except BaseException:
            if self._stream:
                self._stream.close()
            raise

    @property
    def date(self) -> str | None:
        """The date that the chat template wrote in earlier runs; None if it wrote none."""
        return next((kept.date for kept in self.kept.values() if kept.date is not None), None)

    def beyond(self, line: int) -> dict[tuple[int, int], KeptAnswer]:
        """The answers of earlier runs, without errors, to lines after this one that were not asked again."""
        return {place: kept for place, kept in self.kept.items() if place[0] > line and kept.error is None}

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def add(self, record: dict) -> None:
        """Writes an answer. It survives a kill once this returns (in a bucket some seconds later). Raises OSError,
        naming the file, if the answer can't be written completely; the file then ends with the previous answer."""
        text = json.dumps(record, ensure_ascii=False) + "\n"
        data = text.encode("utf-8", "backslashreplace")  # half a character becomes its JSON escape
        if self._lines:
            self._lines.add(data)
            return
        try:
            append(self._stream, data)
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.file)) from None

    def finish(self) -> None:
        """Removes stale rows, and waits until the answers are on disk. In a bucket, joins the pieces to one object."""
        if self._lines:
            self._lines.flush()
            if pieces(self.file):
                join_pieces(self.file, self.stale)
            return
        if self.regular and self.stale:
            target = Path(os.path.realpath(self.file))
            with replacing(target) as part, target.open("rb") as lines:
                os.chmod(part.name, stat.S_IMODE(os.fstat(self._stream.fileno()).st_mode))
                part.writelines(line for row, line in enumerate(lines, 1) if row not in self.stale)
        elif self.regular:
            os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Writes what waits, and releases the lock. Removes a file that was created here and got no answer."""
        if self._lines:
            self._lines.flush()
            return
        if not self._stream.closed and self._made and not os.fstat(self._stream.fileno()).st_size:
            self.file.unlink(missing_ok=True)
        self._stream.close()

    def _read(self) -> None:
        complete = 0  # bytes
        if self._lines and not pieces(self.file):
            return
        with open_pieces(self.file) as lines:
            for row, line in enumerate(bounded_lines(lines, MAX_ANSWER), 1):
                try:
                    if line is not None and not line.endswith(b"\n"):
                        if not is_torn(line, HEAD):
                            raise ValueError("is not an answer. Choose another file.")
                        if self._lines:  # no kill did this, and pieces can't be cut
                            raise ValueError("was cut off. Remove it from the file, and run the command again.")
                        break
                    self._keep(*answer_of(line, row))
                except ValueError as error:
                    raise ValueError(f"{self.file}: line {row} {error}") from None
                complete += 0 if line is None else len(line)
        if self._stream and complete < os.fstat(self._stream.fileno()).st_size:
            self._stream.truncate(complete)

    def _keep(self, place: tuple[int, int], kept: KeptAnswer) -> None:
        """Keeps an answer in place of an error, and an error in place of an earlier one. An answer may occur twice."""
        before = self.kept.get(place)
        if before is None or before.error is not None:
            if before is not None:
                self.stale.add(before.row)
            self.kept[place] = kept
            return
        if kept.error is None and kept.key != before.key:
            raise ValueError(
                f"and line {before.row} answer different requests for line {place[0]} of the input. "
                "Choose another file."
            )
        self.stale.add(kept.row)


def check_shard(answers: Answers, shard: Shard | None) -> None:
    """Raises ValueError if the output is that of another shard, or a pipe, which merge can't read."""
    if answers.regular:
        others = [line for line, _ in answers.kept if shard is not None and not shard.has_line(line)]
        if others and not job_shard_file(answers.file).exists():  # of a job without shards; `finish` would remove them
            raise ValueError(
                f"{answers.file} answers line {min(others)} of the input, which shard {shard} does not have; choose "
                "another output"
            )
        begin_part(job_shard_file(answers.file), answers.file, shard)
    elif shard is not None:
        raise ValueError(f"{answers.file}: the answers of a shard can't go to a pipe; give the path of a file")


def locked(file: Path) -> BinaryIO:
    """The file, locked and open for appending. If it was replaced before it was locked, opens the new one."""
    while True:
        stream = file.open("ab", buffering=0)
        try:
            lock_output(stream, file)
            if file.exists() and os.path.samestat(os.fstat(stream.fileno()), file.stat()):
                return stream
        except BaseException:
            stream.close()
            raise
        stream.close()


def answer_of(line: bytes | None, row: int) -> tuple[tuple[int, int], KeptAnswer]:
    """(line of the input, sample) of a row, and its answer. Raises ValueError for a row that no job wrote."""
    try:
        found = checked_answer(line)
    except (ValueError, RecursionError) as error:
        said = "nested too deeply" if isinstance(error, RecursionError) else shorten(str(error), 100)
        raise ValueError(
            f"is not an answer of a job ({said}). Choose another file, or remove this line and run the command again."
        ) from None
    return (found["line"], found["index"]), KeptAnswer(found["request"], found.get("error"), row, found.get("date"))


def checked_answer(line: bytes | None) -> dict[str, Any]:
    """The fields of an answer. Raises ValueError or RecursionError for what is none, such as the line of another
    file."""
    if line is None:
        raise ValueError(f"longer than {MAX_ANSWER} bytes")
    found = json.loads(line)
    if not isinstance(found, dict):
        raise ValueError(f"a JSON {type(found).__name__}")
    checks = {
        "line": lambda value: type(value) is int and value >= 1,
        "index": lambda value: type(value) is int and value >= 0,
        "request": lambda value: isinstance(value, str) and re.fullmatch("[0-9a-f]{32}", value),
    }
    for name, good in checks.items():
        if not good(found.get(name)):
            raise ValueError(f"{name}: {shorten(found.get(name))}")
    return found


class Lines(Protocol):
    def readline(self, most: int, /) -> bytes: ...


def bounded_lines(stream: Lines, most: int) -> Iterator[bytes | None]:
    """A stream's lines with their ends; None for a line of more than `most` bytes, which is never held whole."""
    while line := stream.readline(most + 1):
        if len(line) <= most:
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = stream.readline(2**20)
        yield None
