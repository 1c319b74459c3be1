"""The parts of a run of many tenants: those that it began with, and those that were added to it later.

Each part is trained as a run of its tenants alone, after the parts before it have ended: it has its own batches, its
own steps, and its own log and checkpoints. So adding a tenant does not change the others, and a part that was stopped
resumes like any run. The first part keeps its log and checkpoints in output_dir, the next in output_dir/_added_1,
then _added_2. No tenant can have such a name. Its file tenants.json says who belongs to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple

from ..config import RunConfig
from ..io import atomic
from ..io.checks import expanded
from ..io.storage.bucket import Place
from ..io.untrusted import safe_names
from ..runtime.processes import on_first_process
from ..training.tenants_file import read_entries
from .chosen import TRIALS
from .folder import delete_leftovers

FILE = "tenants.json"


class Part(NamedTuple):
    names: list[str]
    """its tenants, in the order of the run"""
    folder: Place
    """its log and checkpoints"""
    alone: bool = True
    """whether the run has no other part"""


def parts_of_run(config: RunConfig, names: Sequence[str]) -> list[Part]:
    """The parts of a run with these tenants, from what its output folder holds. Tenants that are new there join the
    last part, if nothing of it is saved yet. Else they are a new part.

    Raises ValueError for a folder that holds tenants whose data is gone.
    """
    if not config.many:
        return [Part(list(names), expanded(config.output_dir))]
    found = on_first_process(lambda: recorded_parts(config, names))
    return [Part(part, folder_of(config, i), len(found) == 1) for i, part in enumerate(found)]


def recorded_parts(config: RunConfig, names: Sequence[str]) -> list[list[str]]:
    folder, added = expanded(config.output_dir), []
    claimed = {path.parent.name for path in folder.glob("*/config.yaml")} if folder.is_dir() else set()
    gone = sorted(claimed - set(names))
    if gone:
        raise ValueError(
            f"output_dir {folder} holds tenants that {config.data.tenants} lacks: {safe_names(gone)}\n"
            "put their data back to resume, or choose another output_dir"
        )
    while (file := folder_of(config, len(added) + 1) / FILE).is_file():
        added.append(read_names(file))
    later = {name for part in added for name in part}
    first = [name for name in names if name in claimed and name not in later]
    parts = [first, *([name for name in names if name in part] for part in added)]
    new = [name for name in names if name not in claimed and name not in later]
    if not new:
        return parts
    if not has_begun(folder_of(config, len(added))):
        last = {*parts[-1], *new}
        return [*parts[:-1], [name for name in names if name in last]]
    lost = [name for name in new if name in read_entries(folder)]
    if lost or config.sweep:
        raise ValueError(
            f"output_dir {folder} has lost the folders of {safe_names(lost or new)}\n"
            "restore them from a copy, or choose another output_dir"
        )
    return [*parts, new]


def has_begun(folder: Place) -> bool:
    """Whether something of a part is saved: of its own run, or of the trials of its learning rates."""
    saved = folder / "checkpoints"
    return (folder / TRIALS).is_dir() or (saved.is_dir() and any(saved.glob("*")))


def folder_of(config: RunConfig, part: int) -> Place:
    folder = expanded(config.output_dir)
    return folder / f"_added_{part}" if part else folder


def write_parts(parts: Sequence[Part]) -> None:
    """Makes the folders of the parts that were added, and writes down who belongs to them. The output folder must be
    locked. This comes before the tenants' own folders are made: those that no part names belong to the first."""
    for part in parts[1:]:
        part.folder.mkdir(exist_ok=True)
        delete_leftovers(part.folder)
        atomic.write_text(part.folder / FILE, json.dumps({"tenants": part.names}, indent=1) + "\n")


def read_names(file: Place) -> set[str]:
    return set(atomic.read_json(file, "Restore it from a copy")["tenants"])
