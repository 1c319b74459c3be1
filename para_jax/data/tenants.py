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


def next_tenants(steps: Sequence[int], shares: np.ndarray, running: Sequence[bool], groups: int) -> list[int]:
    """The tenants of the next batch, at most `groups` and each once: those that are furthest behind their share.

    A pure function of where the run stands, so that a run which resumes goes on as it would have. Tenants that have
    ended leave their groups to the others.

    Args:
        steps: optimiser steps that each tenant has done.
        running: which of them have not ended.
    """
    behind = (np.asarray(steps) + 0.5) / shares  # Webster's method; ties go to the first
    order = np.argsort(np.where(running, behind, np.inf), kind="stable")
    return [int(i) for i in order[:groups] if running[i]]
