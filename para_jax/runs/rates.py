"""train.learning_rate=auto: several rates are trained side by side, as a sweep does, for a part of the run's steps. The
one with the lowest validation loss is chosen.

The trials are a run of many in output_dir/learning_rates/trials, with the data, the batches and the seed of the run
that follows. The choice is written to config.yaml, and from then on the rate is that number.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..config import CheckpointSection, EvalSection, RunConfig, SweepSection
from ..data.batches import for_mixed_rows
from ..evaluation.score import with_error
from ..io.messages import say, warn
from ..io.storage.bucket import Place
from ..io.table import table
from ..runtime.processes import on_first_process
from ..training.passes import lay_out
from .folder import claim_folders
from .standing import Standing, TenantStanding
from .tenants import Plan, Tenant

#: The folder of the trials in a run's folder. It has two levels, so that it is not taken for a tenant's.
TRIALS = "learning_rates/trials"
#: The rates, as multiples of the method's default.
FIRST = (0.1, 0.3, 1.0, 3.0)
#: A trial has this share of the run's steps, at least FEWEST and at most MOST.
SHARE, FEWEST, MOST = 1 / 4, 20, 100
#: A trial is scored on at most this many validation examples.
EXAMPLES = 200
#: Steps between two checkpoints of the trials.
SAVED_EVERY = 50


def is_auto(config: RunConfig) -> bool:
    return config.train.learning_rate == "auto"


def with_rate(config: RunConfig, rate: float) -> RunConfig:
    return replace(config, train=replace(config.train, learning_rate=rate))


def rates_of(config: RunConfig) -> list[float]:
    return [float(f"{factor * config.adapter.default_learning_rate:.3g}") for factor in FIRST]


def with_chosen_rates(plan: Plan, fit: Callable[[Plan], tuple[Any, Standing]]) -> Plan:
    """The plan, with a rate for each tenant that has none, after the trials. Tenants without validation data get the
    method's default.

    Args:
        fit: trains a plan to its end.
    """
    trials, found = trials_of(plan), dict[str, TenantStanding]()
    if trials.tenants:
        rates = ", ".join(f"{rate:g}" for rate in rates_of(plan.config))
        steps = max(trial.order.total_steps for trial in trials.tenants)
        say(f"train.learning_rate=auto: {len(trials.tenants)} trials of up to {steps} steps, at the rates {rates}")
        on_first_process(lambda: claim_folders(trials.config, trials.tenants))
        found = {one.name: one for one in fit(trials)[1].tenants}
    tenants = [one._replace(config=with_rate(one.config, choice(one, found))) if is_auto(one.config) else one
               for one in plan.tenants]  # fmt: skip
    config = with_rate(plan.config, tenants[0].config.train.peak_learning_rate) if not plan.config.many else plan.config
    return plan._replace(config=config, tenants=tenants)


def choice(tenant: Tenant, found: dict[str, TenantStanding]) -> float:
    """The rate for a tenant, from its trials. Shows them."""
    rates, name = rates_of(tenant.config), f" of {tenant.name}" * bool(tenant.name)
    if tenant.validation is None:
        default = float(tenant.config.adapter.default_learning_rate)
        warn(f"train.learning_rate=auto: no validation data{name}, so the rate is the default, {default:g}")
        return default
    records = {rate: sound_record(found[trial_name(tenant, rate)]) for rate in rates}
    losses = {rate: held["values"]["loss"] for rate, held in records.items() if held}
    chosen = min(losses, key=lambda rate: (losses[rate], rate)) if losses else rates[0]  # of equal ones the lowest
    rows = [["rate", "validation loss", ""]]
    for rate, held in records.items():
        loss = with_error(held["values"]["loss"], held["values"].get("loss_stderr")) if held else "diverged"
        rows.append([f"{rate:g}", loss, "chosen" * (rate == chosen)])
    say(f"trials{name}:\n{table(rows, left=(2,))}")
    if not losses:
        warn(f"train.learning_rate=auto: every rate{name} diverged; the lowest one is taken")
    elif chosen in (rates[0], rates[-1]):
        say(f"the best rate{name} is at the edge of those tried; sweep.learning_rate tries others")
    return chosen


def sound_record(trial: TenantStanding) -> dict[str, Any] | None:
    """The score after a trial's last step; None if it diverged before."""
    record = trial.scores.get("validation")
    last = record and trial.best_step == trial.steps and trial.ended == "done"
    return record if record and last and math.isfinite(record["values"]["loss"]) else None


def trials_of(plan: Plan) -> Plan:
    """The trials of all tenants that have validation data and no rate, as a run of many."""
    config, folder = plan.config, plan.folder / TRIALS
    tenants = [
        trial_of(tenant, rate, folder)
        for tenant in plan.tenants
        if is_auto(tenant.config) and tenant.validation
        for rate in rates_of(config)
    ]
    train, sweep = replace(config.train, learning_rate=rates_of(config)[0]), config.sweep
    if not config.many:
        sweep = SweepSection(learning_rate=tuple(rates_of(config)))
    own = replace(
        config,
        output_dir=str(folder),
        train=train,
        sweep=sweep,
        eval=trial_eval(config.eval),
        checkpoint=CheckpointSection(every=SAVED_EVERY, keep=1),
        logging=replace(config.logging, report_to=()),
    )
    # A trial keeps the batches of its tenant, so that the rate is chosen on the steps that the run will take.
    buckets: Any = plan.buckets
    if config.many and not config.data.packing:  # trials of the only tenant of a run may be at different steps
        buckets = for_mixed_rows(buckets)
    layout = lay_out(own, plan.mesh, max(1, len(tenants)))
    return plan._replace(config=own, tenants=tenants, buckets=buckets, layout=layout)


def trial_name(tenant: Tenant, rate: float) -> str:
    return f"{tenant.name or 'learning_rate'}-{rate!r}".replace("+", "")


def trial_of(tenant: Tenant, rate: float, folder: Place) -> Tenant:
    """A tenant with a rate, fewer steps, and its loss as the score."""
    name, total = trial_name(tenant, rate), tenant.order.total_steps
    steps = min(total, max(FEWEST, min(MOST, math.ceil(SHARE * total))))
    train = replace(tenant.config.train, learning_rate=rate, max_steps=steps)
    own = replace(tenant.config, output_dir=str(folder / name), train=train, eval=trial_eval(tenant.config.eval))
    assert tenant.validation is not None, "tenants without validation data have no trials"
    validation = tenant.validation._replace(metric="loss", choices=(), also=())
    order = tenant.order._replace(total_steps=steps)  # the same batches, fewer of them
    return tenant._replace(name=name, config=own, order=order, validation=validation, test=None)


def trial_eval(section: EvalSection) -> EvalSection:
    """A trial is scored once, after its last step, by its loss. So patience can't end it early."""
    limit = min(section.limit or EXAMPLES, EXAMPLES)
    return replace(section, metric="loss", also=(), choices=(), limit=limit, every=MOST, patience=None, test=False)


def as_trials(config: RunConfig) -> RunConfig:
    """The config of one adapter's run as the sweep that its trials are, for an estimate of their memory."""
    rates = rates_of(config)
    return replace(with_rate(config, rates[0]), sweep=SweepSection(learning_rate=tuple(rates)))
