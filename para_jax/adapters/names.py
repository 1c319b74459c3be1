"""Adapters by name, from folders, hub ids, patterns, the folders of runs, and files that list these; and the error for
an unknown name. The command line checks names before it loads JAX."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Sequence
from functools import cache
from glob import glob
from pathlib import Path

from ..config import BASE
from ..io.checks import expanded, shorten
from ..io.messages import warn
from ..io.storage.bucket import BucketPath, Place
from ..io.untrusted import safe_name, safe_names

warn_once = cache(warn)
#: How many known names of each kind an unknown one is compared with.
COMPARED = 50


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
    lines = [line.strip() for line in str(expanded(file).read_bytes(), "utf-8-sig").splitlines()]
    sources = [
        (f"--adapters-from {file}, line {number}", line)
        for number, line in enumerate(lines, 1)
        if line and not line.startswith("#")
    ]
    if not sources:
        raise ValueError(f"--adapters-from {file}: no line there\ngive DIR or NAME=DIR on each line")
    return sources


def matching(text: str) -> list[str]:
    """The folders that a pattern such as runs/*/adapter matches, in order; empty for a text that is not a pattern."""
    path = expanded(text)
    if not any(mark in str(path) for mark in "*?[") or is_there(text):
        return []
    if isinstance(path, Path):
        folders = [folder for folder in sorted(glob(str(path))) if Path(folder).is_dir()]
    else:
        parts = path.key.split("/")
        first = next(i for i, part in enumerate(parts) if any(mark in part for mark in "*?["))
        root = BucketPath(path.bucket, "/".join(parts[:first]))
        folders = sorted(map(str, root.glob("/".join(parts[first:]))))
    if not folders:
        raise ValueError(f"--adapters {text!r}: no folder matches\ngive a pattern of adapter folders, in quotes")
    return folders


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
    adapters = [f"{path.parent.name}={path}" for path in sorted(run.glob("*/adapter"))]
    if not adapters:
        runs = sorted(path.parent for path in run.glob("*/tenants.json"))  # a comparison of sweeps
        advice = f"give {runs[0]}" if runs else "wait until one has ended"
        raise ValueError(f"--adapters {folder}: no folder there has an adapter yet\n{advice}")
    left_out = {path.parent.name for path in run.glob("*/config.yaml")} - {one.partition("=")[0] for one in adapters}
    if left_out:
        named = f"{safe_names(sorted(left_out))} ({len(left_out)} of {len(left_out) + len(adapters)})"
        warn_once(f"--adapters {folder}: left out, because there is no adapter yet: {named}")
    return adapters


# -------------------------------------------------------------------------------------------------------- unknown names


def unknown(name: object, known: tuple[str, ...]) -> str:
    """The error for a tenant that a bank does not hold, with names that are similar at the beginning or the end."""
    if name == BASE:  # what the command line and the server call it
        return f"no tenant {BASE!r}; for the base model give None"
    if nearest := nearest_names(str(name), known):
        return f"no tenant {shorten(name)}; the nearest are {', '.join(map(safe_name, nearest))}"
    return f"no tenant {shorten(name)}; it holds {', '.join(map(safe_name, known[:3])) or 'none'}" + (
        " ..." if len(known) > 3 else ""
    )


def nearest_names(name: str, known: Sequence[str]) -> list[str]:
    """At most three known names that are similar to this one at the beginning or the end. Only some are compared: there
    may be thousands, and a comparison takes about 50 microseconds."""
    text = name[:100]
    near = sorted(one for one in known if one.startswith(text[:3]))
    at = bisect.bisect(near, text)  # neighbours in this order share the longest beginnings
    near = near[max(0, at - COMPARED // 2) : at + COMPARED // 2]
    near += [one for one in known if one.endswith(text[-3:])][:COMPARED] + list(known[:COMPARED])
    return difflib.get_close_matches(text, dict.fromkeys(one[:100] for one in near), n=3, cutoff=0.5)
