"""The training loop: steps, evaluations, checkpoints, and the tenants that begin and end on the way."""

from __future__ import annotations

import math
import re
import shlex
import time
from functools import partial
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from ..adapters.adapter import Adapter
from ..adapters.bank import weights_hash
from ..config import RunConfig
from ..data.batches import Batch, Bucket
from ..data.given import is_given
from ..data.packing import Packed, RowShape
from ..data.schedule import Schedule, StepBatch, Turn, admitted, batch_shares, prefetch
from ..io.checks import expanded
from ..io.messages import say
from ..io.progress import Progress
from ..model.adapted import init_adapter
from ..model.tail import PromptStates
from ..runtime import devices
from ..runtime.processes import full_arrays, on_first_process
from ..runtime.sharding import shard_rows
from ..training.checkpoint import finish_saving, require_saved, save_checkpoint
from ..training.last_state import read_last_state, write_last_state
from ..training.log import Done
from ..training.optimizer import LearningRates, learning_rates
from ..training.passes import Layout
from ..training.profiler import Profiler
from ..training.prompt_cache import PromptCache
from ..training.statistics import standardise, statistics_batches
from ..training.step import TrainState, put_adapter, put_state, put_tenant, tenant_of, train_step
from ..training.stop import Interrupted, StopSignal
from .chosen import TRIALS
from .initial import initial_adapter, require_same_start
from .logs import Logs
from .scoring import REMEDY, NotFinite, Scoring, read_everywhere
from .standing import Standing
from .tenants import Tenant


class Dispatched(NamedTuple):
    """A step whose values may still be computed."""

    done: Done
    turns: list[Turn]


class Loop(NamedTuple):
    """The steps of a run. A NamedTuple, because its parts never change."""

    config: RunConfig
    model: Any
    tenants: list[Tenant]
    buckets: tuple[Bucket, ...] | tuple[RowShape]
    layout: Layout
    scoring: Scoring
    checkpoints: Any
    logs: Logs
    profiler: Profiler
    stop: StopSignal
    prompts: PromptCache | None = None
    """of train.cache_prompts"""

    def run(self, state: TrainState, standing: Standing) -> tuple[TrainState, Standing]:
        """Steps until every tenant has ended. Each step's values are read when the next step is under way.

        A checkpoint holds what was evaluated before it, and only values that were read. A tenant whose values were not
        finite in step i takes part in step i + 1, which is under way when they are read, and never in step i + 2: this
        must not depend on where the run was stopped and resumed.
        """
        compiled: set[Any] = set()
        pending: Dispatched | None = None
        saved = standing
        state, standing = self.admit(state, standing)
        batches = self.batches(standing)
        total, begun = sum(t.order.total_steps for t in self.tenants), sum(standing.steps)
        unit = "tenant step" if self.config.many else "step"
        with Progress("training", total, unit=unit, done=begun, keep=True) as bar:
            try:
                while True:
                    stopping = self.stop.reached(standing.step)
                    due = [] if stopping else self.due(standing)
                    if due or self.leaving(standing):
                        standing, pending = self.read(pending, standing, bar), None
                    try:
                        if due:
                            standing = self.scoring.evaluate(state, standing, self.due(standing))
                    except Interrupted:
                        stopping = True
                    if not stopping:
                        before = standing.over
                        state, standing, stopping = self.end_tenants(state, standing)
                        if self.ended_with_steps_left(before, standing):
                            batches.close()
                            batches = self.batches(standing)
                    if self.must_save(standing, saved, stopping=stopping):
                        standing, pending = self.read(pending, standing, bar), None
                        self.logs.flush()
                        health = self.logs.health.held(standing.over)
                        save_checkpoint(self.checkpoints, state, standing._replace(health=health))
                        if standing.entries is not saved.entries:
                            self.scoring.write_ended(standing)
                        saved = standing
                    if stopping:
                        self.end_stopped_run(standing)
                    if all(standing.over):
                        self.logs.flush()
                        on_first_process(lambda: finish_saving(self.checkpoints))
                        return state, standing
                    state, standing = self.admit(state, standing)
                    state, standing, pending = self.step(state, standing, batches, pending, compiled, bar)
                    require_saved(self.checkpoints)
            finally:
                batches.close()

    def must_save(self, standing: Standing, saved: Standing, *, stopping: bool) -> bool:
        """Whether a checkpoint is written after this step.

        Args:
            saved: the standing in the last one.
            stopping: whether a signal ends the run after this step.
        """
        over, every = all(standing.over), self.config.checkpoint.every or self.config.eval.every
        caught_up = saved.evaluated != standing.evaluated  # an evaluation that a stop had interrupted
        unsaved = saved.step < standing.step or caught_up or (over and saved != standing)
        return unsaved and (stopping or over or standing.step % every == 0)

    # --------------------------------------------------------------------------------------------------------- a step

    def admit(self, state: TrainState, standing: Standing) -> tuple[TrainState, Standing]:
        """Gives free slots to the tenants that wait. If a run was made longer, a tenant that had ended continues from
        its last state."""
        slots = admitted(standing.slots, standing.over)
        for slot, (held, tenant) in enumerate(zip(standing.slots, slots, strict=True)):
            if held == tenant:
                continue
            if held >= 0 and standing.ended[held] == "done":
                write_last_state(self.tenants[held].folder, standing.steps[held], tenant_of(state, jnp.int32(slot)))
            steps = standing.steps[tenant]
            if steps:
                like = jax.eval_shape(tenant_of, state, jnp.int32(slot))
                state = put_state(state, jnp.int32(slot), read_last_state(self.tenants[tenant].folder, steps, like))
            else:
                fresh = self.fresh_adapter(self.tenants[tenant], standing)
                state = put_tenant(state, jnp.int32(slot), fresh, config=self.config.train)
        return state, standing._replace(slots=slots)

    def fresh_adapter(self, tenant: Tenant, standing: Standing) -> Adapter:
        if tenant.config.train.init_from:
            like = jax.eval_shape(lambda: init_adapter(self.config.adapter, self.model.config))
            read = partial(initial_adapter, tenant.config, self.model.config, model=self.model)
            adapter = read_everywhere(read, like)
            require_same_start(tenant.name, tenant.config, standing.starts, weights_hash(adapter))
            return adapter
        made = init_adapter(self.config.adapter, self.model.config, seed=tenant.config.seed)
        if made.needs_statistics:
            longest, seed = self.buckets[-1], tenant.config.seed
            bucket = Bucket(longest.length, longest.completion)
            statistics = statistics_batches(tenant.data.examples, bucket, self.layout.rows, seed)
            made = standardise(self.model, made, *statistics)
        return full_arrays(made)

    def batches(self, standing: Standing):
        """The batches of the steps to come, while no tenant ends before its last step."""
        shares = batch_shares([len(t.data.examples) for t in self.tenants], self.config.train.sampling)
        over, layout = standing.over, self.layout
        coming = Schedule(
            [t.order for t in self.tenants], self.buckets, shares,
            groups=layout.together, rows=layout.rows, passes=layout.passes_of_tenant,
            steps=standing.steps, slots=standing.slots, ended=over,
        )  # fmt: skip
        left = sum(t.order.total_steps - standing.steps[i] for i, t in enumerate(self.tenants) if not over[i])

        def prepared(step: int) -> tuple[StepBatch, PromptStates | None] | None:
            made = coming.batch(step)
            if made is None or self.prompts is None:
                return made and (made, None)
            batch, _ = in_passes(made, self.layout)
            return made, self.prompts.states(batch, made.bucket.prompt or made.bucket.length)

        return prefetch(prepared, left)

    def step(
        self,
        state: TrainState,
        standing: Standing,
        batches,
        pending: Dispatched | None,
        compiled: set[Any],
        bar: Progress,
    ) -> tuple[TrainState, Standing, Dispatched]:
        """Dispatches the next step, then reads the values of the one before."""
        begun: float | None = time.monotonic()
        coming, states = next(batches)
        batch, tenant_of_group = in_passes(coming, self.layout)
        batch = jax.tree.map(shard_rows, batch)
        states = None if states is None else shard_states(states)
        waited, number = time.monotonic() - begun, standing.step + 1
        given = self.model, batch, tenant_of_group, self.rates(standing), states
        bucket, many = coming.bucket, self.config.many
        static: dict[str, Any] = dict(
            completion=bucket.completion, prompt=bucket.prompt, config=self.config.train, many=many
        )
        self.profiler.before(number)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            if coming.bucket in compiled:
                state, values = train_step(state, *given, **static)
            else:
                compiled.add(coming.bucket)
                standing, pending, begun = self.read(pending, standing, bar), None, None  # compiling is not a step
                with bar.away(units), devices.compiling(f"the training step for {self.shape_of(coming)}"):
                    state, values = jax.block_until_ready(train_step(state, *given, **static))
        standing = self.read(pending, standing, bar)
        begun = None if self.profiler.on else begun  # nor is tracing one, and writing the trace
        self.profiler.after(number, values)
        for turn in coming.turns:
            standing = standing.changed(turn.tenant, steps=turn.step + 1)
        done = Done(number, values, coming.tokens, begun, waited)
        return state, standing._replace(step=number), Dispatched(done, coming.turns)

    def shape_of(self, coming: StepBatch) -> str:
        count = self.layout.groups
        groups = f"{count} tenant{'s' * (count > 1)} x " if self.config.many else ""
        return f"{groups}{self.layout.rows} rows of {coming.bucket.length} tokens"

    def rates(self, standing: Standing) -> LearningRates:
        """The learning rate schedules of the tenants in the slots."""
        held = [self.tenants[max(tenant, 0)] for tenant in standing.slots]
        return learning_rates([t.config.train for t in held], [t.order.total_steps for t in held])

    def read(self, pending: Dispatched | None, standing: Standing, bar: Progress) -> Standing:
        """Waits for the values of a step and logs them. A tenant whose values are not finite has failed; in a run of
        one adapter that is a ValueError."""
        if pending is None:
            return standing
        done, turns = pending
        values = {name: np.asarray(value) for name, value in full_arrays(done.values).items()}
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
            self.logs.run.step(done, logged[turns[0]], bar)
            self.logs.health.watch(0, done.step, logged[turns[0]])
            return standing
        for turn, of_turn in logged.items():
            self.logs.write(turn.tenant, turn.step + 1, of_turn, every=self.config.logging.every)
        tokens = sum(one["tokens"] for one in logged.values())
        summed = sum(one["loss"] * one["tokens"] for one in logged.values())
        mean = summed / tokens if tokens else math.nan  # no tenant of this step is finite
        everyone = float(sum(values["tokens"][turn.slot] for turn in turns))
        self.logs.run.step(done, {"loss": mean, "tenants": len(turns), "tokens": everyone}, bar, len(turns))
        return standing

    def fail(self, step: int, turn: Turn, values: dict[str, float]) -> None:
        """Says that a tenant's step was not finite, and on which examples; raises it in a run of one adapter."""
        tenant = self.tenants[turn.tenant]
        _, chosen = tenant.order.plan.batch_indices(turn.step)
        examples = places([tenant.data.places[i] for i in chosen])
        wrong = [f"the {name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        what = wrong[0] if wrong else "the new weights are not finite"
        if not self.config.many:
            raise NotFinite(f"step {step}: {what} on {examples}; {REMEDY}")
        say(
            f"{tenant.name}: stopped at its step {turn.step + 1}: {what} on {examples}; what it had learnt before is "
            "kept, and the others continue"
        )

    # ---------------------------------------------------------------------------------------------- scores and endings

    def due(self, standing: Standing) -> list[int]:
        """The tenants to evaluate after this step."""
        found = []
        for tenant in standing.running:
            own, total = standing.steps[tenant], self.tenants[tenant].order.total_steps
            reached = own == total or (own > 0 and own % self.tenants[tenant].config.eval.every == 0)
            if reached and standing.evaluated[tenant] < own and standing.failed[tenant] is None:
                found.append(tenant)
        return found

    def leaving(self, standing: Standing) -> list[tuple[int, str]]:
        """The tenants that end after this step, and why."""
        found = []
        for tenant in standing.running:
            patience = self.tenants[tenant].config.eval.patience
            last = standing.steps[tenant] == self.tenants[tenant].order.total_steps
            failed = standing.failed[tenant]
            if failed is not None and (last or failed < standing.step):
                found.append((tenant, "not finite"))
            elif last:
                found.append((tenant, "done"))
            elif patience is not None and failed is None and standing.since_best[tenant] >= patience:
                found.append((tenant, "patience"))
        return found

    def end_tenants(self, state: TrainState, standing: Standing) -> tuple[TrainState, Standing, bool]:
        """Ends the tenants that have done their last step. The third value says whether a signal broke this off: the
        others end when the run resumes."""
        interrupted = False
        for tenant, why in self.leaving(standing):
            slot, last = jnp.int32(standing.running[tenant]), self.scoring.replaced_for_test(state, standing, tenant)
            if last is not None:  # the best adapter is tested in its slot, in the programs that scored validation
                state = put_adapter(state, slot, self.scoring.kept(tenant, last))
            try:
                standing = self.scoring.finish(state, standing, tenant, why)
            except Interrupted:
                interrupted = True
            if last is not None:  # a longer run goes on from it
                state = put_adapter(state, slot, last)
            if interrupted:
                break
        return state, standing, interrupted

    def ended_with_steps_left(self, before: list[bool], standing: Standing) -> bool:
        """Whether a tenant has ended since, with steps left that the batches made ahead count on."""
        return any(
            standing.over[i] and not was and standing.steps[i] < self.tenants[i].order.total_steps
            for i, was in enumerate(before)
        )

    def end_stopped_run(self, standing: Standing) -> NoReturn:
        """Ends a run that a signal stopped, after everything is written, and says how to resume."""
        self.logs.flush()
        where = f"step {standing.step} of {self.tenants[0].order.total_steps}"
        if self.config.many:
            where = f"step {standing.step}, with {sum(standing.over)} of {len(self.tenants)} tenants ended"
        on_first_process(lambda: finish_saving(self.checkpoints))
        file = expanded(self.config.output_dir) / "config.yaml"
        if is_given(self.config.data.train) or is_given(self.config.data.tenants):
            advice = "the same call resumes"
        elif file.parent.parent.name == TRIALS:
            advice = "the same command resumes"
        else:
            advice = f"the same command resumes, or `para-jax train {shlex.quote(str(file))}`"
        say(f"stopped after {where}, and saved; {advice}")
        self.stop.end()


#: A step's values that are logged for each tenant.
VALUES = ("loss", "grad_norm", "learning_rate", "tokens")
#: The place of an example, in what comes before its number, and the number.
PLACE = re.compile(r"(.*\D)(\d+)\]?", re.DOTALL)


def in_passes(coming: StepBatch, layout: Layout) -> tuple[Batch | Packed, np.ndarray]:
    """A step's batch [passes, rows, ...], and the slot of each group's tenant, int32 [passes, groups]. Different passes
    may hold different tenants."""
    shape = layout.passes, layout.pass_rows
    batch = type(coming.batch)(*(array.reshape(*shape, *array.shape[2:]) for array in coming.batch))
    return batch, coming.tenant_of_group.reshape(layout.passes, layout.groups)


def shard_states(states: PromptStates) -> PromptStates:
    """Host arrays [passes, layers, rows, ...] on the devices of the current mesh."""
    return PromptStates(*(shard_rows(a, (None, None, "batch", "kv_heads")) for a in states[:2]))


def places(each: list[str]) -> str:
    """Examples' places, with each source named once: "train.jsonl:7, 12; hf:NAME::train[0, 3]"."""
    found: dict[str, list[int]] = {}
    for text in each:
        match = PLACE.fullmatch(text)
        assert match, text
        found.setdefault(match[1], []).append(int(match[2]))
    joined = {source: ", ".join(map(str, sorted(numbers))) for source, numbers in found.items()}
    return "; ".join(f"{source}{numbers}{']' if source.endswith('[') else ''}" for source, numbers in joined.items())
