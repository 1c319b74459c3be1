"""The files of compare_methods.py's output folder. A cell is a task and a method; each measurement of it is a file."""

import json
import sys
import time
from pathlib import Path

import numpy as np

from para_jax import atomic
from para_jax.devices import describe_devices, library_versions


def label(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name)


def task_of(file: Path, method: str) -> str:
    """The task of a file of this method, or of `base`. A task's name may have hyphens, as a label has."""
    return file.name.rpartition(f"-{label(method)}-")[0]


def settings(args) -> dict:
    """What scores depend on besides task and method."""
    names = ("backbone", "data", "steps", "rows", "limit", *(["examples"] if args.examples is not None else []))
    return {name: str(getattr(args, name)) for name in names}


def done(file: Path, make, asked: dict, rescore: bool = False, shuffled: bool = False) -> dict:
    """What the file holds; made and written first where there is none. Ends the script where it holds other settings'
    scores.

    Args:
        rescore: make it again if it holds a score without its rows. Such files are kept otherwise, whatever test_limit.
        shuffled: make it again if it holds no score with shuffled prompts.
    """
    if not lacks(file, rescore, shuffled):
        held = read(file)
        old = is_old(held)
        same = lambda one: {k: v for k, v in one.items() if k != "test_limit" or not old}  # noqa: E731
        if same(held["asked"]) != same(asked):
            sys.exit(f"compare_methods: {file} was made with other settings; choose another --output")
        return held
    begun = time.monotonic()
    found = make()
    about = {"asked": asked, "seconds": time.monotonic() - begun, "device": describe_devices()}
    write(file, found | about | {"versions": library_versions()})
    return read(file)


def lacks(file: Path, rescore: bool = False, shuffled: bool = False) -> bool:
    """Whether `done` would make the file."""
    if not file.exists():
        return True
    held = read(file)
    return (rescore and is_old(held)) or (shuffled and "shuffled" not in held)


def is_old(held: dict) -> bool:
    """Whether it is a score of an earlier version, without its rows."""
    return "test" in held and "rows" not in held["test"]


def write(file: Path, found: dict) -> None:
    atomic.write_text(file, json.dumps(found, indent=1) + "\n")


def read(file: Path) -> dict:
    return json.loads(file.read_text())


def packed(values) -> str:
    """One line of text: a digit for each value where all are 0 or 1, else numbers of four digits."""
    values = [float("nan") if value is None else float(value) for value in values]
    if set(values) <= {0.0, 1.0}:
        return "".join(str(int(value)) for value in values)
    return " ".join(f"{value:.4g}" for value in values)


def unpacked(text: str) -> np.ndarray:
    return np.array(list(text) if set(text) <= {"0", "1"} else text.split(), float)
