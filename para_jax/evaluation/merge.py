"""Joins the folders of an evaluation's shards to the folder that one worker would have written."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from typing import Any

from ..config import BASE
from ..io import atomic
from ..io.shards import SHARD_FILE, ShardOutput, in_order, read_part
from ..io.storage.bucket import BucketPath, Place, is_file_name
from .journal import journal_lines
from .results import ANSWERS_FILE, csv_table, described_work, markdown_table

#: The parts of a record that have a value for each task.
SECTIONS = ("results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples")


def merge_folders(folders: Sequence[Place], output: Place, *, again: bool = False) -> str:
    """Writes the answers, records, samples and tables of all shards to `output`. Returns the Markdown table.

    The tables and answers do not depend on the number of shards. Answers are in the order of their keys.

    Args:
        again: `output` may hold what a merge of the same shards wrote before it was killed.

    Raises ValueError, naming the folder and the adapter, for shards that do not belong together (shards.in_order), and
    for results or answers that are damaged, missing or there twice.
    """
    parts = in_order([part_of(one) for one in folders])
    if not again and output.exists() and any(output.iterdir()):
        raise ValueError(f"--output {output}: it is not empty; choose another folder")
    first = parts[0]
    tasks, own = first.content["tasks"], first.content["own"]
    found: dict[str, list[dict]] = {}
    for part in parts:
        for name, file in part.content["files"].items():
            if name in found and not (name == BASE and own):
                raise ValueError(f"{part.output}: {name} is in another shard too; run the shards again, on equal files")
            found.setdefault(name, []).append(read_record(part, file))
    missing = [name for name in first.content["names"] if name not in found]
    if missing or set(found) - set(first.content["names"]):
        raise ValueError(
            f"no shard has {', '.join(missing[:5]) or 'these adapters'}; run the shards again, on equal files"
        )
    records = {name: joined(found[name], tasks) for name in first.content["names"]}
    for part in parts:
        for file in part.content["samples"]:
            if not (part.output / file).is_file():
                raise ValueError(f"{part.output / file} is missing; run the command of shard {part.shard} again")
    limits = {name: first.settings[name] for name in ("limit", "seed")}
    work = described_work(0, 0.0, first.settings["rows"], first.settings["device"])
    shuffled = first.settings["shuffle_prompts"]
    text = markdown_table(records, work, first.settings["libraries"], **limits, shuffled=shuffled, own=own)
    output.mkdir(parents=True, exist_ok=True)
    merge_answers(parts, output / ANSWERS_FILE)
    files = {name: file for part in parts for name, file in part.content["files"].items()}
    for name, record in records.items():
        atomic.write_text(output / files[name], json.dumps(record, indent=2) + "\n")
    for part in parts:
        for file in part.content["samples"]:
            atomic.write_bytes(output / file, (part.output / file).read_bytes())
    atomic.write_text(output / "table.csv", csv_table(records))
    atomic.write_text(output / "table.md", text + "\n")  # the last file: with it, the folder is complete
    return text


def part_of(folder: Place) -> ShardOutput:
    part = read_part(folder / SHARD_FILE, folder)
    if part is None:
        raise ValueError(f"{folder} is not the folder of a shard: there is no {SHARD_FILE} in it")
    if part.ended and not is_complete(part):
        raise ValueError(f"{folder / SHARD_FILE} is damaged; run the command of shard {part.shard} again")
    return part


def is_complete(part: ShardOutput) -> bool:
    """Whether a shard file has what an evaluation writes at its end. Its files can't lead out of the folder."""
    found, settings = part.content, part.settings
    files, samples = found.get("files"), found.get("samples")
    if not isinstance(files, dict) or not isinstance(samples, list) or type(found.get("answers")) is not int:
        return False
    ends = [(file, ".json") for file in files.values()] + [(file, ".jsonl") for file in samples]
    plain = all(isinstance(file, str) and is_file_name(file) and file.endswith(end) for file, end in ends)
    lists = ("names", "tasks") if part.shard.index == 0 else ()
    named = all(isinstance(found.get(name), list) and all(map(is_text, found[name])) for name in lists)
    own = part.shard.index > 0 or (isinstance(found.get("own"), dict) and all(map(is_text, found["own"].values())))
    needed = {"limit", "seed", "rows", "device", "libraries", "shuffle_prompts", "backbone"} <= set(settings)
    return plain and named and own and needed and isinstance(settings["libraries"], dict)


def is_text(value: object) -> bool:
    return isinstance(value, str)


def read_record(part: ShardOutput, file: str) -> dict[str, Any]:
    """An adapter's results in a shard's folder."""
    place = part.output / file
    try:
        with place.open("rb") as stream:
            record = json.load(stream)
        content = record["config"]["backbone_content"]
        if not all(isinstance(record[name], dict) for name in SECTIONS):
            raise ValueError
    except (ValueError, KeyError, TypeError, FileNotFoundError, RecursionError):
        raise ValueError(f"{place} is missing or damaged; run the command of shard {part.shard} again") from None
    if content != part.settings["backbone"]:
        raise ValueError(f"{place} holds results of another backbone; run the command of shard {part.shard} again")
    return record


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


def merge_answers(parts: Sequence[ShardOutput], file: Place) -> None:
    """Writes the answers of all shards, in the order of their keys."""
    places: dict[str, tuple[int, int]] = {}
    near = None if isinstance(file, BucketPath) else file.absolute().parent
    # Everything is copied into one file, because answers are read by their places, also those from a bucket.
    with atomic.errors_named(file), tempfile.TemporaryFile(dir=near) as copy:
        for part in parts:
            place, count = part.output / ANSWERS_FILE, 0
            for line, key, _ in journal_lines(place):
                count += 1
                if key not in places:
                    places[key] = copy.tell(), len(line)
                    copy.write(line)
                elif line_at(copy, places[key]) != line:
                    raise ValueError(f"{place} and another shard differ in their answers to {key}; remove one of them")
            if count < part.content["answers"]:
                raise ValueError(
                    f"{place} has {count} answers, but shard {part.shard} asks for {part.content['answers']}; run its "
                    "command again"
                )
        with atomic.replacing(file) as stream:  # pyright: ignore[reportArgumentType]
            stream.writelines(line_at(copy, places[key]) for key in sorted(places))


def line_at(copy, place: tuple[int, int]) -> bytes:
    """A line of the copy, by its start and length. The copy is then again at its end."""
    start, length = place
    copy.seek(start)
    line = copy.read(length)
    copy.seek(0, 2)
    return line
