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


def initial_places(source: str | None, names: Iterable[str]) -> dict[str, str | None]:
    """The adapter that each tenant starts from, for train.init_from; None: a fresh one.

    Args:
        source: an adapter's folder or hub id, or the folder of a run. In a run of many tenants each has its own.
        names: of the tenants; "" for the tenant of a run of one adapter.
    """
    if not source:
        return dict.fromkeys(names)
    place = expanded(source)
    if not place.is_dir() or (place / CONFIG).is_file():
        return dict.fromkeys(names, source)
    if (place / "adapter" / CONFIG).is_file():
        return dict.fromkeys(names, str(place / "adapter"))
    return {name: str((place / name if name else place) / "adapter") for name in names}


def check_initial(configs: Iterable[RunConfig], model: ModelConfig) -> None:
    """Raises ValueError for an adapter to start from that can't be loaded, and for one that the config's `adapter` does
    not describe, with the fields that differ. All are loaded now, because some tenants start late."""
    described = {own.train.init_from: own.adapter for own in configs if own.train.init_from}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        found = pool.map(lambda place: load_adapter(place, model).config, described)
        for (place, here), there in zip(described.items(), found, strict=True):
            require_described(f"train.init_from {place}", there, here)


def require_described(name: str, there: Any, here: Any) -> None:
    """Raises ValueError unless an adapter's config `there` is the one that a run has for its adapters."""
    if differing := differences(there, here):
        raise ValueError(f"{name}: {', '.join(differing)}; set these fields of `adapter` to the adapter's values")


def differences(there: Any, here: Any) -> list[str]:
    """The fields in which two configs of adapters differ."""
    if type(there) is not type(here):
        return [f"method={method_of(there).name} there, {method_of(here).name} here"]
    values = ((field.name, getattr(there, field.name), getattr(here, field.name)) for field in fields(here))
    return [f"{name}={shorten(one)} there, {shorten(other)} here" for name, one, other in values if one != other]
