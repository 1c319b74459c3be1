"""A run's logs: its own, and in a run of many the metrics.jsonl of each tenant."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from ..data.tenants import AT_ONCE
from ..io.storage.bucket import BucketPath
from ..runtime.processes import is_first
from ..training.log import Log
from ..training.metrics_file import MetricsWriter
from .health import Health
from .tenants import Tenant


class Logs(NamedTuple):
    run: Log
    tenants: list[MetricsWriter]
    """empty in a run of one adapter, whose log is the run's"""
    health: Health
    """sees what is logged"""

    def write(self, tenant: int, step: int, values: dict[str, float], *, every: int = 1, show: bool = False) -> None:
        """Adds values of a tenant's own step.

        Args:
            show: for the user to see too, in a run of one adapter.
        """
        self.health.watch(tenant, step, values)
        if not self.tenants:
            self.run.write(step, values, show=show)
        elif is_first() and step % every == 0:
            self.tenants[tenant].add(step, values)

    def flush(self) -> None:
        """Writes the rows that the logs keep back; see `Log.flush`."""
        self.run.flush()
        if is_first():
            with self.run.errors_named(), ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(MetricsWriter.flush, self.tenants))


def tenant_rows(tenants: Sequence[Tenant]) -> list[MetricsWriter]:
    """Adds to the tenants' metrics.jsonl. In a bucket only with each checkpoint: there each write takes a while."""
    files = [tenant.folder / "metrics.jsonl" for tenant in tenants]
    return [MetricsWriter(file, math.inf if isinstance(file, BucketPath) else None) for file in files]
