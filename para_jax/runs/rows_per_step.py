"""A run keeps its rows per step on other devices, and with them its batches and its number of steps."""

from __future__ import annotations

from dataclasses import replace

from ..config import RunConfig
from ..io.checks import require
from ..io.messages import say
from ..runtime.processes import on_first_process
from ..training.passes import Layout
from .folder import rows_before


def with_rows_before(config: RunConfig, otherwise: int | None = None) -> RunConfig:
    """The config of a run of one adapter, or of a sweep, with its rows per step so far as train.batch_size, if it
    leaves that open. They then stay the same on other devices, and so do the batches and the number of steps. The rows
    of a tenant do not depend on the devices.

    Args:
        otherwise: rows per step of a new run. None: the devices decide.
    """
    if config.data.tenants or config.train.batch_size is not None or (config.many and config.train.rows_per_tenant):
        return config
    rows = on_first_process(lambda: rows_before(config) or otherwise)
    if rows is None:
        return config
    return replace(config, train=replace(config.train, batch_size=rows, gradient_accumulation_steps=1))


def say_rows(kept: int, of_devices: int, devices: int) -> None:
    """Says that a step keeps its number of rows, although these devices would give it another one. Raises ValueError
    if they can't."""
    expected = f"a divisor of {kept}, the rows of a step of this run so far"
    require(kept % devices == 0, "the number of devices (mesh.data x mesh.fsdp)", devices, expected)
    if kept != of_devices:
        say(f"a step keeps the {kept} rows that it had on other devices (train.batch_size)")


def require_same_rows(config: RunConfig, layout: Layout) -> None:
    """Raises ValueError if this start took its rows per step from a checkpoint that turned out to be damaged."""
    kept = with_rows_before(config)
    if kept is not config and kept.train.batch_size != layout.tenant_rows:
        raise ValueError(
            f"the rows of a step ({layout.tenant_rows}) are those of a damaged checkpoint, which is set aside now; "
            f"before, they were {kept.train.batch_size}\nstart the command again"
        )
