"""A run's output folder: which run it holds, and that one process at a time writes there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import atomic, devices
from ..config import RunConfig, config_dict, expanded, load_config, save_config
from ..data.example_arrays import add_to_digest
from ..data.examples import Example
from ..evaluation.evaluate import EvalTask
from ..storage.bucket import BucketPath, Place
from ..storage.lock import held

#: A folder holds the same run although these differ.
FREE_FIELDS = ("output_dir", "checkpoint", "logging", "profiler", "runtime")
#: Fields of other sections that do not make it another run either.
FREE_NAMES = ("backbone.attention", "data.changed")
#: Where data and backbone lie; a checkpoint knows them by their content.
PLACES = ("data.train", "data.validation", "data.test", "data.tenants", "data.data_dir", "backbone.source")
#: The file that the process which writes in the folder keeps locked. It stays when that process ends.
LOCK = ".lock"
#: What `atomic` replaces in a run's folder, or a tenant's in it.
REPLACED = ("config.yaml", "metrics.jsonl", "tenants.json")
#: The folder that is renamed to see whether that is possible (under a temporary name), and the end of its new name.
TRIAL, RENAMED = "rename", "-renamed"
#: File systems that can't lock.
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)


@contextmanager
def locked_folder(config: RunConfig) -> Iterator[None]:
    """Keeps every other process out of the output folder, which is made where it is not there. A killed process leaves
    no lock. What killed writes left there is deleted.

    Raises ValueError for a folder that another process writes, and, with nothing written, for one that holds another
    run or other files.
    """
    check_folder(config)
    folder = expanded(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        require_renames(folder)
        if folder.parent == folder or not (folder.parent / LOCK).is_file():  # a bucket is its own parent
            delete_leftovers(folder)
            yield
            return
        with locked(folder.parent):  # a tenant's folder in that of a run of many
            delete_leftovers(folder)
            yield


@contextmanager
def locked(folder: Place) -> Iterator[None]:
    if isinstance(folder, BucketPath):
        with held(folder / LOCK, devices.say):
            yield
        return
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
    with open(descriptor, "r+b", buffering=0) as stream:
        try:
            atomic.lock(stream, f"output_dir {folder}")
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            devices.say(f"{folder}: this file system can't lock files; let no second run write there")
        yield


def require_renames(folder: Place) -> None:
    """Raises ValueError for a folder in which no folder can be renamed. Checkpoints and adapters get their names so. A
    run would fail only when it has something to save. In a bucket nothing is renamed."""
    if isinstance(folder, BucketPath):
        return
    before = atomic.temporary_name(folder / TRIAL)
    after = before.with_name(before.name + RENAMED)
    try:
        before.mkdir()
        (before / "file").touch()
        os.rename(before, after)
    except OSError as error:
        raise ValueError(
            f"output_dir {folder}: a folder can't be renamed there ({error.strerror}), which saving needs. If gcsfuse "
            "mounted it, mount it with --rename-dir-limit=1000, or give output_dir=gs://bucket/folder instead "
            "(docs/training.md, section 5)"
        ) from None
    finally:
        for left in (before, after):
            shutil.rmtree(left, ignore_errors=True)


def trials_left(folder: Place) -> list[Path]:
    """What a kill left of `require_renames`."""
    return [*atomic.folders_left(folder / TRIAL), *atomic.folders_left(folder / TRIAL, RENAMED)]


def delete_leftovers(folder: Place) -> None:
    """Deletes the temporary files that killed writes left."""
    for left in trials_left(folder):
        shutil.rmtree(left, ignore_errors=True)
    for name in REPLACED:
        for file in atomic.files_left(folder / name):
            file.unlink(missing_ok=True)


def check_folder(config: RunConfig) -> None:
    """Raises ValueError for an output folder that holds another run, or something else than a run."""
    folder = expanded(config.output_dir)
    file = folder / "config.yaml"
    if file.is_file():
        difference = differences(load_config(file), config)
        if difference:
            raise ValueError(
                f"output_dir {folder} holds another run, which differs in {'; '.join(difference)}; "
                "choose another output_dir, or the same config to resume"
            )
    elif folder.exists():
        own = {folder / LOCK, *atomic.files_left(file), *trials_left(folder)} if folder.is_dir() else set()
        if not folder.is_dir() or set(folder.iterdir()) - own:
            raise ValueError(f"output_dir {folder} holds something else than a run; choose another")


def claim_folder(config: RunConfig) -> None:
    """Makes the output folder and writes the resolved config into it; a folder that holds another run is refused."""
    check_folder(config)
    folder = expanded(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")


# ---------------------------------------------------------------------------------------------------- which run it is


def differences(held: RunConfig, wanted: RunConfig) -> list[str]:
    """What makes two configs two runs: "train.learning_rate (0.1 there, 0.2 here)". A longer run is the same run."""
    there, here = fields_of_run(held), fields_of_run(wanted)
    names = [name for name in there | here if there.get(name) != here.get(name)]
    return [f"{name} ({there.get(name)!r} there, {here.get(name)!r} here)" for name in names]


def fields_of_run(config: RunConfig) -> dict[str, Any]:
    """The fields that make a config the run that it is, by their dotted names."""

    def flat(value, name=""):
        if not isinstance(value, dict):
            return {name: value}
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}" if name else key).items()}

    longer = ("data.cache",) if config.many else ("data.cache", "train.max_steps")  # of many tenants, some have ended
    fields = flat(config_dict(config))
    fields["mesh.fsdp"] = fields["mesh.fsdp"] or 1  # null: chosen; the default was 1 before, and old runs resume
    free = (*FREE_NAMES, *longer)
    return {k: v for k, v in fields.items() if k.split(".")[0] not in FREE_FIELDS and k not in free}


def run_digests(
    config: RunConfig,
    backbone: str | None,
    data: Iterable[tuple[Sequence[Example], EvalTask | None, EvalTask | None]],
    tenants: Sequence[str] | None = None,
) -> dict[str, str]:
    """What a checkpoint says of the run that it belongs to; see training.checkpoint.Progress.

    Args:
        backbone: the model's fingerprint.
        data: training examples, validation and test data, of each tenant.
        tenants: their names; None for a run of one adapter.
    """
    default = fields_of_run(replace(RunConfig(), adapter=type(config.adapter)()))
    fields = {k: v for k, v in fields_of_run(config).items() if k not in PLACES}
    own = {k: v for k, v in fields.items() if default.get(k) != v}  # so that a new field changes no old digest
    config_digest = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()
    whole, parts = hashlib.sha256(), {}
    for tenant, (examples, *tasks) in enumerate(data):
        of = f" of {tenants[tenant]}" if tenants else ""
        tokens = hashlib.sha256()
        for found in (whole, tokens):
            add_to_digest(found, examples)
        parts[f"training data{of}"] = part_digest(tokens, len(examples))
        for name, task in zip(("validation", "test"), tasks, strict=True):
            rows = None if task is None else [record._replace(place="") for record in task.records]
            text = json.dumps(rows, default=str).encode()
            whole.update(text)
            # How answers are scored may follow from the training data: the choices are its completions by default.
            scoring = "" if task is None else json.dumps([task.metric, task.choices, task.max_new_tokens])
            parts[f"{name} data{of}"] = part_digest(hashlib.sha256(text + scoring.encode()), len(rows or ()))
    joined = {"config": config_digest, "data": whole.hexdigest(), "backbone": backbone or ""}  # all that older ones say
    return joined | parts


def part_digest(content, count: int) -> str:
    """What a checkpoint says of one part of the data: how many examples it has, and their digest."""
    return f"{count} {content.hexdigest()}"
