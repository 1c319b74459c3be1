"""The training loop: steps, evaluations, checkpoints, and the tenants that begin and end on the way."""

from __future__ import annotations

import math
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from .. import devices
from ..adapters.adapter import Adapter
from ..adapters.files import load_adapter, save_adapter
from ..adapters.rows import Stack
from ..config import RunConfig, expanded
from ..data.batches import Batch, Bucket
from ..data.packing import Packed, RowShape
from ..data.prefetch import read
from ..data.schedule import Schedule, StepBatch, Turn, admitted
from ..data.tenants import weights
from ..evaluation.evaluate import Score
from ..evaluation.tenants import Tasks
from ..model import init_adapter
from ..processes import arrays_of_first, by_first, gathered, is_first
from ..sharding import place_tenants, rows_over
from ..storage.bucket import Place
from ..training.checkpoint import finish_saving, require_saved, save_checkpoint
from ..training.last_state import read_last_state, write_last_state
from ..training.log import Done, Log
from ..training.metrics_file import Rows
from ..training.optimizer import LearningRates, learning_rates
from ..training.passes import Layout
from ..training.profiler import Profiler
from ..training.statistics import standardise, statistics_batches
from ..training.step import TrainState, put_adapter, put_state, put_tenant, tenant_of, train_step
from ..training.stop import Interrupted, StopSignal
from ..training.tenants_file import add_entry
from .folder import AT_ONCE
from .standing import Standing
from .tenants import Tenant


class Pending(NamedTuple):
    """A step that is dispatched; its values may still be on their way."""

    done: Done
    turns: list[Turn]


class Loop(NamedTuple):
    """The steps of a run. A NamedTuple, because its parts never change."""

    config: RunConfig
    model: Any
    tenants: list[Tenant]
    buckets: tuple[Bucket, ...] | tuple[RowShape]
    layout: Layout
    validation: Tasks
    test: Tasks
    checkpoints: Any
    log: Log
    profiler: Profiler
    stop: StopSignal
    rows: list[Rows]
    """each tenant's metrics.jsonl; in a run of one adapter there is only the run's, `log`"""

    def run(self, state: TrainState, standing: Standing) -> tuple[TrainState, Standing]:
        """Steps until every tenant has ended. Each step's values are read when the next step is under way.

        A checkpoint holds what was evaluated before it, and only values that were read. A tenant whose values were not
        finite in step i takes part in step i + 1, which is under way when they are read, and never in step i + 2: this
        must not depend on where the run was stopped and resumed.
        """
        compiled: set[Any] = set()
        pending: Pending | None = None
        saved = standing.step
        state, standing = self.admit(state, standing)
        batches = self.batches(standing)
        total, begun = sum(t.order.total_steps for t in self.tenants), sum(standing.steps)
        silent = None if is_first() else True  # None: no bar where stderr is not a terminal
        with tqdm(total=total, initial=begun, desc="training", unit="step", disable=silent) as bar:
            try:
                while True:
                    stopping = self.stop.reached(standing.step)
                    due = [] if stopping else self.due(standing)
                    if due or self.leaving(standing):
                        standing, pending = self.read(pending, standing, bar), None
                    try:
                        if due:
                            standing = self.evaluate(state, standing, self.due(standing))
                        unforeseen = False
                        for tenant, why in [] if stopping else self.leaving(standing):
                            unforeseen |= standing.steps[tenant] < self.tenants[tenant].order.total_steps
                            last = self.last_where_best_is_another(state, standing, tenant)
                            slot = jnp.int32(standing.running[tenant])
                            if last is not None:
                                state = put_adapter(state, slot, self.kept(tenant, last))
                            try:  # the best adapter is tested in its slot, in the programs that scored validation
                                standing = self.finish(state, standing, tenant, why)
                            finally:
                                state = state if last is None else put_adapter(state, slot, last)
                        if unforeseen:
                            batches.close()
                            batches = self.batches(standing)
                    except Interrupted:
                        stopping = True
                    over = all(standing.over)
                    every = self.config.checkpoint.every or self.config.eval.every
                    if saved < standing.step and (stopping or over or standing.step % every == 0):
                        standing, pending = self.read(pending, standing, bar), None
                        self.flush()
                        save_checkpoint(self.checkpoints, state, standing)
                        saved = standing.step
                    if stopping:
                        self.end_early(standing)
                    if over:
                        self.flush()
                        by_first(lambda: finish_saving(self.checkpoints))
                        return state, standing
                    state, standing = self.admit(state, standing)
                    state, standing, pending = self.step(state, standing, batches, pending, compiled, bar)
                    require_saved(self.checkpoints)
            finally:
                batches.close()

    # --------------------------------------------------------------------------------------------------------- a step

    def admit(self, state: TrainState, standing: Standing) -> tuple[TrainState, Standing]:
        """Gives free slots to the tenants that wait. One that had ended, in a run that is longer now, goes on from its
        last state."""
        slots = admitted(standing.slots, standing.over)
        for slot, (held, tenant) in enumerate(zip(standing.slots, slots, strict=True)):
            if held == tenant:
                continue
            if held >= 0 and standing.ended[held] == "done":
                write_last_state(self.tenants[held].folder, tenant_of(state, jnp.int32(slot)))
            if standing.steps[tenant]:
                like = jax.eval_shape(tenant_of, state, jnp.int32(slot))
                state = put_state(state, jnp.int32(slot), read_last_state(self.tenants[tenant].folder, like))
            else:
                fresh = self.fresh_adapter(self.tenants[tenant])
                state = put_tenant(state, jnp.int32(slot), fresh, config=self.config.train)
        return state, standing._replace(slots=slots)

    def fresh_adapter(self, tenant: Tenant) -> Adapter:
        made = init_adapter(self.config.adapter, self.model.config, seed=tenant.config.seed)
        if getattr(self.config.adapter, "summary", "raw") == "standardised":
            longest, rows = self.buckets[-1], self.layout.pass_rows if not self.config.many else self.layout.rows
            bucket = Bucket(longest.length, longest.completion)
            statistics = statistics_batches(tenant.data.examples, bucket, rows, tenant.config.seed)
            made = standardise(self.model, made, *statistics)
        return gathered(made)

    def batches(self, standing: Standing):
        """The batches of the steps to come, while no tenant ends before its last step."""
        shares = weights([len(t.data.examples) for t in self.tenants], self.config.train.sampling)
        over, layout = standing.over, self.layout
        coming = Schedule(
            [t.order for t in self.tenants], self.buckets, shares,
            groups=layout.together, rows=layout.rows, passes=layout.passes_of_tenant,
            steps=standing.steps, slots=standing.slots, ended=over,
        )  # fmt: skip
        left = sum(t.order.total_steps - standing.steps[i] for i, t in enumerate(self.tenants) if not over[i])
        return read(coming.batch, 0, left)

    def step(
        self, state: TrainState, standing: Standing, batches, pending: Pending | None, compiled: set[Any], bar: tqdm
    ) -> tuple[TrainState, Standing, Pending]:
        """Dispatches the next step, then reads the values of the one before."""
        begun: float | None = time.monotonic()
        coming: StepBatch = next(batches)
        batch, tenant_of_group = in_passes(coming, self.layout)
        batch = jax.tree.map(rows_over, batch)
        waited, number = time.monotonic() - begun, standing.step + 1
        given = self.model, batch, tenant_of_group, self.rates(standing)
        static: dict[str, Any] = dict(completion=coming.bucket.completion, config=self.config.train)
        self.profiler.before(number)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            if coming.bucket in compiled:
                state, values = train_step(state, *given, **static)
            else:
                compiled.add(coming.bucket)
                standing, pending, begun = self.read(pending, standing, bar), None, None  # compiling is not a step
                with devices.compiling(f"the training step for {self.shape_of(coming)}"):
                    state, values = jax.block_until_ready(train_step(state, *given, **static))
        standing = self.read(pending, standing, bar)
        begun = None if self.profiler.on else begun  # nor is tracing one, and writing the trace
        self.profiler.after(number, values)
        for turn in coming.turns:
            standing = standing.changed(turn.tenant, steps=turn.step + 1)
        done = Done(number, values, coming.tokens, begun, waited)
        return state, standing._replace(step=number), Pending(done, coming.turns)

    def shape_of(self, coming: StepBatch) -> str:
        groups = f"{self.layout.groups} tenants x " if self.config.many else ""
        return f"{groups}{self.layout.rows} rows of {coming.bucket.length} tokens"

    def rates(self, standing: Standing) -> LearningRates:
        """The learning rate schedules of the tenants in the slots."""
        held = [self.tenants[max(tenant, 0)] for tenant in standing.slots]
        return learning_rates([t.config.train for t in held], [t.order.total_steps for t in held])

    def read(self, pending: Pending | None, standing: Standing, bar: tqdm) -> Standing:
        """Waits for the values of a step and logs them. A tenant whose values are not finite has failed; in a run of
        one adapter that is a ValueError."""
        if pending is None:
            return standing
        done, turns = pending
        values = {name: np.asarray(value) for name, value in gathered(done.values).items()}
        logged = {}
        for turn in turns:
            of_turn = {name: float(values[name][turn.slot]) for name in VALUES}
            finite = bool(values["finite"][turn.slot]) and all(map(math.isfinite, of_turn.values()))
            if finite and standing.failed[turn.tenant] is None:
                logged[turn] = of_turn
            elif standing.failed[turn.tenant] is None:
                self.fail(done.step, turn, of_turn)
                standing = standing.changed(turn.tenant, failed=done.step)
        if not self.config.many:
            self.log.step(done, logged[turns[0]], bar)
            return standing
        for turn, of_turn in logged.items():
            self.write(turn.tenant, turn.step + 1, of_turn, every=self.config.logging.every)
        tokens = sum(one["tokens"] for one in logged.values())
        mean = sum(one["loss"] * one["tokens"] for one in logged.values()) / max(1.0, tokens)
        everyone = float(sum(values["tokens"][turn.slot] for turn in turns))
        self.log.step(done, {"loss": mean, "tenants": len(turns), "tokens": everyone}, bar, len(turns))
        return standing

    def fail(self, step: int, turn: Turn, values: dict[str, float]) -> None:
        """Says that a tenant's step was not finite, and on which examples; raises it in a run of one adapter."""
        tenant = self.tenants[turn.tenant]
        _, chosen = tenant.order.plan.batch_indices(turn.step)
        examples = places([tenant.data.places[i] for i in chosen])
        wrong = [f"the {name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        what = wrong[0] if wrong else "the new weights are not finite"
        if not self.config.many:
            raise ValueError(f"step {step}: {what} on {examples}; {REMEDY}")
        devices.say(
            f"{tenant.name}: stopped at its step {turn.step + 1}: {what} on {examples}; what it had learnt before is "
            "kept, and the others go on"
        )

    def write(self, tenant: int, step: int, values: dict[str, float], *, every: int = 1, show: bool = False) -> None:
        """Adds values of a tenant's own step to its metrics.jsonl."""
        if not self.config.many:
            self.log.write(step, values, show=show)
        elif is_first() and step % every == 0:
            self.rows[tenant].add(step, values)

    def flush(self) -> None:
        """Writes the rows that the logs keep back; see `Log.flush`."""
        self.log.flush()
        if is_first():
            with self.log.errors_named(), ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(Rows.flush, self.rows))

    # ---------------------------------------------------------------------------------------------- scores and endings

    def due(self, standing: Standing) -> list[int]:
        """The tenants to evaluate after this step."""
        found = []
        for tenant in standing.running:
            own, total = standing.steps[tenant], self.tenants[tenant].order.total_steps
            reached = own == total or (own > 0 and own % self.config.eval.every == 0)
            if reached and standing.evaluated[tenant] < own and standing.failed[tenant] is None:
                found.append(tenant)
        return found

    def leaving(self, standing: Standing) -> list[tuple[int, str]]:
        """The tenants that end after this step, and why."""
        patience, found = self.config.eval.patience, []
        for tenant in standing.running:
            last = standing.steps[tenant] == self.tenants[tenant].order.total_steps
            failed = standing.failed[tenant]
            if failed is not None and (last or failed < standing.step):
                found.append((tenant, "not finite"))
            elif last:
                found.append((tenant, "done"))
            elif patience is not None and failed is None and standing.since_best[tenant] >= patience:
                found.append((tenant, "patience"))
        return found

    def evaluate(self, state: TrainState, standing: Standing, due: list[int]) -> Standing:
        """Scores the tenants' adapters, and keeps each where it is its best so far."""
        with self.stop.interrupting():
            found = self.validation.scores(Stack(state.adapters), {tenant: standing.running[tenant] for tenant in due})
        for tenant in due:
            standing = self.judged(state, standing, tenant, found.get(tenant))
        return standing

    def judged(self, state: TrainState, standing: Standing, tenant: int, score: Score | None) -> Standing:
        """The standing after a tenant's adapter was scored; None: it has no validation data."""
        name, own = self.tenants[tenant].name, standing.steps[tenant]
        if score is None and self.config.many:  # its adapter is written once, when it ends
            return standing.changed(tenant, evaluated=own)
        best = standing.best_score[tenant]
        if score is not None:
            if not math.isfinite(score.loss):
                self.require_many(own, score)
                kept = "its best adapter is kept" if best is not None else "its last one is kept"
                devices.say(f"{name}: stopped at its step {own}: the validation loss is {score.loss}; {kept}")
                return standing.changed(tenant, evaluated=own, failed=standing.step - 1)
            self.write(tenant, own, scores("validation", score), show=True)
            if self.config.many:
                shown = {f"{name}/{key}": value for key, value in scores("validation", score).items()}
                self.log.write(standing.step, shown)
            if best is not None and score.score <= best:
                return standing.changed(tenant, evaluated=own, since_best=standing.since_best[tenant] + 1)
        self.keep(tenant, tenant_of(state.adapters, jnp.int32(standing.running[tenant])), own, score)
        found = None if score is None else score.score
        return standing.changed(tenant, evaluated=own, best_score=found, best_step=own, since_best=0)

    def require_many(self, step: int, score: Score) -> None:
        """Raises ValueError, in a run of one adapter, for a validation loss that is not finite."""
        if not self.config.many:
            raise ValueError(f"step {step}: the validation loss is {score.loss} on validation; {REMEDY}")

    def keep(self, tenant: int, adapter: Adapter, step: int, score: Score | None) -> None:
        """Writes a tenant's adapter into its folder, with its score."""
        card, whole = card_lines(self.tenants[tenant].config, step, score), gathered(adapter)
        if self.config.many:
            card.append(f"Trained in one run with {len(self.tenants) - 1} others.")
        to, source = self.tenants[tenant].folder / "adapter", self.config.backbone.source
        by_first(lambda: save_adapter(whole, to, base_model=source, model=self.model, card=card))

    def kept(self, tenant: int, last: Adapter) -> Adapter:
        return kept_adapter(self.tenants[tenant].folder, self.model, last)

    def last_where_best_is_another(self, state: TrainState, standing: Standing, tenant: int) -> Adapter | None:
        """A leaving tenant's adapter, if its best one is another that is to be tested."""
        is_best = standing.best_score[tenant] is None or standing.best_step[tenant] == standing.steps[tenant]
        if is_best or not self.tenants[tenant].test:
            return None
        return gathered(tenant_of(state.adapters, jnp.int32(standing.running[tenant])))

    def finish(self, state: TrainState, standing: Standing, tenant: int, why: str) -> Standing:
        """Ends a tenant. If it has test data, its best adapter is in its slot, and is scored. In a run of many its
        entry in tenants.json is written."""
        own, slot = self.tenants[tenant], standing.running[tenant]
        steps = int(gathered(state.step)[slot])
        if standing.best_score[tenant] is None and standing.best_step[tenant] < steps:  # the last one is the best
            self.keep(tenant, tenant_of(state.adapters, jnp.int32(slot)), steps, None)
            standing = standing.changed(tenant, best_step=steps)
        test_after = None
        if own.test and by_first((own.folder / "adapter").exists):
            with self.stop.interrupting():
                found = self.test.scores(Stack(state.adapters), {tenant: slot})[tenant]
            self.write(tenant, standing.steps[tenant], scores("test_after", found), show=True)
            test_after = found.score if math.isfinite(found.score) else None
        standing = standing.changed(tenant, ended=why)
        if not self.config.many:
            return standing
        best = standing.best_score[tenant]
        entry = {
            "examples": len(own.data.examples),
            "steps": steps,
            "best_step": standing.best_step[tenant],
            "best_score": best,
            "metric": own.validation.metric if own.validation else own.test.metric if own.test else None,
            "test_before": standing.test_before[tenant],
            "test_after": test_after,
            "ended": why,
        }
        by_first(lambda: add_entry(self.log.folder, own.name, entry))
        said = "" if best is None else f", best validation score {best:.4f} at step {standing.best_step[tenant]}"
        ended = f"{sum(standing.over)} of {len(self.tenants)} tenants have ended"
        devices.say(f"{own.name}: {steps} steps{said} ({why}; {ended})")
        if is_first():
            with self.log.errors_named():
                self.rows[tenant].flush()
        return standing

    def test_backbone(self, state: TrainState, standing: Standing, asked: list[int]) -> Standing:
        """Scores the backbone alone on the test data of these tenants."""
        with self.stop.interrupting():
            found = self.test.scores(Stack(state.adapters), dict.fromkeys(asked, -1))
        for tenant, score in found.items():
            self.write(tenant, standing.steps[tenant], scores("test_before", score), show=True)
            standing = standing.changed(tenant, test_before=score.score)
        self.flush()
        return standing

    def with_changed(self, standing: Standing, split: str, changed: list[str]) -> list[int]:
        """The tenants that have not ended and whose data of this split changed."""
        return [
            i
            for i, tenant in enumerate(self.tenants)
            if standing.ended[i] is None and {tenant.part(split), "data"} & set(changed)
        ]

    def rescored(self, state: TrainState, standing: Standing, asked: list[int]) -> Standing:
        """The standing where these tenants' validation data changed: their kept adapters are scored on the new data,
        because scores of two data sets are never compared."""
        for tenant in asked:
            own, was, found = self.tenants[tenant], standing.best_score[tenant], None
            if was is not None and own.validation:
                like = jax.eval_shape(tenant_of, state.adapters, jnp.int32(0))
                kept = self.kept(tenant, like)
                stack = Stack(jax.tree.map(lambda leaf: leaf[None], kept))
                with self.stop.interrupting():
                    score = self.validation.scores(
                        place_tenants(stack, jax.sharding.get_mesh(), self.model.config), {tenant: 0}
                    )[tenant]
                step, whose = standing.best_step[tenant], f"{own.name}: " if own.name else ""
                if math.isfinite(score.loss):
                    found = score.score
                    before = f"{was:.4f} on the data before"
                    devices.say(
                        f"{whose}the best adapter so far, of step {step}: {score.metric} {found:.4f} ({before})"
                    )
                    self.keep(tenant, kept, step, score)
                else:
                    self.require_many(step, score)
            standing = standing.changed(tenant, best_score=found, since_best=0)
        return standing

    def end_early(self, standing: Standing) -> NoReturn:
        """Ends a run that was told to stop, after everything is written, and says how to go on."""
        self.flush()
        where = f"step {standing.step} of {self.tenants[0].order.total_steps}"
        if self.config.many:
            where = f"step {standing.step}, with {sum(standing.over)} of {len(self.tenants)} tenants ended"
        by_first(lambda: finish_saving(self.checkpoints))
        file = self.log.folder / "config.yaml"
        devices.say(f"stopped after {where}, and saved; the same command resumes, or `para-jax train {file}`")
        self.stop.end()


#: A step's values that are logged for each tenant.
VALUES = ("loss", "grad_norm", "learning_rate", "tokens")
REMEDY = "look at these examples, or start again with a lower train.learning_rate"


def in_passes(coming: StepBatch, layout: Layout) -> tuple[Batch | Packed, np.ndarray]:
    """A step's batch [passes, rows, ...], and the slot of each group's tenant, int32 [passes, groups]. Different passes
    may hold different tenants."""
    shape = layout.passes, layout.pass_rows
    batch = type(coming.batch)(*(array.reshape(*shape, *array.shape[2:]) for array in coming.batch))
    return batch, coming.tenant_of_group.reshape(layout.passes, layout.groups)


def kept_adapter(folder: Place, model, like: Adapter) -> Adapter:
    """The adapter that a run keeps in a folder, which the first process alone reads, as arrays of NumPy."""
    found: list[Adapter] = []
    by_first(lambda: found.append(load_adapter(folder / "adapter", model.config, model=model)))
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), like)
    return arrays_of_first(found[0] if is_first() else empty)


def card_lines(config: RunConfig, steps: int, found: Score | None) -> list[str]:
    """What an adapter's model card says about its training and its validation score."""
    card = [f"Trained for {steps} steps on {expanded(config.data.train or '').name}."]
    if config.backbone.quantize:
        card.append(f"The backbone's weights were {config.backbone.quantize} during training.")
    if found:
        card.append(f"Validation {found.metric}: {found.score:.4f}.")
    return card


def scores(name: str, found: Score) -> dict[str, float]:
    return {f"{name}_{what}": value for what, value in found.values().items()}


def places(each: list[str]) -> str:
    """Examples' places ("file:line"), with each file named once: "train.jsonl:7, 12, 31"."""
    lines: dict[str, list[str]] = {}
    for file, _, line in (text.rpartition(":") for text in each):
        lines.setdefault(file, []).append(line)
    return "; ".join(f"{file}:{', '.join(sorted(numbers, key=natural))}" for file, numbers in lines.items())


def natural(number: str) -> tuple[int, str]:
    return len(number), number
