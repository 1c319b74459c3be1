"""train.init_from: a run, or each of its tenants, starts from a trained adapter instead of a fresh one."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.files import CONFIG, load_adapter
from ..adapters.methods import method_of
from ..config import ModelConfig, RunConfig
from ..data.tenants import AT_ONCE
from ..io.checks import expanded, shorten


def initial_places(source: str | None, names: Iterable[str]) -> dict[str, str | None]:
    """The adapter that each tenant starts from, for train.init_from; None: a fresh one.

    Args:
        source: an adapter's folder or hub id, or the folder of a run. In a run of many tenants each has its own, or a
            folder has an adapter for each, as PEFT writes several.
        names: of the tenants; "" for the tenant of a run of one adapter.
    """
    if not source:
        return dict.fromkeys(names)
    place = expanded(source)
    if not place.is_dir() or (place / CONFIG).is_file():
        return dict.fromkeys(names, source)
    if (place / "adapter" / CONFIG).is_file():
        return dict.fromkeys(names, str(place / "adapter"))

    def own(name: str) -> str:
        folder = place / name if name else place
        return str(folder if name and (folder / CONFIG).is_file() else folder / "adapter")

    names = list(names)
    with ThreadPoolExecutor(AT_ONCE) as pool:  # in a bucket each file takes a request
        return dict(zip(names, pool.map(own, names), strict=True))


def initial_adapter(own: RunConfig, model_config: ModelConfig, *, model=None) -> Adapter:
    """The adapter that a tenant starts from. Raises ValueError if it can't be loaded, or if the config's `adapter` does
    not describe it, with the fields that differ.

    Args:
        model: as for load_adapter.
    """
    source = own.train.init_from
    assert source is not None, "a tenant without init_from starts from a fresh adapter"
    adapter = load_adapter(source, model_config, model=model)
    if differing := adapter_differences(adapter.config, own.adapter):
        found = ", ".join(differing)
        raise ValueError(f"train.init_from {source}: {found}; set these fields of `adapter` to the adapter's values")
    return adapter


def adapter_differences(there: Any, here: Any) -> list[str]:
    """The fields in which two configs of adapters differ."""
    if type(there) is not type(here):
        return [f"method={method_of(there).name} there, {method_of(here).name} here"]
    values = ((field.name, getattr(there, field.name), getattr(here, field.name)) for field in fields(here))
    return [f"{name}={shorten(one)} there, {shorten(other)} here" for name, one, other in values if one != other]
