"""What a command checks before it loads JAX, transformers and the devices: the paths and names that the user gave.

Everything here is checked again where it is used. Nothing is fetched: a hub id and a bucket are left to the command.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from importlib.util import find_spec
from itertools import islice
from shlex import quote

from ..config import RunConfig
from ..io.checks import expanded, nearest, printable
from ..io.hub import BUILT_IN, backbone_of, local_adapter, local_backbone
from ..io.messages import say
from ..io.storage.bucket import BucketPath, Place

#: Records of each split, and tenants, that are looked at.
CHECKED_RECORDS, CHECKED_TENANTS = 1000, 20


def check_run(config: RunConfig) -> None:
    """Raises ValueError for a backbone, data or output folder that a run on one host can't use."""
    if config.runtime.coordinator is not None:  # the hosts of a run report an error together, once they are joined
        return
    check_backbone(config.backbone.source)
    check_data(config, ("train", "validation", "test"))
    if "wandb" in config.logging.report_to and find_spec("wandb") is None:
        raise ValueError("logging.report_to: wandb is not installed; run `pip install 'para_jax[wandb]'`")
    folder = expanded(config.output_dir)
    if isinstance(folder, BucketPath):
        return
    if folder.exists():
        from ..runs.folder import check_folder

        check_folder(config)
    check_new_folder("output_dir", folder)


def check_moved(file: Place, overrides: Iterable[str], config: RunConfig) -> None:
    """Raises ValueError for the config.yaml of a run folder that was moved or copied: its output_dir still names the
    old place, where a new run would begin, or the original would continue."""
    if file.name != "config.yaml" or any(field.startswith("output_dir=") for field in overrides):
        return
    folder, output = file.parent, expanded(config.output_dir)
    is_run = any((folder / name).is_file() for name in ("metrics.jsonl", "comparison.json"))
    if is_run and folder.resolve() != output.resolve():
        here, there = (quote(f"output_dir={one}") for one in (folder, output))
        raise ValueError(
            f"{file} is in a run folder, but its output_dir is {output}: the folder was moved or copied, or this "
            f"command runs in another directory\nadd {here} to continue here, or {there} to train there"
        )


def check_new_folder(option: str, folder: Place) -> None:
    """Raises ValueError where a folder can't be made or used because there is a file in its place, or above it."""
    if isinstance(folder, BucketPath):
        return
    above = next((path for path in (folder, *folder.parents) if path.exists()), folder)
    if above.exists() and not above.is_dir():
        raise ValueError(f"{option} {folder}: {above} is a file, not a folder; choose another")


def check_backbone(source: str) -> None:
    """Raises ValueError for a path where there is no backbone."""
    local_backbone(expanded(source), source)


def chosen_backbone(given: str | None, adapters: Iterable[str]) -> str:
    """The backbone of a command: --backbone, else what the first adapter names, else the built-in one. Fetches that
    adapter if it is elsewhere. Raises ValueError for a path where there is no backbone."""
    first = next(iter(adapters), None) if given is None else None
    named = given or (backbone_of(first) if first is not None else "") or BUILT_IN
    try:
        check_backbone(named)
    except ValueError as error:
        if first is None:
            raise
        raise ValueError(f"{first} was trained on {printable(named)}: {error}\ngive --backbone SOURCE") from None
    if first is not None and named != BUILT_IN:
        say(f"backbone: {printable(named)}, which {first} names")
    return named


def check_adapters(sources: Iterable[str]) -> None:
    """Raises ValueError for a path where there is no adapter."""
    for source in sources:
        local_adapter(source)


def check_data(config: RunConfig, splits: Iterable[str]) -> None:
    """Raises ValueError for data that is not there, and for a wrong row among the first of each split. Rows of tenants
    are read as their tenant.yaml says."""
    from ..data.hf import check_name, is_hf, parse_hf
    from ..data.records import split_records
    from ..data.tenants import tenant_sections, with_own_fields

    sections = {"": config.data}
    if config.data.tenants:
        if isinstance(expanded(config.data.tenants), BucketPath):
            return
        sections = dict(islice(tenant_sections(config.data.tenants, config.data).items(), CHECKED_TENANTS))
        for name, one in sections.items():
            sections[name] = with_own_fields(replace(config, data=one), expanded(str(one.train))).data
    for name, section in sections.items():
        try:
            for split in splits:
                source = getattr(section, split)
                if is_hf(source):
                    check_name(parse_hf(source)[0])
                if not is_elsewhere(section, split):
                    for _ in islice(split_records(section, split) or [], CHECKED_RECORDS):
                        pass
        except ValueError as error:
            raise ValueError(f"{name}: {error}" if name else str(error)) from None


def is_elsewhere(section, split: str) -> bool:
    """Whether a split is in a bucket, or read by a library that takes seconds to load."""
    source = getattr(section, split) or section.train
    return source is not None and (":" in source.split("/")[0] or isinstance(expanded(source), BucketPath))


def check_tasks(tasks: Iterable[str], split: str) -> None:
    """Raises ValueError for --tasks that are not files, and can't be tasks of lm-eval because it is not installed."""
    from ..evaluation.task_file import INSTALL, named_file

    for text in tasks:
        if named_file(text, split) is None and find_spec("lm_eval") is None:
            raise ValueError(f"task {text}: there is no such file or folder, and {INSTALL}")


def check_target(target: Place) -> None:
    """Raises ValueError for what `inspect` without --data can't show."""
    if isinstance(target, BucketPath):
        return
    if not target.exists():
        advice = nearest(target) or "; give the folder of a run or adapter"
        raise ValueError(f"inspect {target}: no such folder{advice}")
    if target.is_file():
        raise ValueError(
            f"inspect {target}: this is a file; give the folder of a run or adapter, or add --data for a config"
        )
    held = "adapter_config.json", "config.yaml"
    if not any((target / name).is_file() for name in held):
        inside = [one.name for one in sorted(target.iterdir()) if any((one / name).is_file() for name in held)]
        advice = f"one of those in it: {printable(', '.join(inside), 200)}" if inside else "another folder"
        raise ValueError(
            f"{target} holds neither an adapter (adapter_config.json) nor a run (config.yaml); choose {advice}"
        )
