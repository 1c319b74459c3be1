"""metrics.jsonl: what a run logged, a line of JSON for each step and kind of value, {"step": 3, "loss": 1.5, ...}."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .. import atomic
from ..config import shorten
from .checkpoint import Progress

HEAD = b'{"step": '
MAX_LINE_BYTES = 2**20


def read_metrics(file: Path) -> Iterator[dict[str, float]]:
    """The rows of a run's log. A last line that was cut off when the run was killed is left out.

    Raises ValueError, naming the file and the line, for another line that is no row.
    """
    if not file.is_file():
        raise ValueError(f"{file}: not a file; a run writes its log there")
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES):
            number += 1
            row = row_of(line)
            if row is not None:
                yield row
            elif line.endswith(b"\n") or not (line.startswith(HEAD) or HEAD.startswith(line)):
                shown = shorten(line[:200].decode(errors="replace").rstrip("\n"))
                raise ValueError(
                    f"{file}:{number}: {shown} is no line of a run's log. Delete it; the log alone loses it"
                )


def row_of(line: bytes) -> dict[str, float] | None:
    """A line's row: a step and numbers by name; None for anything else."""
    try:
        row = json.loads(line.decode())
    except (ValueError, RecursionError):
        return None
    named = isinstance(row, dict) and all(name.isprintable() and len(name) <= 200 for name in row)
    return row if named and is_step(row.get("step")) and all(map(is_number, row.values())) else None


def is_step(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


def is_number(value: Any) -> bool:
    """Whether a value of JSON is a number that a float holds; NaN and infinity are."""
    return type(value) is float or (type(value) is int and abs(value) < 2**1023)


def write_metrics(file: Path, rows: Iterable[dict[str, float]]) -> None:
    """Replaces the log by these rows, whole or not at all."""
    atomic.write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def append_row(file: Path, step: int, values: dict[str, float]) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps({"step": step} | values) + "\n")


def kept_rows(rows: Iterable[dict[str, float]], progress: Progress, *, ended: bool = False) -> list[dict[str, float]]:
    """The rows that a run keeps when it goes on from here: no score that will be measured again. The last test score is
    among these, but for a tenant that has ended."""

    def again(row: dict[str, float]) -> bool:
        return ("test_after_loss" in row and not ended) or (
            "validation_loss" in row and row["step"] > progress.evaluated
        )

    return [row for row in rows if row["step"] <= progress.step and not again(row)]
