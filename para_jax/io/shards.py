"""Shards: parts of a job or an evaluation. Workers compute them without knowing of each other, and `merge` joins them.

Next to a shard's output is a file that describes it: which shard it is, the settings that all shards must share, and
whether it has ended.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import atomic
from .checks import shorten
from .storage.bucket import Place
from .untrusted import safe_names

#: In the output folder of an evaluation. A job's output FILE has FILE.shard.json next to it.
SHARD_FILE = "shard.json"
#: Shards of one output.
MAX_SHARDS = 1_000_000
ADVICE = (
    "I counts from 0 and is less than N, as in --shard 0/4 to --shard 3/4 (JOB_COMPLETION_INDEX of Kubernetes does so, "
    "and SLURM_ARRAY_TASK_ID with --array=0-3)"
)


class Shard(NamedTuple):
    index: int
    """from 0"""
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    def has_line(self, number: int) -> bool:
        """Whether it answers a line of a job's input, counted from 1."""
        return (number - 1) % self.count == self.index

    def has_content(self, digest: str) -> bool:
        """Whether it evaluates the adapter with this hash, in hexadecimal digits."""
        return int(digest[:16], 16) % self.count == self.index


def parse_shard(text: str) -> Shard:
    """The shard of I/N. Raises ValueError for anything else, and for an I that is not less than N."""
    found = re.fullmatch(r"(\d{1,7})/(\d{1,7})", text)
    shard = Shard(int(found[1]), int(found[2])) if found else Shard(0, 0)
    if not 0 <= shard.index < shard.count <= MAX_SHARDS:
        raise ValueError(f"{shorten(text)} is no shard I/N: {ADVICE}")
    return shard


class ShardOutput(NamedTuple):
    """A shard's output, as its shard file describes it."""

    output: Place
    shard: Shard
    settings: dict[str, Any]
    """what all shards must have in common"""
    ended: bool
    """whether everything is answered"""
    content: dict[str, Any]
    """what the output holds; empty before the end"""


def job_shard_file(output: Place) -> Place:
    """The shard file of a job's output."""
    return output.with_name(f"{output.name}.{SHARD_FILE}")


def write_part(file: Place, part: ShardOutput) -> None:
    found = {"shard": str(part.shard), "settings": part.settings, "ended": part.ended, "content": part.content}
    atomic.write_text(file, json.dumps(found, indent=1) + "\n")


def read_part(file: Place, output: Place) -> ShardOutput | None:
    """What a shard file says; None if there is none."""
    if not file.is_file():
        return None
    found = atomic.read_json(file, "Remove it, and run the shard's command again")
    return ShardOutput(output, parse_shard(found["shard"]), found["settings"], found["ended"], found["content"])


def begin_part(file: Place, output: Place, shard: Shard | None) -> None:
    """Raises ValueError if the output is that of another shard, or of one although no shard is asked for."""
    before = read_part(file, output)
    if before is not None and before.shard != shard:  # the same one resumes
        advice = f"give --shard {before.shard}, or choose another output"
        raise ValueError(f"{output} is the output of shard {before.shard}; {advice}")


def in_order(parts: Sequence[ShardOutput]) -> list[ShardOutput]:
    """The parts by their index. Raises ValueError, naming the outputs, for parts of different sizes or settings, for a
    shard that is missing, comes twice or has not ended."""
    first, found = parts[0], {}
    for part in parts:
        if not part.ended:
            raise ValueError(f"{part.output}: shard {part.shard} has not ended; run its command again, which resumes")
        if part.shard.count != first.shard.count:
            raise ValueError(
                f"{first.output} is shard {first.shard}, but {part.output} is shard {part.shard}; merge the outputs of "
                "one N"
            )
        require_same_settings(first, part)
        if part.shard in found:
            raise ValueError(
                f"{found[part.shard].output} and {part.output} are both shard {part.shard}; give one of them"
            )
        found[part.shard] = part
    missing = [Shard(index, first.shard.count) for index in range(first.shard.count)]
    missing = [shard for shard in missing if shard not in found]
    if missing:
        raise ValueError(f"shards without an output: {safe_names(map(str, missing))}; give their outputs too")
    return [found[shard] for shard in sorted(found)]


def require_same_settings(one: ShardOutput, other: ShardOutput) -> None:
    for name in {**one.settings, **other.settings}:
        here, there = one.settings.get(name), other.settings.get(name)
        if here != there:
            raise ValueError(
                f"{one.output} and {other.output} differ in {name}: {shorten(here, 200)} and {shorten(there, 200)}. "
                "Run one of the shards again with the settings of the other"
            )
