"""Where a run stands, without its arrays: what a checkpoint says as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..io.checks import require
from ..training.passes import Layout
from ..training.scores_file import Records
from .tenants import Tenant


class Standing(NamedTuple):
    """Where a run stands. Lists have a value for each tenant, in the run's order. The data position is the number of
    steps: batch i of a tenant is a pure function of (seed, i)."""

    step: int
    """of the run"""
    names: list[str]
    slots: list[int]
    """the tenant in each slot of the stack; -1: none. One that has ended stays until another takes its slot"""
    steps: list[int]
    """each tenant's own steps"""
    best_score: list[float | None]
    best_step: list[int]
    since_best: list[int]
    """evaluations without a better score; of equal scores, the one with the lower loss is better"""
    evaluated: list[int]
    """the last own step whose adapter was scored"""
    test_before: list[float | None]
    """the backbone's score"""
    failed: list[int | None]
    """the step of the run at which its loss or gradient was not finite"""
    ended: list[str | None]
    """why: "done", "patience" or "not finite\""""
    run: dict[str, str]
    """digests of what the run is made of, by name: "config", "backbone", what digests_of_run adds, and the parts of the
    data ("training data", ...; "training data of NAME"), which also say their number of examples"""
    rows: int
    """of each tenant in one of its steps"""
    scores: dict[str, dict[str, dict[str, str | int | dict[str, float] | list[float] | list[list[str]]]]] = {}
    """each tenant's records by its name, as training/scores_file.py describes them"""
    starts: dict[str, str] = {}
    """a hash of the adapter that each tenant which waits for a slot will start from, by its name (train.init_from)"""
    kept: dict[str, str] = {}
    """a hash of each tenant's best adapter, which its folder holds, by its name"""
    entries: dict[str, dict[str, str | int | float | None]] = {}
    """of each tenant when it ended, by its name, as tenants.json says it but for the scores"""

    health: dict[str, list[list[float]]] = {}
    """what runs/health.py keeps of the steps so far"""

    def changed(self, tenant: int, **values) -> Standing:
        """The standing with other values of one tenant."""
        lists = {name: list(getattr(self, name)) for name in values}
        for name, value in values.items():
            lists[name][tenant] = value
        return self._replace(**lists)

    def with_score(self, tenant: int, what: str, record: dict[str, Any]) -> Standing:
        """The standing with a record of a tenant."""
        name = self.names[tenant]
        return self._replace(scores=self.scores | {name: self.records(tenant) | {what: record}})

    def with_kept(self, tenant: int, adapter: str) -> Standing:
        """The standing where this is the hash of a tenant's best adapter."""
        return self._replace(kept=self.kept | {self.names[tenant]: adapter})

    def without_best(self, tenant: int) -> Standing:
        """The standing where a tenant has no best adapter so far."""
        name = self.names[tenant]
        records = {what: record for what, record in self.records(tenant).items() if what != "validation"}
        kept = {other: adapter for other, adapter in self.kept.items() if other != name}
        standing = self.changed(tenant, best_score=None, best_step=0, since_best=0)
        return standing._replace(scores=self.scores | {name: records}, kept=kept)

    def records(self, tenant: int) -> Records:
        """A tenant's records."""
        return self.scores.get(self.names[tenant], {})

    def entry(self, tenant: int) -> dict[str, Any]:
        """What tenants.json says of a tenant that has ended."""
        return self.entries[self.names[tenant]] | {"scores": self.records(tenant)}

    def best_loss(self, tenant: int) -> float:
        """The validation loss of a tenant's best adapter; -inf where a score of it was not finite, and none is kept."""
        values: Any = self.records(tenant).get("validation", {}).get("values", {})
        return values.get("loss", -math.inf)

    def has_base(self, tenant: int, split: str) -> bool:
        """Whether the base model was scored on the tenant's data of this split."""
        before = split == "test" and self.test_before[tenant] is not None
        return before or f"{split}_base" in self.records(tenant)

    @property
    def over(self) -> list[bool]:
        """Whether each tenant has ended."""
        return [why is not None for why in self.ended]

    @property
    def running(self) -> dict[int, int]:
        """The slot of each tenant that has one and has not ended."""
        return {tenant: slot for slot, tenant in enumerate(self.slots) if tenant >= 0 and self.ended[tenant] is None}


def fresh_standing(tenants: Sequence[Tenant], layout: Layout, run: dict[str, str]) -> Standing:
    """The standing of a run that has done nothing."""
    zeros: list[int] = [0] * len(tenants)
    nothing: list[Any] = [None] * len(tenants)
    names = [tenant.name for tenant in tenants]
    lists = [-1] * layout.slots, zeros, nothing, zeros, zeros, zeros, nothing, nothing, nothing
    return Standing(0, names, *lists, run, layout.tenant_rows)


def require_same_tenants(standing: Standing, tenants: Sequence[Tenant], layout: Layout) -> None:
    """Raises ValueError where a checkpoint belongs to other tenants, or to a run with more steps than this one."""
    names = [tenant.name for tenant in tenants]
    require(standing.names == names, "data.tenants", names, f"the tenants that the run began with, {standing.names}")
    lengths = {name: len(value) for name, value in standing._asdict().items() if isinstance(value, list)}
    expected = dict.fromkeys(lengths, len(names)) | {"slots": layout.slots}
    require(lengths == expected, "the checkpoint's lists", lengths, f"lists of {expected}; choose another output_dir")
    known = all(-1 <= tenant < len(names) for tenant in standing.slots)
    require(known, "the checkpoint's slots", standing.slots, "tenants of this run; choose another output_dir")
    for i, tenant in enumerate(tenants):
        total, done = tenant.order.total_steps, standing.steps[i]
        if done > total:
            of = f" of {tenant.name}" if tenant.name else ""
            name = "train.num_epochs" if tenant.config.train.max_steps is None else "train.max_steps"
            raise ValueError(
                f"{name}: it gives {total} steps{of}, but the run has done {done} already; give at least these, or "
                "choose another output_dir"
            )


def reopened(standing: Standing, tenants: Sequence[Tenant]) -> Standing:
    """The standing of a run that was made longer: tenants that had done all their steps go on."""
    for i, tenant in enumerate(tenants):
        if standing.ended[i] == "done" and standing.steps[i] < tenant.order.total_steps:
            standing = standing.changed(i, ended=None)
    return standing
