"""tenant.yaml, next to a tenant's train.jsonl: the fields that are set for this tenant alone, in the form of a run's
config."""

from __future__ import annotations

import difflib
from dataclasses import replace
from typing import Any

from ..config import RunConfig, config_dict
from ..config.fields import typed_fields
from ..config.file import read_yaml, replaced
from ..io.checks import printable
from ..io.storage.bucket import Place
from .tenants import OWN_FILE

#: Tenants' files that are read or written at once.
AT_ONCE = 16
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
#: Fields that a tenant's own value of another field resets, because they belong to the run's value of that field.
RESET = {"eval.metric": {"eval.also": (), "eval.choices": ()}, "train.num_epochs": {"train.max_steps": None}}


def with_own_fields(config: RunConfig, folder: Place) -> RunConfig:
    """A tenant's config with what the tenant.yaml in its data folder sets. Without that file, the config itself.

    Its own eval.metric resets the run's eval.also and eval.choices, and its own train.num_epochs the run's
    train.max_steps.

    Raises ValueError, naming the file and the field, for a file that is not YAML, a field that no tenant
    can set, and a value that the field does not accept.
    """
    file = folder / OWN_FILE
    if not file.exists():
        return config
    found = read_yaml(file)
    try:
        require_own(found)
        typed = typed_fields(found, config)
        return replaced(config, with_resets(typed))
    except ValueError as error:
        raise ValueError(f"{printable(str(file), 1000)}: {error}") from None


def own_values(config: RunConfig) -> dict[str, Any]:
    """The values of OWN_FIELDS in a config, as JSON by their dotted names."""
    held = config_dict(config)
    return {f"{section}.{field}": held[section][field] for section, field in (n.split(".") for n in OWN_FIELDS)}


def require_own(found: dict[str, Any]) -> None:
    """Raises ValueError for the first field that is not in OWN_FIELDS."""
    known = {name.partition(".")[0] for name in OWN_FIELDS}
    for section, fields in found.items():
        if section in known and not isinstance(fields, dict):
            continue  # typed_fields says what is wrong
        for name in [section] if section not in known else [f"{section}.{field}" for field in fields]:
            if name not in OWN_FIELDS:
                near = difflib.get_close_matches(name[:100], OWN_FIELDS, n=1, cutoff=0.8)
                meant = f"did you mean {near[0]}? " if near else ""
                raise ValueError(
                    f"{printable(name, 100)} can't be set for one tenant\n{meant}a {OWN_FILE} may set "
                    f"{', '.join(OWN_FIELDS)}; the run's config sets everything else"
                )


def with_resets(typed: dict[str, Any]) -> dict[str, Any]:
    given = {f"{section}.{name}" for section, fields in typed.items() for name in fields}
    reset: dict[str, dict[str, Any]] = {}
    for cause, values in RESET.items():
        for field, value in values.items() if cause in given else ():
            section, _, name = field.partition(".")
            reset.setdefault(section, {})[name] = value
    return {section: reset.get(section, {}) | fields for section, fields in typed.items()}


def of_most_memory(config: RunConfig, own: list[RunConfig]) -> RunConfig:
    """The run's config with the evaluation of its tenants that needs the most memory."""
    writes = [one.eval for one in own if one.eval.metric != "loss" or one.eval.also]
    if not writes:
        return config
    new = max(one.max_new_tokens or 0 for one in writes) or None
    return replace(config, eval=replace(config.eval, metric=writes[0].metric, also=writes[0].also, max_new_tokens=new))
