"""metrics.jsonl: the logged values of a run, as JSON lines such as {"step": 3, "loss": 1.5, ...}."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

from ..io import atomic
from ..io.storage.bucket import BucketPath, Place
from ..io.storage.pieces import Appender, open_pieces, pieces, replace_pieces

HEAD = b'{"step": '
#: Seconds between two writes of rows, in a bucket (True) and elsewhere.
FLUSH_SECONDS = {True: 30.0, False: 10.0}


def read_metrics(file: Path) -> Iterator[dict[str, float]]:
    """The rows of a run's log. A last line that was cut off by a kill is skipped.

    Raises ValueError, naming the file and the line, for any other line that is not JSON.
    """
    with open_pieces(file) as stream:
        for number, line in enumerate(stream, 1):
            try:
                yield json.loads(line)
            except ValueError:
                if not atomic.is_torn(line, HEAD):
                    raise ValueError(f"{file}:{number}: not a line of a run's log; delete the line") from None


def is_log(file: Place) -> bool:
    """Whether the file is there, in a bucket as pieces."""
    return bool(pieces(file)) if isinstance(file, BucketPath) else file.is_file()


def write_metrics(file: Place, rows: Iterable[dict[str, float]]) -> None:
    """Replaces the log with these rows. A kill leaves the old log or the new one."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if isinstance(file, BucketPath):
        replace_pieces(file, text.encode())
    else:
        atomic.write_text(file, text)


class MetricsWriter:
    """Adds rows to a log, several per write. A kill loses the rows since the last `flush`."""

    def __init__(self, file: Place, count: int = 0, seconds: float | None = None):
        """
        Args:
            count: the rows that the log has.
            seconds: the longest time between two writes while rows arrive; default: FLUSH_SECONDS.
        """
        bucket = isinstance(file, BucketPath)
        self.file, self.waiting, self.count = file, "", count
        self.seconds = FLUSH_SECONDS[bucket] if seconds is None else seconds
        self.pieces: Appender | None = None
        self.flushed = time.perf_counter()

    def add(self, step: int, values: dict[str, float]) -> None:
        self.waiting += json.dumps({"step": step} | values) + "\n"
        self.count += 1
        if time.perf_counter() > self.flushed + self.seconds:
            self.flush()

    def flush(self) -> None:
        """Writes the rows that were added. If it raises OSError, they are either all written or all dropped."""
        text, self.waiting, self.flushed = self.waiting, "", time.perf_counter()
        if not text:
            return
        if isinstance(self.file, BucketPath):
            self.pieces = self.pieces or Appender(self.file)
            self.pieces.add(text.encode())
            return
        with atomic.errors_named(self.file), self.file.open("ab", buffering=0) as stream:
            atomic.append(stream, text.encode())


def keep_rows(file: Place, count: int, *, ended: bool) -> int:
    """Removes the rows after the first `count`, which a run resumed from a checkpoint writes again. So it does with
    the last test scores, unless it has `ended`. Gives how many rows are left."""
    if not is_log(file):
        return 0
    tested = lambda row: any(name.startswith("test_") for name in row)  # noqa: E731
    rows = [row for row in islice(read_metrics(file), count) if ended or not tested(row)]
    write_metrics(file, rows)
    return len(rows)
