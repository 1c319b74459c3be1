"""The data of many tenants: a folder with their files, or what a program gave."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from ..config import BASE, DataSection
from ..io.checks import expanded
from ..io.storage.bucket import Place
from .given import PYTHON, is_given
from .row_files import ENDINGS, OTHER_NAMES, SPLITS, is_saved, split_file, splits_of_saved

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
#: What a tenant sets of its own (data/tenant_file.py), in its sub-folder.
OWN_FILE = "tenant.yaml"
#: Names that a run's folder uses itself, and the name of the base model.
RESERVED = ("adapter", BASE, "checkpoints", "config.yaml", "learning_rates", "metrics.jsonl", "profile")
RESERVED += ("tensorboard", "tenants.json")


def tenant_sections(folder: str | Path, section: DataSection) -> dict[str, DataSection]:
    """The data section of each tenant in a folder, sorted by name. A tenant is a subfolder with train.jsonl (optionally
    validation.jsonl, test.jsonl and tenant.yaml) or a file NAME.jsonl; or .csv, .parquet and so on. Other files and
    hidden files are ignored. Tenants that a program gave (data/given.py) are in no folder.

    Raises ValueError for a folder without tenants, a name that is unsafe as a folder name, and two tenants with one
    name.
    """
    if is_given(str(folder)):
        return given_tenants(section)
    root = expanded(folder)
    if not root.is_dir():
        problem = "is a file" if root.exists() else "does not exist"
        advice = "; name a folder with a subfolder or .jsonl file per tenant"
        advice += f"; or data.tenants=null, to train on data.train={section.train}" if section.train else ""
        raise ValueError(f"data.tenants: {folder} {problem}{advice}")
    if (splits := files_of_one(root)) is not None:
        raise ValueError(
            f"data.tenants: {folder} has {splits}, which is the data of one tenant\nuse data.tenants=null "
            f"data.train={folder}, or name the folder above it"
        )
    found: dict[str, DataSection] = {}
    for path in shown(root):
        if not (path.is_dir() or path.suffix.lower() in ENDINGS):
            continue
        name = path.name if path.is_dir() else path.stem
        require_name(path, name)
        if name.lower() in {other.lower() for other in found}:
            raise ValueError(f"data.tenants: {path} is a second tenant named {name!r}; rename one of them")
        for file in path.iterdir() if path.is_dir() else ():
            if is_own(file) and file.name != OWN_FILE:
                raise ValueError(f"data.tenants: {file} would not be read; rename it to {OWN_FILE}")
        if path.is_dir() and not is_saved(path) and split_file(path, "train") is None:
            raise ValueError(f"data.tenants: {path} has no train.jsonl; add it, or remove the folder")
        found[name] = replace(section, train=str(path), validation=None, test=None, tenants=None)
    if not found:
        raise ValueError(f"data.tenants: {folder} has no tenants; add a subfolder or .jsonl file for each")
    return dict(sorted(found.items()))


def files_of_one(root: Place) -> str | None:
    """The names of the data files of a folder, or of the parts that `save_to_disk` wrote, if it has the splits of one
    data set and nothing else; else None. Read as tenants, the test data would be trained on."""
    data = [path for path in shown(root) if path.is_dir() or path.suffix.lower() in ENDINGS]
    splits = {path.stem for path in data}
    one = "train" in splits and splits <= {"train", "validation", "test", *OTHER_NAMES} and len(splits) > 1
    if isinstance(root, Path) and is_saved(root):
        one = one or not splits_of_saved(root)
    else:
        one = one and all(path.is_file() for path in data)
    return ", ".join(path.name for path in data) if one else None


def shown(root: Place) -> list[Place]:
    """What is in a folder, sorted, without hidden files and the list of splits that `save_to_disk` writes."""
    return sorted(path for path in root.iterdir() if path.name != SPLITS and not path.name.startswith("."))


def given_tenants(section: DataSection) -> dict[str, DataSection]:
    """The data section of each tenant that a program gave, sorted by name."""
    if section.given is None:
        raise ValueError(
            "data.tenants: the data of this run came from Python; give it again as train_tenants(config, data=...)"
        )
    for name in section.given:
        require_name(Path(name), name)
    if len({name.lower() for name in section.given}) < len(section.given):
        raise ValueError(f"data of many tenants: two names differ only in case: {', '.join(sorted(section.given))}")
    return {
        name: replace(
            section, train=f"{PYTHON}/{name}", validation=None, test=None, tenants=None, given=section.given[name]
        )
        for name in sorted(section.given)
    }


def is_own(file: Path) -> bool:
    """Whether a file in a tenant's folder is its tenant.yaml, perhaps by a wrong name."""
    return file.name.lower() in (OWN_FILE, "tenant.yml", "tenant.json")


def require_name(path: Path, name: str) -> None:
    """Raises ValueError unless a tenant's name can be the name of a folder inside a run's folder."""
    if not NAME.fullmatch(name) or name.lower() in RESERVED:
        raise ValueError(
            f"data.tenants: {str(path)!r}: {name!r} cannot be a tenant's name; use letters, digits, '.', '_' and '-', "
            f"starting with a letter or digit, and none of {', '.join(RESERVED)}"
        )
