"""The file that --tasks [TASK=]FILE_OR_FOLDER[:METRIC] names. Nothing is read, so a wrong name is an error at once."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from ..config import RunConfig
from ..data.rows import split_file
from ..data.sources import open_split
from ..data.tasks import TASKS
from ..io.checks import expanded, nearest, require_one_of, shorten
from .metrics import LABEL_METRICS, METRICS

#: What to do where lm-eval is not installed.
INSTALL = "lm-eval is not installed; its tasks need it: pip install 'para_jax[eval]'"


class NamedFile(NamedTuple):
    """What --tasks says of a file."""

    task: str | None
    """a name from data/tasks.py"""
    path: Path
    """the file or folder as it was named"""
    file: Path
    metric: str | None


def named_file(text: str, split: str) -> NamedFile | None:
    """The file of [TASK=]FILE_OR_FOLDER[:METRIC]; None for what may be the name of a task of lm-eval.

    Raises ValueError for a path where there is nothing, and for an unknown TASK or METRIC.
    """
    if re.match(r"(data|eval|backbone|adapter|train|runtime)\.\w+ *=", text):
        raise ValueError(f"--tasks {shorten(text, 200)}: this is a field of a config; put it before --tasks")
    name, path, metric = task_parts(text)
    if path is None:
        if re.search(r"[/\\~]|\.(jsonl?|csv|tsv|parquet)\b", text):
            missing = text.split("=")[-1].removesuffix(":" + text.rpartition(":")[2])
            raise ValueError(f"--tasks {shorten(text, 200)}: no such file or folder{nearest(expanded(missing))}")
        return None
    if name is not None and name not in TASKS:
        raise ValueError(f"--tasks {text!r}: unknown task {name!r} before the =; known are {', '.join(TASKS)}")
    file = split_file(path, split) if path.is_dir() else path
    if file is None or not file.is_file():
        file = file or path / f"{split}.jsonl"
        raise ValueError(f"--tasks {text!r}: {file} is not a file; give a data file, or a folder with {split}.jsonl")
    known = ("loss", *METRICS, *LABEL_METRICS)
    if metric is not None:
        require_one_of(known, f"--tasks {text!r}: metric", metric)
    return NamedFile(name, path, file, metric)


def task_parts(text: str) -> tuple[str | None, Path | None, str | None]:
    """TASK, path and METRIC of [TASK=]PATH[:METRIC]; the path is None if there is no such file or folder."""
    for name, rest in ((None, text), text.split("=", 1) if "=" in text else (None, text)):
        for path, metric in ((rest, None), rest.rsplit(":", 1) if ":" in rest else (rest, None)):
            if expanded(path).exists():
                return name, expanded(path), metric
    return None, None, None


def no_data(config: RunConfig, split: str) -> ValueError:
    """The error of a run without data of a split."""
    open_split(config.data, "train")  # a ValueError where it should be but is not: the split would be next to it
    return ValueError(
        f"data.{split} is not set: give a .jsonl file, {split}.jsonl in data.train's folder, or tfds:NAME or hf:NAME"
        + ("; a tenant's own config is in its folder of the run" if config.data.tenants else "")
    )
