"""Joins the outputs of a job's shards to one file, in the order of the input's lines."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

from ..io import atomic
from ..io.shards import ShardOutput, in_order, job_shard_file, read_part
from ..io.storage.bucket import BucketPath, Place
from ..io.storage.pieces import open_pieces
from .answers import MAX_ANSWER, answer_of, bounded_lines


def merge_jobs(outputs: Sequence[Place], output: Place) -> tuple[int, int]:
    """Writes the answers of all shards to `output`. Returns how many there are, and how many of them are errors.

    The bytes depend on the answers alone, not on the number of shards.

    Raises ValueError, naming the output and the line, for shards that do not belong together (shards.in_order) and for
    an answer that is damaged, missing, there twice, or not the shard's.
    """
    parts = in_order([part_of(one) for one in outputs])
    if output.exists():
        raise ValueError(f"--output {output}: it is there already; choose another path, or remove it")
    near = None if isinstance(output, BucketPath) else output.absolute().parent
    if near is not None:
        near.mkdir(parents=True, exist_ok=True)
    # Everything is copied into one file, because answers are read by their places, also those from a bucket.
    with atomic.errors_named(output), tempfile.TemporaryFile(dir=near) as copy:
        found, days = [], {}
        for part in parts:
            found += copied(part, copy, days)
        with atomic.replacing(output) as stream:  # pyright: ignore[reportArgumentType]
            for answer in sorted(found):
                copy.seek(answer.start)
                stream.write(copy.read(answer.length))
    return len(found), sum(answer.failed for answer in found)


class CopiedAnswer(NamedTuple):
    """Where an answer is in the copy. Answers sort by the line of the input and its sample."""

    line: int
    index: int
    start: int
    length: int
    """bytes"""
    failed: bool
    """whether it is an error"""


def part_of(output: Place) -> ShardOutput:
    file = job_shard_file(output)
    part = read_part(file, output)
    if part is None:
        raise ValueError(f"{output} is not the output of a shard: there is no {file.name} next to it")
    seen = part.settings.get("input")
    counts = (seen.get("lines") if isinstance(seen, dict) else None, part.content.get("answers"))
    if part.ended and not all(type(count) is int for count in counts):
        raise ValueError(f"{file} is damaged; run the command of shard {part.shard} again")
    return part


def copied(part: ShardOutput, copy: BinaryIO, days: dict[str, Place]) -> list[CopiedAnswer]:
    """Copies the answers of a shard.

    Args:
        days: the dates that chat templates wrote so far, each with an output that has it; gets those of this shard.
    """
    file, found, rows, spare = part.output, [], {}, 0
    lines = part.settings["input"]["lines"]
    if part.content["answers"] == 0 and not file.exists():  # a job leaves no empty file
        return []
    with open_pieces(file) as stream:
        for row, text in enumerate(bounded_lines(stream, MAX_ANSWER), 1):
            try:
                if text is not None and not text.endswith(b"\n"):
                    raise ValueError("was cut off; run the shard's command again")
                (line, index), kept = answer_of(text, row)
                if line > lines and part.content.get("spare"):  # answers to lines that a longer input had
                    spare += 1
                    continue
                if line > lines or not part.shard.has_line(line):
                    raise ValueError(f"answers line {line} of the input, which shard {part.shard} does not have")
                if (line, index) in rows:
                    raise ValueError(
                        f"and line {rows[line, index]} answer the same sample of line {line} of the input; run the "
                        "shard's command again"
                    )
                if kept.date is not None and kept.error is None:
                    days.setdefault(kept.date, file)
                    require_one_day(days)
            except ValueError as error:
                raise ValueError(f"{file}: line {row} {error}") from None
            rows[line, index] = row
            found.append(CopiedAnswer(line, index, copy.tell(), len(text or b""), kept.error is not None))
            copy.write(text or b"")
    expected = part.content["answers"]
    if len(found) != expected or spare != part.content.get("spare", 0):
        raise ValueError(
            f"{file} has {len(found)} answers, but shard {part.shard} asks for {expected}; run its command again"
        )
    return found


def require_one_day(days: dict[str, Place]) -> None:
    """Raises ValueError for more than one date."""
    if len(days) > 1:
        (first, output), (other, _) = list(days.items())[:2]
        raise ValueError(
            f"has the date {other}, which the chat template wrote, but {output} has {first}. Remove the outputs of one "
            "of the days, and run all shards on the same day"
        )
