"""The training loop: steps, evaluations, checkpoints, and the tenants that begin and end on the way."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from ..adapters.adapter import Adapter
from ..data.batches import Batch
from ..data.packing import Packed
from ..data.schedule import Schedule, StepBatch, Turn, admitted, batch_shares, prefetch
from ..evaluation.shapes import say_evaluation
from ..io.messages import say
from ..io.progress import Progress
from ..model.adapted import init_adapter
from ..model.tail import PromptStates
from ..runtime import devices
from ..runtime.processes import full_arrays, on_first_process
from ..runtime.sharding import shard_rows
from ..training.checkpoint import finish_saving, open_checkpoints, save_checkpoint
from ..training.log import Done
from ..training.optimizer import LearningRates, learning_rates
from ..training.passes import Layout
from ..training.prompt_cache import PromptCache
from ..training.step import TrainState, put_tenant, train_step
from ..training.stop import Interrupted, stop_signals
from . import scoring
from .initial import initial_adapter
from .plan import run_digests
from .run import Dispatched, TrainingRun
from .scoring import REMEDY, NotFinite, read_everywhere
from .standing import Standing
from .tenants import Plan, Tenant


def fit(
    plan: Plan, model, prompts: Callable[[], PromptCache | None], backbone: dict[str, str], *, quiet: bool = False
) -> tuple[TrainState, Standing]:
    """Trains a plan to its end, from a fresh state or from its checkpoint. The folders must be claimed.

    Args:
        prompts: computes the states of train.cache_prompts. It is called once a step is to be done.
        backbone: what a checkpoint keeps of it.
        quiet: no warnings and no scores of the base model: these are trials, and some may go wrong.
    """
    runtime, checkpoint = plan.config.runtime, plan.config.checkpoint
    with (
        jax.set_mesh(plan.mesh),
        open_checkpoints(plan.folder / "checkpoints", keep=checkpoint.keep) as checkpoints,
        stop_signals(runtime.distributed == "given", runtime.stopped_exit_code) as stop,
    ):
        run = TrainingRun(plan, model, checkpoints, stop, quiet=quiet)
        run.restore(run_digests(backbone, plan.tenants))
        try:
            train(run, prompts)
        finally:
            run.log.close()
        if stop.received is not None:  # after the last step; a program with several runs would go on with the next one
            say("stopped, and saved; the same command resumes")
            stop.end()
        return run.state, run.standing


def train(run: TrainingRun, prompts: Callable[[], PromptCache | None]) -> None:
    """Steps until every tenant has ended. Each step's values are read when the next step is under way.

    A checkpoint holds what was evaluated before it, and only values that were read. A tenant whose values were not
    finite in step i takes part in step i + 1, which is under way when they are read, and never in step i + 2: this
    must not depend on where the run was stopped and resumed.
    """
    encoded = {tasks.split: list(tasks.encoded.values()) for tasks in (run.validation, run.test) if tasks.encoded}
    say_evaluation(encoded, run.config.eval.batch_size)
    scoring.write_ended(run)
    try:
        if run.resumed:
            scoring.check_best(run)  # a kill may lie between a better adapter and its checkpoint
        elif run.config.eval.base and not run.quiet:  # those on test data are measured when a tenant ends
            scoring.score_backbone(run, "validation", list(range(len(run.tenants))))
        if not all(run.standing.over):  # a finished run computes no prompts
            with run.stop.interrupting():
                run.prompts = prompts()
    except Interrupted:
        end_stopped_run(run)
    total, begun = sum(t.order.total_steps for t in run.tenants), sum(o.steps for o in run.standing.tenants)
    unit, run.saved = "tenant step" if run.many else "step", run.standing.marks
    admit(run)
    run.batches = make_batches(run)
    with Progress("training", total, unit=unit, done=begun, keep=True) as run.bar:
        try:
            while True:
                stopping = run.stop.reached(run.standing.step)  # all processes agree on this step
                try:
                    if not stopping:
                        evaluate(run)
                        end_tenants(run)
                except Interrupted:
                    stopping = True
                save(run, stopping=stopping)  # after the evaluation: a checkpoint knows its scores
                if stopping:
                    end_stopped_run(run)
                if all(run.standing.over):
                    break
                admit(run)
                step(run)
        finally:
            run.batches.close()
    run.flush()
    on_first_process(lambda: finish_saving(run.checkpoints))


def end_stopped_run(run: TrainingRun) -> NoReturn:
    """Ends a run that a signal stopped, after everything is written, and says how to resume."""
    run.flush()
    where = f"step {run.standing.step} of {run.tenants[0].order.total_steps}"
    if run.many:
        where = f"step {run.standing.step}, with {sum(run.standing.over)} of {len(run.tenants)} tenants ended"
    on_first_process(lambda: finish_saving(run.checkpoints))
    say(f"stopped after {where}, and saved; the same command resumes")
    run.stop.end()


def evaluate(run: TrainingRun) -> None:
    """Scores the adapters that are due after this step."""
    if due_tenants(run) or leaving(run):  # reading waits for the device, so not at every step
        read(run)
    if due := due_tenants(run):  # again, because reading may have failed a tenant
        scoring.evaluate(run, due)


def end_tenants(run: TrainingRun) -> None:
    """Ends the tenants that have done their last step. A signal breaks this off: the others end when the run
    resumes."""
    left = False
    for tenant, why in leaving(run):
        scoring.finish(run, tenant, why)
        left |= run.standing.tenants[tenant].steps < run.tenants[tenant].order.total_steps  # it stopped early
    if left:  # the batches made ahead counted on these steps
        run.batches.close()
        run.batches = make_batches(run)


def save(run: TrainingRun, *, stopping: bool) -> None:
    """Writes a checkpoint, if it is time or a signal ends the run after this step."""
    standing, every = run.standing, run.config.checkpoint.every or run.config.eval.every
    over, (step, evaluated, ended) = all(standing.over), run.saved
    caught_up = evaluated != [one.evaluated for one in standing.tenants]  # an evaluation that a stop interrupted
    unsaved = step < standing.step or caught_up or (over and run.saved != standing.marks)
    if not unsaved or not (stopping or over or standing.step % every == 0):
        return
    read(run)
    run.flush()
    standing.rows = run.log.rows.count  # a resume drops later rows, and writes them again
    for one, rows in zip(standing.tenants, run.rows, strict=False):
        one.rows = rows.count
    save_checkpoint(run.checkpoints, run.state, standing.step, asdict(standing))
    if ended != [one.ended for one in standing.tenants]:
        scoring.write_ended(run)
    run.saved = standing.marks


def admit(run: TrainingRun) -> None:
    """Gives free slots to the tenants that wait."""
    standing = run.standing
    slots = admitted(standing.slots, standing.over)
    for slot, (held, tenant) in enumerate(zip(standing.slots, slots, strict=True)):
        # The slot's optimiser state goes with the adapter: nothing of the tenant before may reach the next one.
        if held != tenant:
            fresh = fresh_adapter(run, run.tenants[tenant])
            run.state = put_tenant(run.state, jnp.int32(slot), fresh, config=run.config.train)
    standing.slots = slots


def step(run: TrainingRun) -> None:
    """Dispatches the next step, then reads the values of the one before."""
    begun: float | None = time.monotonic()
    coming, states = next(run.batches)
    batch, tenant_of_group = in_passes(coming, run.layout)
    batch = jax.tree.map(shard_rows, batch)  # the copies overlap with the step under way
    states = None if states is None else shard_states(states)
    waited, number = time.monotonic() - begun, run.standing.step + 1
    given = run.model, batch, tenant_of_group, rates(run), states
    bucket = coming.bucket
    static: dict[str, Any] = dict(
        completion=bucket.completion, prompt=bucket.prompt, config=run.config.train, many=run.many
    )
    # A new shape compiles alone, with the step before read: its time would count as that step's.
    with jax.profiler.StepTraceAnnotation("train", step_num=number):
        if bucket in run.compiled:
            run.state, values = train_step(run.state, *given, **static)
        else:
            run.compiled.add(bucket)
            read(run)
            begun = None  # compiling is not a step
            with devices.compiling(f"the training step for {shape_of(run, coming)}"):
                run.state, values = jax.block_until_ready(train_step(run.state, *given, **static))
    read(run)
    for turn in coming.turns:
        run.standing.tenants[turn.tenant].steps = turn.step + 1
    run.standing.step = number
    run.pending = Dispatched(Done(number, values, coming.tokens, begun, waited), coming.turns)


def make_batches(run: TrainingRun):
    """The batches of the steps to come, while no tenant ends before its last step."""
    standing = run.standing
    shares = batch_shares([len(t.data.examples) for t in run.tenants], run.config.train.sampling)
    steps, over, layout = [one.steps for one in standing.tenants], standing.over, run.layout
    coming = Schedule(
        [t.order for t in run.tenants], run.plan.buckets, shares,
        groups=layout.together, rows=layout.rows, passes=layout.passes_of_tenant,
        steps=steps, slots=standing.slots, ended=over,
    )  # fmt: skip
    left = sum(t.order.total_steps - steps[i] for i, t in enumerate(run.tenants) if not over[i])

    def prepared(step: int) -> tuple[StepBatch, PromptStates | None] | None:
        made = coming.batch(step)
        if made is None or run.prompts is None:
            return made and (made, None)
        batch, _ = in_passes(made, layout)
        return made, run.prompts.states(batch, made.bucket.prompt or made.bucket.length)

    return prefetch(prepared, left)


def fresh_adapter(run: TrainingRun, tenant: Tenant) -> Adapter:
    if tenant.config.train.init_from:
        like = jax.eval_shape(lambda: init_adapter(run.config.adapter, run.model.config))
        read = partial(initial_adapter, tenant.config, run.model.config, model=run.model)
        return read_everywhere(read, like)
    return full_arrays(init_adapter(run.config.adapter, run.model.config, seed=tenant.config.seed))


def shape_of(run: TrainingRun, coming: StepBatch) -> str:
    count = run.layout.groups
    groups = f"{count} tenant{'s' * (count > 1)} x " if run.many else ""
    return f"{groups}{run.layout.rows} rows of {coming.bucket.length} tokens"


def rates(run: TrainingRun) -> LearningRates:
    """The learning rate schedules of the tenants in the slots."""
    held = [run.tenants[max(tenant, 0)] for tenant in run.standing.slots]  # an empty slot has no rows
    return learning_rates([t.config.train for t in held], [t.order.total_steps for t in held])


def read(run: TrainingRun) -> None:
    """Waits for the values of the step before and logs them. A tenant whose values are not finite has failed; in a
    run of one adapter that is a ValueError."""
    if run.pending is None:
        return
    (done, turns), run.pending = run.pending, None
    values = {name: np.asarray(value) for name, value in full_arrays(done.values).items()}
    logged = {}
    for turn in turns:
        of_turn = {name: float(values[name][turn.slot]) for name in VALUES}
        finite = bool(values["finite"][turn.slot]) and all(map(math.isfinite, of_turn.values()))
        one = run.standing.tenants[turn.tenant]
        if finite and one.failed is None:
            logged[turn] = of_turn
        elif one.failed is None:
            fail(run, done.step, turn, of_turn)
            one.failed = done.step
    if not run.many:
        run.log.step(done, logged[turns[0]], run.bar)
        return
    for turn, of_turn in logged.items():
        run.write(turn.tenant, turn.step + 1, of_turn, every=run.config.logging.every)
    tokens = sum(one["tokens"] for one in logged.values())
    summed = sum(one["loss"] * one["tokens"] for one in logged.values())
    mean = summed / tokens if tokens else math.nan  # no tenant of this step is finite
    everyone = float(sum(values["tokens"][turn.slot] for turn in turns))
    run.log.step(done, {"loss": mean, "tenants": len(turns), "tokens": everyone}, run.bar, len(turns))


def fail(run: TrainingRun, step: int, turn: Turn, values: dict[str, float]) -> None:
    """Says that a tenant's step was not finite, and on which examples; raises it in a run of one adapter."""
    tenant = run.tenants[turn.tenant]
    _, chosen = tenant.order.plan.batch_indices(turn.step)  # the plan is pure, so they are known
    examples = "; ".join(sorted(tenant.data.places[i] for i in chosen))
    wrong = [f"the {name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    what = wrong[0] if wrong else "the new weights are not finite"
    if not run.many:
        raise NotFinite(f"step {step}: {what} on {examples}; {REMEDY}")
    say(
        f"{tenant.name}: stopped at its step {turn.step + 1}: {what} on {examples}; what it had learnt before is "
        "kept, and the others continue"
    )


def due_tenants(run: TrainingRun) -> list[int]:
    """The tenants to evaluate after this step."""
    found = []
    for tenant in run.standing.running:
        one, total = run.standing.tenants[tenant], run.tenants[tenant].order.total_steps
        every = run.tenants[tenant].config.eval.every
        reached = one.steps == total or (one.steps > 0 and one.steps % every == 0)  # the last step always counts
        if reached and one.evaluated < one.steps and one.failed is None:
            found.append(tenant)
    return found


def leaving(run: TrainingRun) -> list[tuple[int, str]]:
    """The tenants that end after this step, and why."""
    found = []
    for tenant in run.standing.running:
        one, patience = run.standing.tenants[tenant], run.tenants[tenant].config.eval.patience
        last = one.steps == run.tenants[tenant].order.total_steps
        if one.failed is not None and (last or one.failed < run.standing.step):
            found.append((tenant, "not finite"))
        elif last:
            found.append((tenant, "done"))
        elif patience is not None and one.failed is None and one.since_best >= patience:
            found.append((tenant, "patience"))
    return found


#: A step's values that are logged for each tenant.
VALUES = ("loss", "grad_norm", "learning_rate", "tokens")


def in_passes(coming: StepBatch, layout: Layout) -> tuple[Batch | Packed, np.ndarray]:
    """A step's batch [passes, rows, ...], and the slot of each group's tenant, int32 [passes, groups]. Different passes
    may hold different tenants."""
    shape = layout.passes, layout.pass_rows
    batch = type(coming.batch)(*(array.reshape(*shape, *array.shape[2:]) for array in coming.batch))
    return batch, coming.tenant_of_group.reshape(layout.passes, layout.groups)


def shard_states(states: PromptStates) -> PromptStates:
    """Host arrays [passes, layers, rows, ...] on the devices of the current mesh."""
    return PromptStates(*(shard_rows(a, (None, None, "batch", "kv_heads")) for a in states[:2]))
