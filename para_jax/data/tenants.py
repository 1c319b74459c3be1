"""Many tenants' data: a folder of them, and which of them each batch of a mixed run holds."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..config import DataSection, expanded, one_of, require

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
#: What a run's own folder holds, and the name of the base model.
TAKEN = ("adapter", "base", "checkpoints", "config.yaml", "metrics.jsonl", "profile", "tensorboard", "tenants.json")
#: How a tenant's share of the batches grows with its number of examples.
SAMPLING = {"proportional": 1.0, "sqrt": 0.5, "uniform": 0.0}
#: How many of its own turns a tenant may be early or late, so that rows of one padded length share a batch. With 2, 64
#: tenants of varied lengths in 16 groups cost at most 5 % more tokens than alone; with lengths ignored, 90 to 120 %.
SLACK = 2


def tenant_sections(folder: str | Path, section: DataSection) -> dict[str, DataSection]:
    """The data section of each tenant of a folder, by name in order: a sub-folder (train.jsonl, perhaps
    validation.jsonl and test.jsonl) or a file NAME.jsonl; other files and hidden ones are left out.

    Raises ValueError for a folder without tenants, a name that could lead out of a run's folder, two tenants of one
    name, and a link.
    """
    root = expanded(folder)
    if not root.is_dir():
        there = "a file" if root.exists() else "no such folder"
        raise ValueError(
            f"data.tenants: {folder}: {there}; expected a folder with a sub-folder or a .jsonl file a tenant"
        )
    found: dict[str, DataSection] = {}
    for path in sorted(root.iterdir()):
        if path.name.startswith(".") or not (path.is_dir() or path.suffix == ".jsonl"):
            continue
        name = path.name if path.is_dir() else path.stem
        require_name(path, name)
        if name.lower() in {other.lower() for other in found}:
            raise ValueError(f"data.tenants: {path}: a second tenant of the name {name!r}; rename one of them")
        for file in [path, *(path.glob("*.jsonl") if path.is_dir() else [])]:
            if file.is_symlink():  # it could lead to another tenant's data, or out of the folder
                raise ValueError(f"data.tenants: {file}: a link, which is not followed; copy the file")
        if path.is_dir() and not (path / "train.jsonl").is_file():
            raise ValueError(f"data.tenants: {path}: no train.jsonl there; add it, or take the folder away")
        found[name] = replace(section, train=str(path), validation=None, test=None, tenants=None)
    require(bool(found), "data.tenants", str(folder), "a folder with a sub-folder or a .jsonl file for each tenant")
    return dict(sorted(found.items()))


def require_name(path: Path, name: str) -> None:
    """Raises ValueError unless a tenant's name can be that of a folder in a run's own."""
    if not NAME.fullmatch(name) or name.lower() in TAKEN:
        raise ValueError(
            f"data.tenants: {str(path)!r}: {name!r} can't be a tenant's name; expected letters, digits, '.', '_' and "
            f"'-', the first a letter or digit, and none of {', '.join(TAKEN)}"
        )


def weights(examples: Sequence[int], sampling: str) -> np.ndarray:
    """Each tenant's share of the batches, float64 [tenants], from its number of examples."""
    require(sampling in SAMPLING, "train.sampling", sampling, one_of(SAMPLING))
    raised = np.asarray(examples, np.float64) ** SAMPLING[sampling]
    return raised / raised.sum()


def next_tenants(
    steps: Sequence[int], shares: np.ndarray, running: Sequence[bool], groups: int, lengths: Sequence[int] | None = None
) -> list[int]:
    """The tenants of the next batch, at most `groups` and each once: those furthest behind their share, except that
    tenants whose next rows have the same padded length go together where that saves padding.

    A tenant gets at most SLACK turns ahead of the reference, which is the tenant in the last group if lengths did not
    count. One that is SLACK turns behind it is always in the batch. So each tenant stays within 2 * SLACK + 1 turns of
    its share, unless its share is larger than one group of every batch.

    A pure function of where the run stands, so that a run which resumes goes on as it would have. Tenants that have
    ended leave their groups to the others.

    Args:
        steps: optimiser steps that each tenant has done.
        running: which of them have not ended.
        lengths: the padded length of each tenant's next rows; None: all the same.
    """
    behind = (np.asarray(steps) + 0.5) / shares  # Webster's method; ties go to the first
    order = np.argsort(np.where(running, behind, np.inf), kind="stable")[: np.count_nonzero(running)]
    if lengths is None or len(order) <= groups:
        return order[:groups].tolist()
    late = (behind[order[groups - 1]] - behind[order]) * shares[order]  # each tenant's own turns behind the reference
    due, free = order[late >= SLACK], order[(-SLACK <= late) & (late < SLACK)]
    return cheapest(due, free, np.asarray(lengths), groups)


def cheapest(due: np.ndarray, free: np.ndarray, lengths: np.ndarray, groups: int) -> list[int]:
    """All tenants that are due and some that are free, in the batch whose rows have the least padding for their number.

    Args:
        due, free: tenants, the furthest behind first; together at least `groups`, and those due fewer.
        lengths: of each tenant's next rows; a batch is as long as the longest.
    """
    most_filled, best = -1.0, due
    shortest = lengths[due].max(initial=0)
    for length in np.unique(lengths[np.concatenate([due, free])]):
        if length < shortest:
            continue
        fit = free[lengths[free] <= length]
        fit = fit[np.argsort(-lengths[fit], kind="stable")]
        chosen = np.concatenate([due, fit])[:groups]
        filled = lengths[chosen].sum() / (groups * length)
        if filled > most_filled:
            most_filled, best = filled, chosen
    return best.tolist()
