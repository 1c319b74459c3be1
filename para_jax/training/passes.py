"""How the rows of an optimiser step are cut into passes: train.batch_size is the same on any number of chips."""

from __future__ import annotations

from typing import NamedTuple

from ..config import TrainSection, require


class Passes(NamedTuple):
    """The cut of one step: count x rows are its rows."""

    rows: int
    """of a pass, over all devices"""
    count: int


def step_passes(config: TrainSection, mesh) -> Passes:
    """The passes of a run of one adapter on this mesh.

    With train.batch_size: the fewest of equal size that have at most per_device_batch_size rows on a device.
    Raises ValueError for a batch_size that the devices do not divide, and for gradient_accumulation_steps that are not
    its number of passes.
    """
    devices = batch_devices(mesh)
    if config.batch_size is None:
        return Passes(config.per_device_batch_size * devices, config.gradient_accumulation_steps)
    require_divides(config, devices)
    of_device = config.batch_size // devices
    count = passes_allowed(config, (n for n in range(1, of_device + 1) if of_device % n == 0), of_device)
    return Passes(config.batch_size // count, count)


def passes_allowed(config: TrainSection, counts, of_device: int) -> int:
    """The first of these numbers of passes (the smallest first) that leaves at most per_device_batch_size of a device's
    rows to each pass; that of gradient_accumulation_steps, where it is set."""
    given, most = config.gradient_accumulation_steps, config.per_device_batch_size
    possible = [count for count in counts if of_device // count <= most]
    fits = given == 1 or given in possible
    expected = (
        f"nothing, or a number of passes that cuts train.batch_size ({config.batch_size}, {of_device} rows on each "
        f"device) into at most train.per_device_batch_size ({most}) rows: {', '.join(map(str, possible))}"
    )
    require(fits, "train.gradient_accumulation_steps", given, expected)
    return possible[0] if given == 1 else given


def require_divides(config: TrainSection, devices: int) -> None:
    """Raises ValueError where the devices can't have equally many of batch_size's rows."""
    expected = f"a multiple of {devices}, the devices of mesh.data x mesh.fsdp, which each take as many rows"
    batch = config.batch_size
    require(batch is None or batch % devices == 0, "train.batch_size", batch, expected)


def batch_devices(mesh) -> int:
    """The devices that a batch's rows are spread over."""
    return mesh.shape["data"] * mesh.shape["fsdp"]
