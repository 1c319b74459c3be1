"""How the rows of an optimiser step are cut into passes: train.batch_size is the same on any number of chips."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

from ..config import RunConfig, TrainSection


class Layout(NamedTuple):
    """How a run's batches are cut."""

    slots: int
    """tenants whose weights and optimiser state are on the devices"""
    groups: int
    """the maximum number of tenants in a pass"""
    rows: int
    """a group's rows in a pass"""
    passes: int
    turns: int = 1
    """passes of different tenants; the others hold more rows of the same ones"""

    @property
    def together(self) -> int:
        """The maximum number of tenants in a step."""
        return self.groups * self.turns

    @property
    def passes_of_tenant(self) -> int:
        """The passes that a tenant's rows of a step are cut into."""
        return self.passes // self.turns

    @property
    def pass_rows(self) -> int:
        """Rows of a pass, over all devices."""
        return self.groups * self.rows

    @property
    def tenant_rows(self) -> int:
        """A tenant's rows in a step."""
        return self.rows * self.passes_of_tenant


def lay_out(config: RunConfig, mesh, tenants: int = 1) -> Layout:
    """The layout of a run on this mesh. A run of one adapter has one group, which takes whole passes. So has a sweep,
    with one combination in a step, unless train.rows_per_tenant or train.batch_size is set: each combination steps with
    as many rows as in a run of its own.

    With many tenants no batch has more groups than tenants can fill, unless each device needs some rows. With
    train.batch_size, a step has batch_size / rows_per_tenant tenants on any mesh. A pass holds some of them, and all
    their rows where it can.

    Raises ValueError as step_passes does.
    """
    if not config.many:
        rows, count = step_passes(config.train, mesh)
        return Layout(1, 1, rows, count)
    train, slots = config.train, min(config.train.tenants_at_once or tenants, tenants)
    if not config.data.tenants and train.rows_per_tenant is train.batch_size is None:
        rows, count = step_passes(train, mesh)
        return Layout(slots, 1, rows, count)
    rows, over = config.rows_per_tenant, dividing_devices(train, mesh)
    if train.batch_size is None:
        groups = over * min(train.per_device_batch_size // rows, math.ceil(slots / over))
        return Layout(slots, groups, rows, train.gradient_accumulation_steps)
    most = train.batch_size // rows
    # The fewest groups that fill the slots and that the devices divide.
    groups = next(n for n in range(min(slots, most), most + 1) if n * rows % over == 0)
    cuts = {
        turns * parts: (turns, parts)
        for parts in divisors(rows)  # largest first: of equally many passes, those that split the fewest rows stay
        for turns in divisors(groups)
        if groups // turns * (rows // parts) % over == 0
    }
    passes = fewest_passes(train, cuts, groups * rows // over)
    turns, parts = cuts[passes]
    return Layout(slots, groups // turns, rows // parts, passes, turns)


def divisors(count: int) -> list[int]:
    """The largest first."""
    return [n for n in range(count, 0, -1) if count % n == 0]


class Passes(NamedTuple):
    """The cut of one step: count x rows are its rows."""

    rows: int
    """of a pass, over all devices"""
    count: int


def step_passes(config: TrainSection, mesh) -> Passes:
    """The passes of a run of one adapter on this mesh.

    With train.batch_size: the fewest of equal size that have at most per_device_batch_size rows on a device.
    Raises ValueError for a batch_size that the devices do not divide.
    """
    devices = dividing_devices(config, mesh)
    if config.batch_size is None:
        return Passes(config.per_device_batch_size * devices, config.gradient_accumulation_steps)
    of_device = config.batch_size // devices
    count = fewest_passes(config, divisors(of_device), of_device)
    return Passes(config.batch_size // count, count)


def fewest_passes(config: TrainSection, counts: Iterable[int], of_device: int) -> int:
    """The smallest of these numbers of passes that gives a device at most per_device_batch_size of its rows in each."""
    return min(count for count in counts if of_device // count <= config.per_device_batch_size)


def dividing_devices(config: TrainSection, mesh) -> int:
    """batch_devices. Raises ValueError if batch_size's rows can't be divided equally among them."""
    devices = batch_devices(mesh)
    if config.batch_size is not None and config.batch_size % devices:
        raise ValueError(
            f"train.batch_size {config.batch_size} can't be split evenly over {devices} devices "
            f"(mesh.data x mesh.fsdp); choose a multiple of {devices}"
        )
    return devices


def batch_devices(mesh) -> int:
    """The devices that a batch's rows are spread over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
