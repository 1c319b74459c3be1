"""All targets by name, each with how many cases it gets."""

from functools import partial
from typing import NamedTuple

from . import adapters, backbones
from .cases import Target


class Aim(NamedTuple):
    make: Target
    share: float = 1.0
    """of --fuzz-cases: less for a target whose cases are slow"""
    short: int = 30
    """cases in the default tests"""


TARGETS: dict[str, Aim] = {
    "adapter-para": Aim(partial(adapters.adapter, "para")),
    "adapter-lora": Aim(partial(adapters.adapter, "lora")),
    "adapter-ia3": Aim(partial(adapters.adapter, "ia3")),
    "adapter-bank": Aim(adapters.bank),
    "backbone-config": Aim(backbones.config),
    "backbone-weights": Aim(backbones.weights),
}
