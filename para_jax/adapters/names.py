"""Adapters by name, from folders, hub ids, patterns, the folders of runs, and files that list these."""

from __future__ import annotations

from functools import cache
from glob import glob
from pathlib import Path

from ..config import BASE
from ..io.checks import expanded
from ..io.messages import warn
from ..io.storage.bucket import BucketPath, Place
from ..io.untrusted import safe_names

warn_once = cache(warn)


def named_adapters(given: list[str], listed: Place | None = None) -> dict[str, str]:
    """{name: folder or hub id} of --adapters DIR or NAME=DIR, and of a file with one of these per line. Without NAME=
    the name is the folder's own, or the run's for RUN/adapter. A pattern such as 'runs/*/adapter' gives every folder
    that it matches, and the folder of a run with many tenants, or of a comparison of methods, all of them."""
    sources: dict[str, str] = {}
    texts = [(f"--adapters {one!r}", one) for text in given for one in matching(text) or tenants_of_run(text) or [text]]
    for where, text in texts + (adapter_lines(listed) if listed is not None else []):
        name, source = name_and_source(text)
        if not name or not source:
            raise ValueError(f"{where}: the {'folder' if name else 'name'} is missing\ngive NAME=DIR")
        if name in sources or name == BASE:
            by = f": {BASE} is the base model" if name == BASE else f" by {sources[name]}"
            raise ValueError(f"{where}: the name {name!r} is taken{by}\ngive NAME=DIR with another name")
        sources[name] = source
    return sources


def adapter_lines(file: Place) -> list[tuple[str, str]]:
    """(Where it is, for errors; DIR or NAME=DIR) of each line of --adapters-from. Blank lines and those that begin with
    # are left out."""
    path = expanded(file)
    if not path.is_file():
        raise ValueError(f"--adapters-from {file}: no such file\ngive a file with DIR or NAME=DIR on each line")
    try:
        lines = [line.strip() for line in str(path.read_bytes(), "utf-8-sig").splitlines()]
    except UnicodeDecodeError:
        raise ValueError(f"--adapters-from {file}: not a text in UTF-8\ngive DIR or NAME=DIR on each line") from None
    found = [
        (f"--adapters-from {file}, line {number}", line)
        for number, line in enumerate(lines, 1)
        if line and not line.startswith("#")
    ]
    if not found:
        raise ValueError(f"--adapters-from {file}: no line there\ngive DIR or NAME=DIR on each line")
    return found


def matching(text: str) -> list[str]:
    """The folders that a pattern such as runs/*/adapter matches, in order; empty for a text that is not a pattern."""
    path = expanded(text)
    if not any(mark in str(path) for mark in "*?[") or is_there(text):
        return []
    if isinstance(path, Path):
        found = [one for one in sorted(glob(str(path))) if Path(one).is_dir()]
    else:
        parts = path.key.split("/")
        first = next(i for i, part in enumerate(parts) if any(mark in part for mark in "*?["))
        root = BucketPath(path.bucket, "/".join(parts[:first]))
        found = sorted(str(one) for one in root.glob("/".join(parts[first:])))
    if not found:
        raise ValueError(
            f"--adapters {text!r}: no folder matches\ngive a pattern of adapter folders, in quotes (write [[] for a [ "
            "in a name)"
        )
    return found


def is_there(text: str) -> bool:
    """Whether DIR or NAME=DIR is a path on this host, whatever characters it contains."""
    paths = [expanded(one) for one in (text, text.partition("=")[2]) if one]
    return any(isinstance(path, Path) and path.exists() for path in paths)


def name_and_source(text: str) -> tuple[str, str]:
    name, equals, source = text.partition("=")
    folder = expanded(text)
    if isinstance(folder, BucketPath):  # without a request: there may be thousands
        return (folder.parent if folder.name == "adapter" else folder).name, text
    if equals and not folder.is_dir():
        return name, source
    if not folder.is_dir():  # a hub id
        return text, text
    folder = folder.resolve()
    return (folder.parent if folder.name == "adapter" else folder).name, text


def tenants_of_run(folder: str) -> list[str]:
    """NAME=DIR for each tenant of a run with many, and for each method of a comparison; empty for anything else."""
    run = expanded(folder)
    if not any((run / file).is_file() for file in ("tenants.json", "comparison.json")):
        return []
    found = [f"{path.parent.name}={path}" for path in sorted(run.glob("*/adapter"))]
    left_out = {path.parent.name for path in run.glob("*/config.yaml")} - {one.partition("=")[0] for one in found}
    sweeps = sorted(path.parent.name for path in run.glob("*/tenants.json"))
    if not found and sweeps:
        raise ValueError(f"--adapters {folder}: each method there has several adapters\ngive {folder}/{sweeps[0]}")
    if not found:
        raise ValueError(f"--adapters {folder}: no tenant of this run has an adapter yet\nwait until one has ended")
    if left_out:
        named = f"{safe_names(sorted(left_out))} ({len(left_out)} of {len(left_out) + len(found)})"
        warn_once(f"--adapters {folder}: left out, because there is no adapter yet: {named}")
    return found
