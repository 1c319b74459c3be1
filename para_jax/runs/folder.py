"""A run's output folder: which run it holds, its lock, and what resuming repairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

from ..config import RunConfig, config_dict, load_config, save_config
from ..config.file import replaced
from ..data.tenants import AT_ONCE
from ..io.checks import expanded, shorten
from ..io.record_file import lock_output
from ..io.storage.bucket import BucketPath, Place

if TYPE_CHECKING:  # `check_folder` is asked before JAX is loaded
    from .tenants import Tenant

Item = TypeVar("Item")
#: Sections and fields that say where, how fast and how long a run computes. Its results don't depend on them but for
#: rounding, and a longer run is the same run.
FREE = frozenset(
    "output_dir checkpoint logging runtime mesh backbone.attention eval.base eval.batch_size "
    "train.cache_prompts train.max_steps train.num_epochs train.remat".split()
)
#: With train.batch_size, these say only how a step is cut into passes.
PASSES = frozenset({"train.gradient_accumulation_steps", "train.per_device_batch_size"})
#: What a config may leave open. The first start decides it, and writes it to config.yaml.
DECIDED = (
    "train.batch_size", "train.learning_rate", "data.max_seq_length", "eval.metric", "eval.also", "eval.choices",
    "eval.max_new_tokens",
)  # fmt: skip
OPEN = (None, "auto", [])
#: The file that the writing process keeps locked. It stays when that process ends.
LOCK = ".lock"


# ---------------------------------------------------------------------------------------------------- which run it is


def identity(config: RunConfig) -> dict[str, Any]:
    """The fields that make a config another run, by their dotted names."""
    fields: dict[str, Any] = {}
    for name, held in config_dict(config).items():
        inside = held if isinstance(held, dict) else {}
        fields |= {f"{name}.{field}": value for field, value in inside.items()} or {name: held}
    free = FREE | (PASSES if config.train.batch_size is not None else set())
    return {name: value for name, value in fields.items() if not {name, name.split(".")[0]} & free}


def decided(config: RunConfig) -> dict[str, Any]:
    """What the first start of a run decided, by DECIDED's names, from the config.yaml in the folder of this config;
    empty before it. Raises ValueError for the folder of another run."""
    folder = expanded(config.output_dir)
    file = folder / "config.yaml"
    if not file.is_file():
        return {}
    held = load_config(file)
    fields = config_dict(held)
    values = {name: fields[name.split(".")[0]][name.split(".")[1]] for name in DECIDED}
    there, here = identity(held), identity(with_decided(config, values))  # what was left open is no difference
    found = [name for name in there | here if there.get(name) != here.get(name)]
    if found:
        lines = [f"  {name} ({shorten(there.get(name))} there, {shorten(here.get(name))} here)" for name in found]
        advice = (
            f"choose another output_dir, or the same config to resume; if files have only moved, write their new paths "
            f"into {file}:"
        )
        raise ValueError("\n".join([f"output_dir {folder} holds another run", advice, *lines]))
    return values


def with_decided(config: RunConfig, values: dict[str, Any]) -> RunConfig:
    """The config with these values, by DECIDED's names, of the fields that it leaves open. Passes follow from
    train.batch_size."""
    fields, changes = config_dict(config), dict[str, dict[str, Any]]()
    for name, value in values.items():
        section, field = name.split(".")
        if fields[section][field] in OPEN and value not in OPEN:
            changes.setdefault(section, {})[field] = tuple(value) if isinstance(value, list) else value
    if "batch_size" in changes.get("train", {}):
        changes["train"]["gradient_accumulation_steps"] = 1
    return replaced(config, changes)


def check_folder(config: RunConfig) -> None:
    """Raises ValueError for an output folder that holds another run, or is not a run folder."""
    folder = expanded(config.output_dir)
    if decided(config) or not folder.exists():
        return
    # the lock, and what is left of a config that a kill broke off
    if not folder.is_dir() or not all(path.name.startswith(".") for path in folder.iterdir()):
        raise ValueError(f"output_dir {folder} is not a run folder; choose another")


def check_tenants(config: RunConfig, names: Iterable[str]) -> None:
    """Raises ValueError for an output folder that holds a run of other tenants."""
    folder, names = expanded(config.output_dir), set(names)
    claimed = {path.parent.name for path in folder.glob("*/config.yaml")} if folder.is_dir() else set()
    if gone := sorted(claimed - names):
        raise ValueError(
            f"output_dir {folder} holds tenants that {config.data.tenants} lacks: {shorten(gone)}\n"
            "put their data back to resume, or choose another output_dir"
        )
    new, saved = sorted(names - claimed), folder / "checkpoints"
    if new and saved.is_dir() and any(saved.iterdir()):
        raise ValueError(
            f"output_dir {folder} holds a run that has begun without {shorten(new)}\n"
            "train new tenants in a run of their own, with another output_dir; serve and evaluate take both folders"
        )


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


# --------------------------------------------------------------------------------------------------- claims and locks


@contextmanager
def locked_folder(config: RunConfig) -> Iterator[None]:
    """Keeps every other process out of the output folder, and makes it if it is missing. A killed process leaves no
    lock. A bucket has no lock: the launcher sees to it that a run has one writer.

    Raises ValueError for a folder that another process is writing. Also, before anything is written, for one that holds
    another run or other files, or a tenant of a run of many.
    """
    check_folder(config)
    folder = expanded(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        require_own_run(config, folder)
        yield


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


def claim_folder(config: RunConfig) -> None:
    """Makes the output folder and writes the config into it; a folder that holds another run is refused."""
    check_folder(config)
    claim_folders(config, ())


def claim_folders(config: RunConfig, tenants: Sequence[Tenant]) -> None:
    """Writes the config of a run that has been checked, and in a run of many each tenant's into a folder of its own."""
    folder = expanded(config.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "config.yaml")
    if config.many:
        at_once(claim_tenant, tenants)


def claim_tenant(tenant: Tenant) -> None:
    tenant.folder.mkdir(exist_ok=True)
    save_config(tenant.config, tenant.folder / "config.yaml")


def at_once(do: Callable[[Item], Any], items: Iterable[Item]) -> list[Any]:
    """Does something for each tenant, several at once: in a bucket each file takes a request."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        return list(pool.map(do, items))
