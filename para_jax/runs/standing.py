"""Where a run stands, without its arrays: what a checkpoint says as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ..training.passes import Layout
from ..training.scores_file import Records
from .tenants import Tenant


@dataclass
class TenantStanding:
    """Where one tenant stands. The data position is the number of its steps: batch i of a tenant is a pure function of
    (seed, i)."""

    name: str
    steps: int = 0
    """its own"""
    evaluated: int = 0
    """the last own step whose adapter was scored"""
    best_score: float | None = None
    best_step: int = 0
    since_best: int = 0
    """evaluations without a better score; of equal scores, the one with the lower loss is better"""
    test_before: float | None = None
    """the backbone's score"""
    failed: int | None = None
    """the step of the run at which its loss or gradient was not finite"""
    ended: str | None = None
    """why: "done", "patience" or "not finite\""""
    kept: str = ""
    """a hash of its best adapter, which its folder holds"""
    scores: Records = field(default_factory=dict)
    """as training/scores_file.py describes them"""
    about: dict[str, Any] = field(default_factory=dict)
    """when it ended, as tenants.json says it but for the scores"""
    rows: int = 0
    """of its log, in a run of many"""

    def entry(self) -> dict[str, Any]:
        """What tenants.json says of a tenant that has ended."""
        return self.about | {"scores": self.scores}

    def best_loss(self) -> float:
        """The validation loss of the best adapter; -inf where a score of it was not finite, and none is kept."""
        values: Any = self.scores.get("validation", {}).get("values", {})
        return values.get("loss", -math.inf)

    def forget_best(self) -> None:
        self.best_score, self.best_step, self.since_best, self.kept = None, 0, 0, ""
        self.scores.pop("validation", None)


@dataclass
class Standing:
    """Where a run stands."""

    step: int
    """of the run"""
    slots: list[int]
    """the tenant in each slot of the stack; -1: none. One that has ended stays until another takes its slot"""
    tenants: list[TenantStanding]
    """in the run's order"""
    run: dict[str, str]
    """digests of what the run is made of, by name: "backbone", what digests_of_run adds, and the parts of the data
    ("training data", ...; "training data of NAME"), which also say their number of examples"""
    rows: int = 0
    """of the run's log"""

    @classmethod
    def from_json(cls, held: dict[str, Any]) -> Standing:
        tenants: Any = [TenantStanding(**one) for one in held["tenants"]]
        return cls(**held | {"tenants": tenants})

    @property
    def over(self) -> list[bool]:
        """Whether each tenant has ended."""
        return [one.ended is not None for one in self.tenants]

    @property
    def running(self) -> dict[int, int]:
        """The slot of each tenant that has one and has not ended."""
        slots = enumerate(self.slots)
        return {tenant: slot for slot, tenant in slots if tenant >= 0 and self.tenants[tenant].ended is None}

    @property
    def marks(self) -> tuple:
        """What tells two standings of one run apart."""
        return self.step, [one.evaluated for one in self.tenants], [one.ended for one in self.tenants]


def fresh_standing(tenants: Sequence[Tenant], layout: Layout, run: dict[str, str]) -> Standing:
    """The standing of a run that has done nothing."""
    return Standing(0, [-1] * layout.slots, [TenantStanding(tenant.name) for tenant in tenants], run)


def reopen(standing: Standing, tenants: Sequence[Tenant]) -> None:
    """Lets tenants that had done all their steps go on in a run that was made longer. Raises ValueError for a
    checkpoint of other tenants, or of a run with more steps than this one."""
    for tenant, one in zip(tenants, standing.tenants, strict=True):
        total = tenant.order.total_steps
        name = "train.num_epochs" if tenant.config.train.max_steps is None else "train.max_steps"
        if one.steps > total:
            of = f" of {tenant.name}" if tenant.name else ""
            raise ValueError(
                f"{name}: it gives {total} steps{of}, but the run has done {one.steps} already; give at least these, "
                "or choose another output_dir"
            )
        if one.ended == "done" and one.steps < total:
            if standing.tenants.index(one) not in standing.slots:
                raise ValueError(
                    f"{name}: {tenant.name} gave its place to another tenant (train.tenants_at_once) after {one.steps} "
                    "steps, so it can't go on; train it further in another output_dir, with train.init_from"
                )
            one.ended = None
