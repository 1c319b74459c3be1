"""The data of many tenants: a folder with their files, or what a program gave; and tenant.yaml, next to a tenant's
train.jsonl: the fields that are set for this tenant alone, in the form of a run's config."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import BASE, DataSection, RunConfig, config_dict
from ..config.fields import typed_fields
from ..config.file import read_yaml, replaced
from ..io.checks import expanded, near_name, printable
from ..io.storage.bucket import Place
from .given import PYTHON, SPLITS, is_given
from .hf import SAVED_SPLITS
from .rows import ENDINGS

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
#: Names that a run's folder uses itself, the name of the base model, and those of the splits of one tenant's data.
RESERVED = ("adapter", BASE, "checkpoints", "config.yaml", "learning_rates", "metrics.jsonl")
RESERVED += ("tensorboard", "tenants.json", *SPLITS)
#: Tenants' files that are read or written at once.
AT_ONCE = 16
OWN_FILE = "tenant.yaml"
#: The fields that it may set. None of them changes the compiled training step, which all tenants share.
OWN_FIELDS = (
    "data.prompt",
    "data.completion",
    "train.learning_rate",
    "train.warmup_ratio",
    "train.max_steps",
    "train.num_epochs",
    "eval.metric",
    "eval.also",
    "eval.choices",
    "eval.max_new_tokens",
    "eval.limit",
    "eval.every",
    "eval.patience",
    "eval.test",
    "eval.test_limit",
)


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
    found: dict[str, DataSection] = {}
    for path in data_in(root):
        name = path.name if path.is_dir() else path.stem
        require_name(path, name, found)
        found[name] = replace(section, train=str(path), validation=None, test=None, tenants=None)
    if not found:
        raise ValueError(f"data.tenants: {folder} has no tenants; add a subfolder or .jsonl file for each")
    return dict(sorted(found.items()))


def data_in(root: Place) -> list[Place]:
    """The subfolders and data files of a folder, sorted, without hidden ones."""
    shown = (path for path in root.iterdir() if path.name != SAVED_SPLITS and not path.name.startswith("."))
    return sorted(path for path in shown if path.is_dir() or path.suffix.lower() in ENDINGS)


def given_tenants(section: DataSection) -> dict[str, DataSection]:
    """The data section of each tenant that a program gave, sorted by name."""
    if section.given is None:
        raise ValueError(
            "data.tenants: the data of this run came from Python; give it again as train_tenants(config, data=...)"
        )
    found: dict[str, DataSection] = {}
    for name, splits in sorted(section.given.items()):
        require_name(name, name, found)
        found[name] = replace(section, train=f"{PYTHON}/{name}", validation=None, test=None, tenants=None, given=splits)
    return found


def require_name(place: Place | str, name: str, others: dict[str, DataSection]) -> None:
    """Raises ValueError unless a tenant's name can be the name of a folder inside a run's folder, next to others."""
    if not NAME.fullmatch(name) or name.lower() in (*RESERVED, *map(str.lower, others)):
        raise ValueError(
            f"data.tenants: {str(place)!r}: {name!r} cannot be a tenant's name; use letters, digits, '.', '_' and '-', "
            f"starting with a letter or digit, once each, and none of {', '.join(RESERVED)}"
        )


# --------------------------------------------------------------------------------------------------------- tenant.yaml


def with_own_fields(config: RunConfig, folder: Place) -> RunConfig:
    """A tenant's config with what the tenant.yaml in its data folder sets. Without that file, the config itself.

    Its own eval.metric resets the run's eval.also and eval.choices, and its own train.num_epochs the run's
    train.max_steps, because they belong to the run's value of that field.

    Raises ValueError, naming the file and the field, for a file that is not YAML, a field that no tenant can set, and a
    value that the field does not accept.
    """
    file = folder / OWN_FILE
    if not file.exists():
        return config
    values = read_yaml(file)
    try:
        for section, fields in values.items():
            for field in [f"{section}.{name}" for name in fields] if isinstance(fields, dict) else [section]:
                if field not in OWN_FIELDS:
                    raise ValueError(
                        f"{printable(field, 100)} can't be set for one tenant{near_name(field, OWN_FIELDS)}\n"
                        f"a {OWN_FILE} may set {', '.join(OWN_FIELDS)}; the run's config sets everything else"
                    )
        typed = typed_fields(values, config)
        if "metric" in typed.get("eval", {}):
            typed["eval"] = {"also": (), "choices": ()} | typed["eval"]
        if "num_epochs" in typed.get("train", {}):
            typed["train"] = {"max_steps": None} | typed["train"]
        return replaced(config, typed)
    except ValueError as error:
        raise ValueError(f"{printable(str(file), 1000)}: {error}") from None


def own_values(config: RunConfig) -> dict[str, Any]:
    """The values of OWN_FIELDS in a config, as JSON by their dotted names."""
    held = config_dict(config)
    return {f"{section}.{field}": held[section][field] for section, field in (n.split(".") for n in OWN_FIELDS)}


def of_most_memory(config: RunConfig, own: list[RunConfig]) -> RunConfig:
    """The run's config with the evaluation of its tenants that needs the most memory."""
    writes = [tenant.eval for tenant in own if tenant.eval.metric != "loss" or tenant.eval.also]
    if not writes:
        return config
    new = max(section.max_new_tokens or 0 for section in writes) or None
    return replace(config, eval=replace(config.eval, metric=writes[0].metric, also=writes[0].also, max_new_tokens=new))
