"""train.learning_rate=auto: short trials of several rates, as tenants of one run. The one with the lowest validation
loss is chosen.

Each round of trials is a run of many in output_dir/learning_rates/1/, 2/, ... It has the data, the batches, the seed
and the backbone of the run that follows, and a part of its steps. The choice is in
output_dir/learning_rates/chosen.json. From then on `auto` means that number.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..config import CheckpointSection, EvalSection, ProfilerSection, RunConfig, SweepSection
from ..data.batches import for_mixed_rows
from ..evaluation.score import with_error
from ..evaluation.tasks import EvalTask
from ..io import atomic
from ..io.messages import say, warn
from ..io.storage.bucket import Place
from ..io.table import table
from ..runtime.processes import on_first_process
from ..training.passes import Layout, lay_out
from ..training.stop import end_if_told
from .chosen import FILE, TRIALS, is_auto, resolved
from .folder import claim_folders
from .parts import Part
from .standing import Standing
from .tenants import Inputs, Tenant

#: The first rates, as steps on the grid 1, 3, 10, 30, ... times the method's default: 0.1, 0.3, 1 and 3 times it.
FIRST = (-2, -1, 0, 1)
#: While the best rate is at the edge of those that were tried, the next one is tried, in at most this many more rounds.
MORE_ROUNDS = 3
#: A trial has this share of the run's steps, at least FEWEST and at most MOST.
SHARE, FEWEST, MOST = 1 / 4, 20, 100
#: A trial is scored on at most this many validation examples.
EXAMPLES = 200
#: Steps between two checkpoints of the trials.
SAVED_EVERY = 50


class Trial(NamedTuple):
    """What one rate reached."""

    learning_rate: float
    loss: float | None
    """of the validation data, after the last step; None: it diverged before"""
    stderr: float | None
    steps: int


#: A run's loop, with a backbone that is loaded already: runs/fit.py's `fit`.
Fit = Callable[[RunConfig, Any, Inputs, Layout, Any, Part], tuple[Any, Standing]]


def resolved_inputs(inputs: Inputs, chosen: Mapping[str, float]) -> Inputs:
    """The tenants, each with the rate that was chosen for it."""
    return inputs._replace(tenants=[t._replace(config=resolved(t.config, chosen, t.name)) for t in inputs.tenants])


def choose_rates(
    config: RunConfig, model, inputs: Inputs, layout: Layout, mesh, fit: Fit, folder: Place
) -> dict[str, float]:
    """Runs the trials, or resumes them. Each tenant without a rate gets the one with the lowest validation loss, or the
    method's default where it has no validation data.

    Args:
        folder: of the tenants' part of the run.
    """
    folder, default = folder / TRIALS, default_rate(config)
    inputs = inputs._replace(tenants=[tenant for tenant in inputs.tenants if is_auto(tenant.config)])
    if config.many and not config.data.packing:  # trials of the only tenant of a run may be at different steps
        buckets = for_mixed_rows(inputs.buckets)  # pyright: ignore[reportArgumentType]
        inputs = inputs._replace(buckets=buckets)
    tried: dict[str, dict[int, Trial]] = {tenant.name: {} for tenant in inputs.tenants if tenant.validation}
    asked: dict[str, Sequence[int]] = {name: FIRST for name in tried}
    for number in range(1, MORE_ROUNDS + 2):
        if asked:
            for name, found in run_round(config, model, inputs, layout, mesh, fit, folder / str(number), asked).items():
                tried[name] |= found
        asked = {name: [step] for name in tried if (step := next_step(tried[name])) is not None}
        if not asked:
            break
    chosen = {name: choice(trials, default) for name, trials in tried.items()}
    chosen |= {tenant.name: default for tenant in inputs.tenants if tenant.name not in chosen}
    say_choice(inputs.tenants, tried, chosen)
    on_first_process(lambda: write_chosen(folder, tried, chosen))
    return chosen


def default_rate(config: RunConfig) -> float:
    return float(config.adapter.default_learning_rate)


def rate_of(default: float, step: int) -> float:
    """The rate at a step of the grid: 1, 3, 10, 30, ... times the default for 0, 1, 2, 3, ..."""
    tens, three = divmod(step, 2)
    return float(f"{default * 10.0**tens * (3 if three else 1):.3g}")


def best_step(trials: Mapping[int, Trial]) -> int | None:
    """The step of the grid with the lowest loss. Of equal ones it is the smallest; None if all diverged."""
    scored = {step: trial.loss for step, trial in trials.items() if trial.loss is not None}
    return min(scored, key=lambda step: (scored[step], step)) if scored else None


def next_step(trials: Mapping[int, Trial]) -> int | None:
    """The step to try next: beyond the edge where the best one is, or lower if all diverged."""
    best, low, high = best_step(trials), min(trials), max(trials)
    if best is None or best == low:
        return low - 1
    return high + 1 if best == high else None


def choice(trials: Mapping[int, Trial], default: float) -> float:
    best = best_step(trials)
    return rate_of(default, min(trials) if best is None else best)


def run_round(
    config: RunConfig,
    model,
    inputs: Inputs,
    layout: Layout,
    mesh,
    fit: Fit,
    folder: Place,
    asked: Mapping[str, Sequence[int]],
) -> dict[str, dict[int, Trial]]:
    """The trials of these steps of the grid for each tenant, as one run of many."""
    default = default_rate(config)
    trials = [
        (tenant.name, step, trial_of(tenant, rate_of(default, step), folder))
        for tenant in inputs.tenants
        for step in asked.get(tenant.name, ())
    ]
    tenants = [trial for _, _, trial in trials]
    rates = sorted({trial.config.train.peak_learning_rate for trial in tenants})
    steps = sorted({trial.order.total_steps for trial in tenants})
    shown = f"{steps[0]}" if len(steps) == 1 else f"{steps[0]} to {steps[-1]}"
    count = f"{len(tenants)} trial{'s' * (len(tenants) > 1)}"
    say(f"train.learning_rate=auto: {count} of {shown} steps, at the rates {', '.join(f'{rate:g}' for rate in rates)}")
    own = trial_config(config, layout, folder, rates)
    on_first_process(lambda: claim_folders(own, tenants))
    part = Part([trial.name for trial in tenants], folder)
    _, standing = fit(own, model, inputs._replace(tenants=tenants), lay_out(own, mesh, len(tenants)), mesh, part)
    end_if_told()
    results = on_first_process(lambda: [list(result_of(tenant, standing, i)) for i, tenant in enumerate(tenants)])
    found: dict[str, dict[int, Trial]] = {}
    for (name, step, _), result in zip(trials, results, strict=True):
        found.setdefault(name, {})[step] = Trial(*result)
    return found


def trial_steps(steps: int) -> int:
    """The steps of a trial for a run of `steps`."""
    return min(steps, max(FEWEST, min(MOST, math.ceil(SHARE * steps))))


def trial_of(tenant: Tenant, rate: float, folder: Place) -> Tenant:
    """A tenant with another rate, fewer steps, and its loss as the score."""
    name = f"{tenant.name or 'learning_rate'}-{rate!r}".replace("+", "")
    steps = trial_steps(tenant.order.total_steps)
    assert tenant.validation is not None, "tenants without validation data have no trials"
    task = spread(tenant.validation, tenant.config.eval.limit)
    train = replace(tenant.config.train, learning_rate=rate, max_steps=steps)
    own = replace(tenant.config, output_dir=str(folder / name), train=train, eval=trial_eval(tenant.config.eval))
    validation = task._replace(metric="loss", choices=(), also=())
    return tenant._replace(
        name=name, config=own, order=tenant.order._replace(total_steps=steps), validation=validation, test=None
    )


def spread(task: EvalTask, limit: int | None) -> EvalTask:
    """At most EXAMPLES of the task's first `limit` records, spread evenly: a file may be sorted by its answers."""
    most = min(limit or len(task.records), len(task.records))
    count = min(most, EXAMPLES)
    chosen = [i * most // count for i in range(count)]
    examples = task.examples and [task.examples[i] for i in chosen]
    return task._replace(records=[task.records[i] for i in chosen], examples=examples)


def trial_eval(section: EvalSection) -> EvalSection:
    """A trial is scored once, after its last step, by its loss. So patience can't end it early."""
    limit = min(section.limit or EXAMPLES, EXAMPLES)
    return replace(section, metric="loss", also=(), choices=(), limit=limit, every=MOST, patience=None, test=False)


def trial_config(config: RunConfig, layout: Layout, folder: Place, rates: Sequence[float]) -> RunConfig:
    """The config of the trials' run. Each trial steps with as many rows as the run that follows."""
    train, sweep = replace(config.train, learning_rate=default_rate(config)), config.sweep
    if not config.many:
        rows = dict(batch_size=layout.tenant_rows, rows_per_tenant=None, gradient_accumulation_steps=1)
        train, sweep = replace(train, **rows), SweepSection(learning_rate=tuple(rates))
    return replace(
        config,
        output_dir=str(folder),
        train=train,
        sweep=sweep,
        eval=trial_eval(config.eval),
        checkpoint=CheckpointSection(every=SAVED_EVERY, keep=1),
        logging=replace(config.logging, report_to=()),
        profiler=ProfilerSection(),
    )


def as_trials(config: RunConfig) -> RunConfig:
    """The config of one adapter's run as the sweep that its first trials are, for an estimate of their memory."""
    default = default_rate(config)
    rates = tuple(rate_of(default, step) for step in FIRST)
    return replace(config, train=replace(config.train, learning_rate=default), sweep=SweepSection(learning_rate=rates))


def result_of(trial: Tenant, standing: Standing, index: int) -> Trial:
    """What a trial left in its folder."""
    found = standing.records(index).get("validation")
    values = found["values"] if found and standing.best_step[index] == trial.order.total_steps else {}
    loss = values.get("loss")
    sound = loss is not None and math.isfinite(loss) and standing.ended[index] == "done"
    rate = trial.config.train.peak_learning_rate
    return Trial(rate, loss if sound else None, values.get("loss_stderr"), standing.steps[index])


def say_choice(
    tenants: Sequence[Tenant], tried: Mapping[str, Mapping[int, Trial]], chosen: Mapping[str, float]
) -> None:
    """Shows the trials and what was chosen."""
    without = [tenant.name for tenant in tenants if tenant.name not in tried]
    if without:
        whose = f" of {', '.join(without[:3])}{' and others' * (len(without) > 3)}" if without != [""] else ""
        warn(
            f"train.learning_rate=auto: there is no validation data{whose} to choose by, so the method's default is "
            f"taken: {chosen[without[0]]:g}"
        )
    named = list(tried) != [""]
    rows = [[*["tenant"] * named, "rate", "validation loss", ""]]
    for name, trials in tried.items():
        for _, trial in sorted(trials.items()):
            loss = "diverged" if trial.loss is None else with_error(trial.loss, trial.stderr)
            mark = "chosen" if trial.learning_rate == chosen[name] else ""
            rows.append([*[name] * named, f"{trial.learning_rate:g}", loss, mark])
        if best_step(trials) is None:
            warn(f"train.learning_rate=auto: every rate diverged{f' for {name}' * bool(name)}; the lowest one is taken")
    if tried:
        say(table(rows, left=(0, 3) if named else (2,)))


def write_chosen(folder: Place, tried: Mapping[str, Mapping[int, Trial]], chosen: Mapping[str, float]) -> None:
    trials = [
        {"tenant": name, **trial._asdict()} for name, of_one in tried.items() for _, trial in sorted(of_one.items())
    ]
    folder.mkdir(parents=True, exist_ok=True)
    atomic.write_text(folder / FILE, json.dumps({"rates": dict(chosen), "trials": trials}, indent=1) + "\n")
