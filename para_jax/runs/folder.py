"""A run's output folder: which run it holds, its lock, and what resuming repairs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import RunConfig, config_dict, load_config, save_config
from ..data.example_arrays import examples_digest
from ..data.tenants import AT_ONCE, OWN_FIELDS
from ..io import atomic
from ..io.checks import expanded, shorten
from ..io.record_file import lock_output
from ..io.storage.bucket import BucketPath, Place
from ..training.metrics_file import Reached, is_log, read_metrics, write_metrics
from .chosen import TRIALS, chosen_rates, is_auto, resolved, with_rate

if TYPE_CHECKING:  # `check_folder` is asked before JAX is loaded
    from .standing import Standing
    from .tenants import Tenant

#: A folder holds the same run although these differ.
FREE_FIELDS = ("output_dir", "checkpoint", "logging", "profiler", "runtime")
#: Those of them that may differ between the hosts of a run. All hosts save a checkpoint at the same step.
HOST_FIELDS = tuple(name for name in FREE_FIELDS if name != "checkpoint")
#: Fields of other sections that do not make it another run either. A longer run is the same run.
FREE_NAMES = (
    "backbone.attention", "data.cache", "eval.base", "train.cache_prompts", "train.max_steps",
    "train.num_epochs",
)  # fmt: skip
#: Fields that say where and in which pieces a run computes. They change its numbers by rounding alone.
MEMORY_NAMES = ("eval.batch_size", "mesh.data", "mesh.fsdp", "mesh.tensor", "train.remat")
#: With train.batch_size, these say only how a step is cut into passes.
PASSES_NAMES = ("train.gradient_accumulation_steps", "train.per_device_batch_size")
#: Where the data and the backbone are; a checkpoint identifies them by their content.
PLACES = ("data.train", "data.validation", "data.test", "data.tenants", "data.data_dir", "backbone.source")
#: The file that the writing process keeps locked. It stays when that process ends.
LOCK = ".lock"
#: Files that `atomic` replaces in a run's folder or in a tenant's.
REPLACED = ("config.yaml", "metrics.jsonl", "tenants.json", "scores.json")
#: The folder that is renamed to see whether that works (under a temporary name), and the end of its new name.
TRIAL, RENAMED = "rename", "-renamed"


@contextmanager
def locked_folder(config: RunConfig) -> Iterator[None]:
    """Keeps every other process out of the output folder, and makes it if it is missing. A killed process leaves no
    lock. Deletes what killed writes left. A bucket has no lock: the launcher sees to it that a run has one writer.

    Raises ValueError for a folder that another process is writing. Also, before anything is written, for one that holds
    another run or other files, or a tenant of a run of many.
    """
    check_folder(config)
    folder = expanded(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        require_renames(folder)
        above = folder.parent if (folder.parent / LOCK).is_file() else None  # perhaps that of a run of many
        with nullcontext() if above is None else locked(above):
            require_own_run(config, folder)
            delete_leftovers(folder)
            yield


def require_own_run(config: RunConfig, folder: Place) -> None:
    """Raises ValueError for the folder of a tenant of a run of many, which has no checkpoints: the config there would
    start again, and replace the tenant's adapter and log."""
    above = folder.parent / "config.yaml"
    if config.many or not (folder / "config.yaml").is_file():
        return
    if above.is_file() and load_config(above).many:
        raise ValueError(
            f"output_dir {folder} holds a tenant of the run in {folder.parent}, and would be trained from the start\n"
            f"train {above} to continue it, or choose another output_dir"
        )


@contextmanager
def locked(folder: Place) -> Iterator[None]:
    """Holds the lock of a folder during the block. Where a disk can't lock, says so; a bucket has none. Raises
    ValueError, naming the folder, if another process holds it."""
    if isinstance(folder, BucketPath):
        yield
        return
    with open(folder / LOCK, "a+b", buffering=0) as stream:
        lock_output(stream, f"output_dir {folder}")
        yield


def require_renames(folder: Place) -> None:
    """Raises ValueError for a folder in which folders can't be renamed. Saving needs it, so a run would fail late. In a
    bucket nothing is renamed."""
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
            f"output_dir {folder}: saving needs to rename folders there, and can't ({error.strerror}). If gcsfuse "
            "mounted it, mount it with --rename-dir-limit=1000, or give output_dir=gs://bucket/folder instead "
            "(docs/scaling.md#a-bucket)"
        ) from None
    finally:
        for left in (before, after):
            shutil.rmtree(left, ignore_errors=True)


def trials_left(folder: Place) -> list[Path]:
    """The folders that a killed `require_renames` left."""
    return [*atomic.folders_left(folder / TRIAL), *atomic.folders_left(folder / TRIAL, RENAMED)]


def delete_leftovers(folder: Place) -> None:
    """Deletes the temporary files that killed writes left."""
    from ..training.last_state import last_states_left

    for left in trials_left(folder):
        shutil.rmtree(left, ignore_errors=True)
    for file in [*(left for name in REPLACED for left in atomic.files_left(folder / name)), *last_states_left(folder)]:
        file.unlink(missing_ok=True)


def check_folder(config: RunConfig) -> None:
    """Raises ValueError for an output folder that holds another run, or is not a run folder.

    config.yaml has train.learning_rate=auto until the trials have chosen, and then the number.
    """
    folder = expanded(config.output_dir)
    file = folder / "config.yaml"
    if file.is_file():
        chosen = chosen_rates(folder)
        held = resolved(load_config(file), chosen)  # perhaps it was killed before the number was written
        if found := differences(held, resolved(config, chosen)):
            raise another_run(folder, found)
    elif folder.exists():
        own = {folder / LOCK, *atomic.files_left(file), *trials_left(folder)} if folder.is_dir() else set()
        if not folder.is_dir() or set(folder.iterdir()) - own:
            raise ValueError(f"output_dir {folder} is not a run folder; choose another")


def rows_before(config: RunConfig) -> int | None:
    """A tenant's rows in each step of a run so far, or of its trials; None: nothing is saved."""
    from ..training.checkpoint import unchecked_progress

    rows = unchecked_progress(expanded(config.output_dir) / "checkpoints").get("rows")
    trials = expanded(config.output_dir) / TRIALS / "1" / "config.yaml"
    if rows is None and trials.is_file():
        rows = load_config(trials).train.batch_size
    return rows if type(rows) is int and rows > 0 else None


#: Differences that an error lists, one per line.
LISTED = 15


def another_run(folder: Place, found: Sequence[str]) -> ValueError:
    """The error for an output folder whose run differs in these fields."""
    more = [f"and {len(found) - LISTED} more"] if len(found) > LISTED else []
    advice = "choose another output_dir, or the same config to resume:"
    if all(one.partition(" ")[0] in PLACES for one in found):
        advice = (
            f"choose another output_dir; if the files have only moved, write their new paths into {folder}/config.yaml"
        )
    lines = f"output_dir {folder} holds another run", advice
    return ValueError("\n".join([*lines, *(f"  {one}" for one in [*found[:LISTED], *more])]))


def check_tenants(config: RunConfig, own: dict[str, RunConfig]) -> None:
    """Raises ValueError for tenants in the output folder that would be trained otherwise than they were, by what their
    tenant.yaml sets.

    Args:
        own: each tenant's config.
    """

    def changes(name: str) -> list[str]:
        file = expanded(config.output_dir) / name / "config.yaml"
        if not file.is_file():
            return []
        held = load_config(file)
        if is_auto(held):  # perhaps killed before the number was written
            held = with_rate(held, own[name].train.learning_rate)
        found = differences(held, own[name])
        return [f"{name}: {one}" for one in found if one.partition(" ")[0] in OWN_FIELDS]

    if not config.data.tenants or not expanded(config.output_dir).is_dir():
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = [one for each in pool.map(changes, own) for one in each]
    if found:
        raise another_run(expanded(config.output_dir), found)


def claim_folder(config: RunConfig) -> None:
    """Makes the output folder and writes the resolved config into it; a folder that holds another run is refused."""
    check_folder(config)
    folder = expanded(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")


def claim_folders(config: RunConfig, tenants: Sequence[Tenant]) -> None:
    """Claims the output folder, and in a run of many each tenant's folder in it."""
    claim_folder(config)
    if not config.many:
        return
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(claim_tenant, tenants))


def claim_tenant(tenant: Tenant) -> None:
    tenant.folder.mkdir(exist_ok=True)
    delete_leftovers(tenant.folder)
    save_config(tenant.config, tenant.folder / "config.yaml")


# ------------------------------------------------------------------------------------------------------------- resuming


def mend_folders(
    config: RunConfig, standing: Standing, tenants: Sequence[Tenant], log: Place, *, resumed: bool
) -> None:
    """Puts the folders of these tenants into the state of the checkpoint that they resume from.

    Args:
        log: the metrics.jsonl of their part of the run, which is ready already.
    """
    from ..adapters.files import require_replaceable
    from ..training.log import drop_rows

    if not config.many:
        require_replaceable(tenants[0].folder / "adapter")
        return

    def mend(i: int) -> None:
        own = tenants[i].folder
        require_replaceable(own / "adapter")  # the next save would refuse it, perhaps hours later
        reached = Reached(standing.steps[i], standing.evaluated[i]) if resumed else None
        drop_rows(own / "metrics.jsonl", reached, ended=standing.over[i])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(mend, range(len(tenants))))
    drop_unsure(standing, log)


def drop_unsure(standing: Standing, file: Place) -> None:
    """Drops the scores of the last step that will be measured again from the run's log."""
    again = {name for i, name in enumerate(standing.names) if standing.evaluated[i] < standing.steps[i]}
    if again and is_log(file):
        kept = [
            row
            for row in read_metrics(file)
            if row["step"] < standing.step or not any(key.rpartition("/")[0] in again for key in row)
        ]
        write_metrics(file, kept)


# ---------------------------------------------------------------------------------------------------- which run it is


def differences(found: RunConfig, wanted: RunConfig) -> list[str]:
    """The fields that make two configs different runs: "train.learning_rate (0.1 there, 0.2 here)"."""
    there, here = fields_of_run(found), fields_of_run(wanted)
    free = PASSES_NAMES * any(config.train.batch_size is not None for config in (found, wanted))
    names = [name for name in there | here if name not in free and there.get(name) != here.get(name)]
    return [f"{name} ({shorten(there.get(name))} there, {shorten(here.get(name))} here)" for name in names]


def fields_of_run(config: RunConfig) -> dict[str, Any]:
    """The fields that identify a run, by their dotted names."""

    def flat(value, name=""):
        if not isinstance(value, dict):
            return {name: value}
        return {k: v for key, part in value.items() for k, v in flat(part, f"{name}.{key}" if name else key).items()}

    free = FREE_NAMES + MEMORY_NAMES + PASSES_NAMES * (config.train.batch_size is not None)
    fields: dict[str, Any] = flat(config_dict(config))
    return {k: v for k, v in fields.items() if k.split(".")[0] not in FREE_FIELDS and k not in free}


def run_digests(config: RunConfig, backbone: str | None, tenants: Sequence[Tenant]) -> dict[str, str]:
    """What a checkpoint says about the run that it belongs to; see runs.standing.Standing. A part of the data is its
    number of examples and their digest.

    Args:
        backbone: the model's fingerprint.
    """
    fields = {k: v for k, v in fields_of_run(config).items() if k not in PLACES}
    parts = {"config": hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()}
    parts["backbone"] = backbone or ""
    for tenant in tenants:
        examples = tenant.data.examples
        parts[tenant.part("training")] = f"{len(examples)} {examples_digest(examples)}"
        for name, task in (("validation", tenant.validation), ("test", tenant.test)):
            rows = None if task is None else [record._replace(place="") for record in task.records]
            text = json.dumps(rows, default=str).encode()
            # How answers are scored may follow from the training data: the choices are its completions by default.
            scoring = "" if task is None else json.dumps([task.metric, task.choices, task.max_new_tokens])
            parts[tenant.part(name)] = f"{len(rows or ())} {hashlib.sha256(text + scoring.encode()).hexdigest()}"
    return parts
