"""The learning rates that the trials of train.learning_rate=auto chose (runs/rates.py), as a run folder holds them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from ..config import RunConfig, shorten
from ..storage.bucket import Place
from ..training.metrics_file import is_number

#: The folder of the trials in a run's folder, and the file there with the rates.
TRIALS, FILE = "learning_rates", "chosen.json"


def is_auto(config: RunConfig) -> bool:
    return config.train.learning_rate == "auto"


def with_rate(config: RunConfig, rate: float | Literal["auto"] | None) -> RunConfig:
    return replace(config, train=replace(config.train, learning_rate=rate))


def chosen_rates(folder: Place) -> dict[str, float]:
    """The rates that the trials of a run folder chose, by tenant ("" in a run of one adapter); none before they have
    ended. Raises ValueError for a file that no run wrote."""
    file = folder / TRIALS / FILE
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_bytes().decode())["rates"]
        fits = isinstance(found, dict) and all(is_number(rate) and 0 <= rate < math.inf for rate in found.values())
        if not fits:
            raise ValueError(f"rates is {shorten(found)}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: {shorten(str(error))}. Delete the file; the trials then choose again") from None
    return {name: float(rate) for name, rate in found.items()}


def resolved(config: RunConfig, chosen: Mapping[str, float], name: str = "") -> RunConfig:
    """The config with the rate that was chosen for a tenant. A run of many keeps `auto`: its tenants have the rates."""
    return with_rate(config, chosen[name]) if is_auto(config) and name in chosen else config
