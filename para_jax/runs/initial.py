"""train.init_from: a run, or each of its tenants, starts from a trained adapter instead of a fresh one."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

from ..adapters.files import load_adapter
from ..adapters.folder import CONFIG
from ..adapters.methods import method_of
from ..config import ModelConfig, RunConfig, expanded, shorten
from .tenant_file import AT_ONCE


def initial_place(source: str, name: str = "") -> str:
    """The adapter to start from, for train.init_from.

    Args:
        source: an adapter's folder or hub id, or the folder of a run.
        name: of the tenant, where the folder may be that of a run of many.
    """
    place = expanded(source)
    if place.is_dir() and not (place / CONFIG).is_file():
        return str(place / name / "adapter")
    return source


def check_initial(configs: Iterable[RunConfig], model: ModelConfig) -> None:
    """Raises ValueError for an adapter to start from that can't be loaded, and for one that the config's `adapter` does
    not describe, with the fields that differ. Each is loaded for it: the last tenants of a long run start late."""
    described = {own.train.init_from: own.adapter for own in configs if own.train.init_from}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda place: load_adapter(place, model).config, described)
        for (place, here), there in zip(described.items(), found, strict=True):
            if differing := differences(there, here):
                fields = ", ".join(differing)
                raise ValueError(f"train.init_from {place}: {fields}; set the section adapter to what the adapter has")


def differences(there: Any, here: Any) -> list[str]:
    """The fields in which two configs of adapters differ."""
    if type(there) is not type(here):
        return [f"method={method_of(there).name} there, {method_of(here).name} here"]
    values = ((field.name, getattr(there, field.name), getattr(here, field.name)) for field in fields(here))
    return [f"{name}={shorten(one)} there, {shorten(other)} here" for name, one, other in values if one != other]
