"""The learning rates that the trials of train.learning_rate=auto chose (runs/rates.py), as a run folder holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from ..config import RunConfig
from ..io import atomic
from ..io.storage.bucket import Place

#: The folder of the trials in a run's folder, and the file there with the rates.
TRIALS, FILE = "learning_rates", "chosen.json"


def is_auto(config: RunConfig) -> bool:
    return config.train.learning_rate == "auto"


def with_rate(config: RunConfig, rate: float | Literal["auto"] | None) -> RunConfig:
    return replace(config, train=replace(config.train, learning_rate=rate))


def chosen_rates(folder: Place) -> dict[str, float]:
    """The rates that the trials of a run folder chose, by tenant ("" in a run of one adapter); none before they have
    ended."""
    file = folder / TRIALS / FILE
    return atomic.read_json(file, "Delete it; the trials then choose again")["rates"] if file.is_file() else {}


def resolved(config: RunConfig, chosen: Mapping[str, float], name: str = "") -> RunConfig:
    """The config with the rate that was chosen for a tenant. A run of many keeps `auto`: its tenants have the rates."""
    return with_rate(config, chosen[name]) if is_auto(config) and name in chosen else config
