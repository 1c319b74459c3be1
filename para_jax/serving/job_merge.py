"""Joins the outputs of a job's shards to one file, in the order of the input's lines."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack

from ..io import atomic
from ..io.shards import ShardOutput, in_order, job_shard_file, read_part
from ..io.storage.bucket import BucketPath, Place


def merge_jobs(outputs: Sequence[Place], output: Place) -> tuple[int, int]:
    """Writes the answers of all shards to `output`. Returns how many there are, and how many of them are errors.

    Raises ValueError, naming the output, for shards that do not belong together (shards.in_order), and where answers
    are missing.
    """
    parts = in_order([part_of(one) for one in outputs])
    if output.exists():
        raise ValueError(f"--output {output}: it is there already; choose another path, or remove it")
    if not isinstance(output, BucketPath):
        output.absolute().parent.mkdir(parents=True, exist_ok=True)
    total, count = parts[0].settings["input"]["lines"], len(parts)
    with ExitStack() as opened, atomic.replacing(output) as merged:  # pyright: ignore[reportArgumentType]
        # Each has every count-th line, in order, and after them what an earlier, longer input asked for. A shard
        # without a line has no file.
        files = [opened.enter_context(part.output.open("rb")) for part in parts[:total]]
        for number in range(total):
            line = files[number % count].readline()
            if not line.endswith(b"\n"):
                part = parts[number % count]
                raise ValueError(f"{part.output} lacks answers; run the command of shard {part.shard} again")
            merged.write(line)
    return total, sum(part.content["errors"] for part in parts)


def part_of(output: Place) -> ShardOutput:
    file = job_shard_file(output)
    part = read_part(file, output)
    if part is None:
        raise ValueError(f"{output} is not the output of a shard: there is no {file.name} next to it")
    return part
