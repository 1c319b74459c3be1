"""Joins the folders of an evaluation's shards to the folder that one worker would have written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from ..io import atomic
from ..io.shards import SHARD_FILE, ShardOutput, in_order, read_part
from ..io.storage.bucket import Place
from .journal import journal_lines
from .results import ANSWERS_FILE, described_work, markdown_table, write_results

#: The parts of a record that have a value for each task.
SECTIONS = ("results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


def merge_folders(folders: Sequence[Place], output: Place, *, again: bool = False) -> str:
    """Writes the answers, records, samples and tables of all shards to `output`. Returns the Markdown table.

    The tables and answers do not depend on the number of shards. Answers are in the order of their keys.

    Args:
        again: `output` may hold what a merge of the same shards wrote before it was killed.

    Raises ValueError, naming the folder, for shards that do not belong together (shards.in_order).
    """
    parts = in_order([part_of(one) for one in folders])
    if not again and output.exists() and any(output.iterdir()):
        raise ValueError(f"--output {output}: it is not empty; choose another folder")
    first = parts[0]
    answers = merged_answers(parts)
    found: dict[str, list[dict]] = {}
    for part in parts:
        for name, file in part.content["files"].items():
            found.setdefault(name, []).append(json.loads((part.output / file).read_bytes()))
    records = {name: joined(found[name], first.content["tasks"]) for name in first.content["names"]}
    work = described_work(0, 0.0, first.settings["rows"], first.settings["device"])
    text = markdown_table(records, work, first.settings["libraries"], first.settings, first.content["own"])
    output.mkdir(parents=True, exist_ok=True)
    atomic.write_bytes(output / ANSWERS_FILE, answers)
    for part in parts:
        for file in part.content["samples"]:
            atomic.write_bytes(output / file, (part.output / file).read_bytes())
    write_results(output, records, {name: file for part in parts for name, file in part.content["files"].items()}, text)
    return text


def part_of(folder: Place) -> ShardOutput:
    part = read_part(folder / SHARD_FILE, folder)
    if part is None:
        raise ValueError(f"{folder} is not the folder of a shard: there is no {SHARD_FILE} in it")
    return part


def joined(records: Sequence[dict], tasks: Sequence[str]) -> dict:
    """A tenant's record, from those of its shards: the base model has several if each tenant has a task of its own."""
    if len(records) == 1:
        return records[0]
    made = records[0] | {"tokens": sum(record["tokens"] for record in records)}
    for section in SECTIONS:
        held: dict[str, Any] = {}
        for record in records:
            held |= record[section]
        made[section] = {task: held[task] for task in tasks if task in held}
    return made


def merged_answers(parts: Sequence[ShardOutput]) -> bytes:
    """The answers of all shards as lines, in the order of their keys."""
    lines: dict[str, bytes] = {}
    for part in parts:
        lines |= {key: line for line, key, _ in journal_lines(part.output / ANSWERS_FILE)}
    return b"".join(lines[key] for key in sorted(lines))
