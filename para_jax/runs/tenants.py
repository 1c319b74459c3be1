"""train_tenants: many tenants' adapters in one run, from mixed batches; a sweep's combinations are tenants too.

output_dir/{config.yaml, metrics.jsonl, tensorboard/, checkpoints/<step>/, tenants.json} and a run folder for each
tenant, output_dir/NAME/{config.yaml, metrics.jsonl, adapter/}. The same command resumes.
"""

from __future__ import annotations

import itertools
import math
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from .. import devices
from ..adapters.adapter import Adapter
from ..adapters.files import save_adapter
from ..adapters.folder import mend_folder
from ..adapters.rows import Stack
from ..backbone.load import load_backbone, load_model_config
from ..config import RunConfig, config_dict, expanded, require, save_config
from ..data.batches import Batch, Bucket, example_lengths, for_mixed_rows, plan, plan_buckets_of_sizes
from ..data.example_arrays import digest
from ..data.prefetch import prefetch
from ..data.schedule import Mixed, Order, Turn, Turns, admitted
from ..data.tenants import tenant_sections, weights
from ..data.tokenizer import load_tokenizer
from ..data.training_data import TrainingData, load_training_data
from ..evaluation.evaluate import EvalTask, Score, task_of_run
from ..evaluation.shapes import say_evaluation
from ..evaluation.tenants import Tasks, share_shapes
from ..hub import resolve_backbone
from ..memory import run_mesh
from ..model import init_adapter
from ..processes import by_each, by_first, gathered, is_first, require_same
from ..roofline import peak_rate
from ..sharding import rows_over, tenant_axes
from ..storage.bucket import BucketPath
from ..training.checkpoint import (
    Progress,
    finish_saving,
    open_checkpoints,
    require_saved,
    restore_checkpoint,
    save_checkpoint,
)
from ..training.log import Done, Log, drop_rows
from ..training.metrics_file import Rows, is_log, read_metrics, write_metrics
from ..training.optimizer import warmup_steps
from ..training.profiler import Profiler
from ..training.step import standardise
from ..training.stop import Interrupted, StopSignal, stop_signals
from ..training.tenants import (
    Layout,
    Settings,
    TenantsState,
    init_tenants,
    lay_out,
    put_adapter,
    put_tenant,
    tenant_of,
    tenants_step,
)
from ..training.tenants_file import add_entry, read_entries, write_entries
from .folder import FREE_FIELDS, claim_folder, delete_leftovers, locked_folder, run_digests
from .train import (
    accepted_changes,
    card_lines,
    end_stopped,
    kept_adapter,
    places,
    require_judge,
    require_room,
    say_attention,
    say_layout,
    scores,
    silent,
    statistics_batches,
)

#: Tenants' files that are written at once.
AT_ONCE = 16


class Tenant(NamedTuple):
    """One tenant of a run."""

    name: str
    config: RunConfig
    """its own: data, output folder, learning rate and seed"""
    data: TrainingData
    order: Order
    validation: EvalTask | None
    test: EvalTask | None


class Standing(NamedTuple):
    """Where a run of many tenants stands beside its arrays: lists with a value for each tenant, in the run's order."""

    step: int
    """of the run"""
    names: list[str]
    slots: list[int]
    """the tenant in each slot of the stack; -1: none"""
    steps: list[int]
    """each tenant's own steps"""
    best_score: list[float | None]
    best_step: list[int]
    since_best: list[int]
    """evaluations without a better score"""
    evaluated: list[int]
    """the last own step whose adapter was scored"""
    test_before: list[float | None]
    """the backbone's score"""
    failed: list[int | None]
    """the step of the run at which its loss or gradient was not finite"""
    ended: list[str | None]
    """why: "done", "patience" or "not finite\""""
    run: dict[str, str] | None = None
    """as in training.checkpoint.Progress"""

    def changed(self, tenant: int, **values) -> Standing:
        """The standing with other values of one tenant."""
        lists = {name: list(getattr(self, name)) for name in values}
        for name, value in values.items():
            lists[name][tenant] = value
        return self._replace(**lists)

    @property
    def over(self) -> list[bool]:
        """Whether each tenant has ended."""
        return [why is not None for why in self.ended]

    @property
    def resident(self) -> dict[int, int]:
        """The slot of each tenant that has one."""
        return {tenant: slot for slot, tenant in enumerate(self.slots) if tenant >= 0}


def fresh_standing(names: list[str], slots: int) -> Standing:
    count = len(names)
    zeros: list[int] = [0] * count
    nothing: list[Any] = [None] * count
    return Standing(0, names, [-1] * slots, zeros, nothing, zeros, zeros, zeros, nothing, nothing, nothing)


class TenantsResult(NamedTuple):
    tenants: dict[str, dict[str, Any]]
    """by name: examples, steps, best_step, best_score, metric, ended, test_before and test_after (None: not measured)
    """
    output_dir: Path


def train_tenants(config: RunConfig) -> TenantsResult:
    """Trains the adapters of many tenants (data.tenants, or the combinations of `sweep`) in one run, or goes on where
    the same run stopped.

    A tenant's loss, clipping, schedule, validation, best adapter and early stopping are its own; one whose loss is not
    finite is stopped, and the others go on. SIGTERM and Ctrl-C save as in `train`.
    Raises ValueError, before anything is written, for data, names, a mesh or an output folder that do not fit, and
    for a folder that another run is writing.
    """
    devices.start(config.runtime)
    require(config.many, "data.tenants", None, "a folder of tenants, or `sweep`; `train` is for a run of one adapter")
    require_same("the config", lambda: {k: v for k, v in config_dict(config).items() if k not in FREE_FIELDS})
    mesh = run_mesh(config, by_each(lambda: len(tenant_configs(config))))
    tokenizer, tenants, buckets = by_each(lambda: read_tenants(config))
    require_same(
        "the data", lambda: [(t.name, *(p and digest(p.examples or []) for p in (t.data, *t[-2:]))) for t in tenants]
    )
    by_first(lambda: require_judge(config, [tenant.validation for tenant in tenants]))
    with ExitStack() as held:
        by_first(lambda: held.enter_context(locked_folder(config)))
        by_first(lambda: claim_tenants(config, tenants))
        model = load_backbone(**vars(config.backbone), mesh=mesh, layout="stacked")
        require_same("the backbone", lambda: model.fingerprint)
        return fit_tenants(config, model, tokenizer, tenants, buckets, mesh)


# ------------------------------------------------------------------------------------------------------------- tenants


def read_tenants(config: RunConfig) -> tuple[Any, list[Tenant], tuple[Bucket, ...]]:
    """The tokenizer, all tenants with their data, and the compiled shapes that they share."""
    resolve_backbone(config.backbone.source)
    tokenizer = load_tokenizer(config.backbone.source)
    configs, model = tenant_configs(config), load_model_config(config.backbone.source)
    read_once: dict[Any, tuple] = {}
    for name, own in configs.items():
        if own.data not in read_once:
            try:
                data = load_training_data(own.data, tokenizer)
                require(len(data.examples) > 0, "data.tenants", own.data.train, "at least one training example")
                tasks = [task_of_run(own, split, tokenizer) for split in ("validation", "test")]
                require_room(model, data, tasks)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
            read_once[own.data] = data, *tasks
    sizes = np.concatenate([data.examples.sizes for data, *_ in read_once.values()])
    planned = plan_buckets_of_sizes(sizes, config.data.buckets)
    buckets = for_mixed_rows(planned)
    counts = [len(read_once[own.data][0].examples) for own in configs.values()]
    devices.say(f"{len(configs)} tenants with {min(counts)} to {max(counts)} training examples, {sum(counts)} in all")
    tenants = []
    for name, own in configs.items():
        data, validation, test = read_once[own.data]
        order = plan(example_lengths(data.examples), buckets=buckets, rows=config.tenant_batch, seed=own.seed)
        steps = own.train.max_steps or math.ceil(own.train.num_epochs * order.batches_per_epoch)
        tested = test if config.eval.test else None
        tenants.append(Tenant(name, own, data, Order(data.examples, order, steps), validation, tested))
    return tokenizer, tenants, buckets


def tenant_configs(config: RunConfig) -> dict[str, RunConfig]:
    """Each tenant's own config, by name: that of a run of it alone, in its folder of the run's.

    Raises ValueError for a folder or names that data/tenants.py refuses.
    """
    if config.data.tenants:
        sections = tenant_sections(config.data.tenants, config.data)
        made = {name: replace(config, data=section) for name, section in sections.items()}
    else:
        made = sweep_configs(config)
    rows = config.rows_per_tenant
    batch = {"per_device_batch_size": rows} if config.train.batch_size is None else {"batch_size": rows}
    return {
        name: replace(
            own,
            output_dir=str(expanded(config.output_dir) / name),
            train=replace(own.train, rows_per_tenant=rows, **batch),
        )
        for name, own in made.items()
    }


def sweep_configs(config: RunConfig) -> dict[str, RunConfig]:
    """Every combination of a sweep, by its name: learning_rate-0.003-seed-1."""
    rates = config.sweep.learning_rate or (config.train.learning_rate,)
    seeds = config.sweep.seed or (config.seed,)
    alone = replace(config, sweep=type(config.sweep)())
    return {
        f"learning_rate-{rate!r}-seed-{seed}".replace("+", ""): replace(
            alone, train=replace(config.train, learning_rate=rate), seed=seed
        )
        for rate, seed in itertools.product(rates, seeds)
    }


def claim_tenants(config: RunConfig, tenants: list[Tenant]) -> None:
    """Makes the output folder and each tenant's in it; a folder that holds another run, or one of other tenants, is
    refused."""
    folder = expanded(config.output_dir)
    held = {path.parent.name for path in folder.glob("*/config.yaml")}
    others = sorted(held ^ {tenant.name for tenant in tenants})
    if held - {tenant.name for tenant in tenants} or (others and any(folder.glob("checkpoints/*"))):
        raise ValueError(
            f"output_dir {folder} holds a run of other tenants (the difference: {', '.join(map(repr, others[:3]))}); "
            "choose another output_dir, or the same tenants to resume"
        )
    claim_folder(config)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(claim_tenant, tenants))


def claim_tenant(tenant: Tenant) -> None:
    folder = expanded(tenant.config.output_dir)
    folder.mkdir(exist_ok=True)
    delete_leftovers(folder)
    save_config(tenant.config, folder / "config.yaml")


# ---------------------------------------------------------------------------------------------------------------- loop


def fit_tenants(
    config: RunConfig, model, tokenizer, tenants: list[Tenant], buckets: tuple[Bucket, ...], mesh
) -> TenantsResult:
    """The training loop, with a backbone that is loaded already. The folders must be claimed."""
    folder, layout = expanded(config.output_dir), lay_out(config, len(tenants), mesh)
    say_layout(model, mesh)
    say_attention(model, buckets, mesh)
    with jax.set_mesh(mesh), open_checkpoints(folder / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        state = empty_state(config, model, layout.slots, mesh)
        data = [(t.data.examples, t.validation, t.test) for t in tenants]
        run = run_digests(config, model.fingerprint, data, [t.name for t in tenants])
        require_same("the data", lambda: run)  # also what the ids don't show, such as references
        restored = restore_checkpoint(checkpoints, state, Standing, run, config.data.changed == "accept")
        fresh = fresh_standing([t.name for t in tenants], layout.slots)._replace(run=run)
        state, standing = restored or (state, fresh)
        changed, standing = accepted_changes(standing, run)
        require_same_tenants(standing, tenants, layout.slots)
        start = Progress(standing.step, None, 0, 0, standing.step) if restored else None
        log = Log(config, folder, start, peak_rate=peak_rate(model.config, mesh.devices.flatten()))
        by_first(lambda: mend_tenants(standing, tenants, folder, bool(restored)))
        profiler = Profiler(config.profiler, folder)
        with closing(log), closing(profiler), stop_signals() as stop:
            validation = Tasks(model, tokenizer, [t.validation for t in tenants], config.eval.limit)
            test = Tasks(model, tokenizer, [t.test for t in tenants])
            share_shapes(validation, test)
            parts = {"validation": validation, "test": test}
            held = {name: list(tasks.encoded.values()) for name, tasks in parts.items() if tasks.encoded}
            say_evaluation(held, config.eval.batch_size)
            logs = [tenant_rows(t) for t in tenants]
            shared = model, tenants, buckets, layout, validation, test
            loop = TenantsLoop(config, *shared, checkpoints, log, profiler, stop, logs)
            try:
                tested = loop.running(standing, "test", changed) if restored else list(range(len(tenants)))
                standing = loop.test_backbone(state, standing, tested)
                standing = loop.rescored(state, standing, loop.running(standing, "validation", changed))
                loop.run(state, standing)
            except Interrupted:
                loop.end_early(standing)
        entries = by_first(lambda: read_entries(folder))
    return TenantsResult({t.name: entries[t.name] for t in tenants}, folder)


def tenant_rows(tenant: Tenant) -> Rows:
    """Adds to a tenant's metrics.jsonl. In a bucket only with each checkpoint: there each write takes a while."""
    file = expanded(tenant.config.output_dir) / "metrics.jsonl"
    return Rows(file, math.inf if isinstance(file, BucketPath) else None)


def empty_state(config: RunConfig, model, slots: int, mesh) -> TenantsState:
    """A stack of zeros, for tenants to be put into, spread over the current mesh."""
    shapes = jax.eval_shape(lambda: init_adapter(config.adapter, model.config))

    def fresh():
        stack = jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape), leaf.dtype), shapes)
        return init_tenants(stack, config.train)

    axes = tenant_axes(slots, mesh.shape)
    used = math.prod(mesh.shape[axis] for axis in axes)
    if used < mesh.size:
        lie = f"are spread over {used} of the" if used > 1 else "lie whole on each of the"
        devices.say(
            f"the weights of {slots} tenants {lie} {mesh.size} devices, which do not divide them; with a multiple of "
            f"{mesh.size} as train.tenants_at_once they take the least memory"
        )
    return jax.jit(fresh)()


def require_same_tenants(standing: Standing, tenants: list[Tenant], slots: int) -> None:
    """Raises ValueError where a checkpoint is not of these tenants and their data."""
    names = [tenant.name for tenant in tenants]
    require(standing.names == names, "data.tenants", names, f"the tenants that the run began with, {standing.names}")
    lengths = {name: len(value) for name, value in standing._asdict().items() if isinstance(value, list)}
    expected = dict.fromkeys(lengths, len(names)) | {"slots": slots}
    require(lengths == expected, "the checkpoint's lists", lengths, f"lists of {expected}; choose another output_dir")
    known = all(-1 <= tenant < len(names) for tenant in standing.slots)
    require(known, "the checkpoint's slots", standing.slots, "tenants of this run; choose another output_dir")
    short = [t.name for i, t in enumerate(tenants) if standing.steps[i] > t.order.total_steps]
    require(not short, "data.tenants", short, "as many examples as when the run began; choose another output_dir")


def mend_tenants(standing: Standing, tenants: list[Tenant], folder: Path, resumed: bool) -> None:
    """Puts the tenants' folders into the state of the checkpoint that the run goes on from."""

    def mend(i: int) -> None:
        own = expanded(tenants[i].config.output_dir)
        mend_folder(own / "adapter")
        where = Progress(standing.steps[i], None, 0, 0, standing.evaluated[i])
        ended = standing.ended[i] is not None
        drop_rows(own / "metrics.jsonl", where if resumed else None, ended=ended)

    with ThreadPoolExecutor(AT_ONCE) as pool:
        list(pool.map(mend, range(len(tenants))))
    ended = [t.name for i, t in enumerate(tenants) if standing.ended[i]]
    entries = read_entries(folder) if ended else {}
    lost = [name for name in ended if name not in entries]
    require(not lost, str(folder / "tenants.json"), lost, "these tenants, which have ended; choose another output_dir")
    write_entries(folder, {name: entries[name] for name in ended})
    drop_unsure(standing, folder / "metrics.jsonl")


def drop_unsure(standing: Standing, file: Path) -> None:
    """Takes the scores of the last step out of the run's log that will be measured again."""
    again = {name for i, name in enumerate(standing.names) if standing.evaluated[i] < standing.steps[i]}
    if again and is_log(file):
        kept = [
            row
            for row in read_metrics(file)
            if row["step"] < standing.step or not any(key.rpartition("/")[0] in again for key in row)
        ]
        write_metrics(file, kept)


class TenantsLoop(NamedTuple):
    """The steps of a run. A NamedTuple, for its parts are handed on and never change."""

    config: RunConfig
    model: Any
    tenants: list[Tenant]
    buckets: tuple[Bucket, ...]
    layout: Layout
    validation: Tasks
    test: Tasks
    checkpoints: Any
    log: Log
    profiler: Profiler
    stop: StopSignal
    rows: list[Rows]
    """each tenant's metrics.jsonl"""

    def run(self, state: TenantsState, standing: Standing) -> None:
        """Steps until every tenant has ended; each step's values are read when the next step is under way.

        A tenant whose values were not finite in step i takes part in step i + 1 yet, which is under way when they are
        read, and never in step i + 2: this must not depend on where the run was stopped and resumed.
        """
        compiled: set[Bucket] = set()
        pending: Pending | None = None
        saved = standing.step
        state, standing = self.admit(state, standing)
        batches = self.batches(standing)
        total, begun = sum(t.order.total_steps for t in self.tenants), sum(standing.steps)
        with tqdm(total=total, initial=begun, desc="training", unit="step", disable=silent()) as bar:
            try:
                while True:
                    stopping = self.stop.reached(standing.step)
                    due = [] if stopping else self.due(standing)
                    if due or self.leaving(standing):
                        standing, pending = self.read(pending, standing, bar), None
                    try:
                        if due:
                            standing = self.evaluate(state, standing, self.due(standing))
                        leaving = [] if stopping else self.leaving(standing)
                        unforeseen = False
                        for tenant, why in leaving:
                            unforeseen |= standing.steps[tenant] < self.tenants[tenant].order.total_steps
                            state = self.with_best(state, standing, tenant)
                            standing = self.finish(state, standing, tenant, why)
                        if unforeseen:
                            batches.close()
                            batches = self.batches(standing)
                    except Interrupted:
                        stopping = True
                    last = all(standing.over)
                    every = self.config.checkpoint.every or self.config.eval.every
                    if saved < standing.step and (stopping or last or standing.step % every == 0):
                        standing, pending = self.read(pending, standing, bar), None
                        self.flush()
                        save_checkpoint(self.checkpoints, state, standing)
                        saved = standing.step
                    if stopping:
                        self.end_early(standing)
                    if last:
                        self.flush()
                        by_first(lambda: finish_saving(self.checkpoints))
                        return
                    state, standing = self.admit(state, standing)
                    state, standing, pending = self.step(state, standing, batches, pending, compiled, bar)
                    require_saved(self.checkpoints)
            finally:
                batches.close()

    def admit(self, state: TenantsState, standing: Standing) -> tuple[TenantsState, Standing]:
        """Gives free slots to the tenants that wait."""
        slots = admitted(standing.slots, standing.over)
        for slot, (held, tenant) in enumerate(zip(standing.slots, slots, strict=True)):
            if held != tenant:
                fresh = self.fresh_adapter(self.tenants[tenant])
                state = put_tenant(state, jnp.int32(slot), fresh, config=self.config.train)
        return state, standing._replace(slots=slots)

    def fresh_adapter(self, tenant: Tenant) -> Adapter:
        made = init_adapter(self.config.adapter, self.model.config, seed=tenant.config.seed)
        if made.needs_statistics:
            seed = tenant.config.seed
            statistics = statistics_batches(tenant.data.examples, self.buckets[-1], self.layout.rows, seed)
            made = standardise(self.model, made, *statistics)
        return gathered(made)

    def batches(self, standing: Standing):
        """The batches of the steps to come, while no tenant ends before its last step."""
        shares = weights([len(t.data.examples) for t in self.tenants], self.config.train.sampling)
        ended = standing.over
        coming = Turns(
            [t.order for t in self.tenants], self.buckets, shares,
            groups=self.layout.together, rows=self.layout.rows, passes=self.layout.passes_of_tenant,
            steps=standing.steps, slots=standing.slots, ended=ended,
        )  # fmt: skip
        left = sum(t.order.total_steps - standing.steps[i] for i, t in enumerate(self.tenants) if not ended[i])
        return prefetch(coming.batch, 0, left)

    def step(
        self, state: TenantsState, standing: Standing, batches, pending: Pending | None, compiled: set[Bucket], bar
    ) -> tuple[TenantsState, Standing, Pending]:
        """Dispatches the next step, then logs the one before."""
        begun: float | None = time.monotonic()
        mixed: Mixed = next(batches)
        batch, slots = in_passes(mixed, self.layout)
        batch = jax.tree.map(rows_over, batch)
        waited, number = time.monotonic() - begun, standing.step + 1
        static = dict(completion=mixed.bucket.completion, config=self.config.train)
        given = batch, slots, self.settings(standing)
        self.profiler.before(number)
        with jax.profiler.StepTraceAnnotation("train", step_num=number):
            if mixed.bucket in compiled:
                state, values = tenants_step(state, self.model, *given, **static)
            else:
                compiled.add(mixed.bucket)
                standing, pending, begun = self.read(pending, standing, bar), None, None
                what = f"{self.layout.groups} tenants x {self.layout.rows} rows of {mixed.bucket.length} tokens"
                with devices.compiling(f"the training step for {what}"):
                    state, values = jax.block_until_ready(tenants_step(state, self.model, *given, **static))
        standing = self.read(pending, standing, bar)
        begun = None if self.profiler.on else begun
        self.profiler.after(number, values)
        for turn in mixed.turns:
            standing = standing.changed(turn.tenant, steps=turn.step + 1)
        done = Done(number, values, mixed.tokens, begun, waited)
        return state, standing._replace(step=number), Pending(done, mixed.turns)

    def settings(self, standing: Standing) -> Settings:
        """What each slot's tenant steps with."""
        held = [self.tenants[max(tenant, 0)] for tenant in standing.slots]
        totals = [tenant.order.total_steps for tenant in held]
        warmup = [warmup_steps(self.config.train, total) for total in totals]
        rates = np.array([tenant.config.train.learning_rate for tenant in held], np.float32)
        return Settings(*map(jnp.asarray, (rates, np.array(warmup, np.int32), np.array(totals, np.int32))))

    def read(self, pending: Pending | None, standing: Standing, bar: tqdm) -> Standing:
        """Waits for the values of a step and logs them; says which tenants' were not finite."""
        if pending is None:
            return standing
        done, turns = pending
        values = {name: np.asarray(value) for name, value in gathered(done.values).items()}
        tokens = np.array([values["tokens"][turn.slot] for turn in turns])
        losses = np.array([values["loss"][turn.slot] for turn in turns])
        stopped = standing.failed
        finite = np.array([bool(values["finite"][turn.slot]) and stopped[turn.tenant] is None for turn in turns])
        for turn, sound in zip(turns, finite, strict=True):
            if sound:
                self.write(turn.tenant, turn.step + 1, {
                    name: float(values[name][turn.slot]) for name in ("loss", "grad_norm", "learning_rate", "tokens")
                }, every=self.config.logging.every)  # fmt: skip
            elif standing.failed[turn.tenant] is None:
                standing = standing.changed(turn.tenant, failed=done.step)
                self.say_failed(turn, float(values["loss"][turn.slot]), float(values["grad_norm"][turn.slot]))
        mean = float((losses * tokens)[finite].sum() / max(1.0, tokens[finite].sum()))
        self.log.step(done, {"loss": mean, "tenants": len(turns), "tokens": float(tokens.sum())}, bar, len(turns))
        return standing

    def say_failed(self, turn: Turn, loss: float, grad_norm: float) -> None:
        tenant = self.tenants[turn.tenant]
        _, chosen = tenant.order.plan.batch_indices(turn.step)
        examples = places([tenant.data.places[i] for i in chosen])
        what = "new weights are not finite"
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            what = f"gradient's norm is {grad_norm}" if math.isfinite(loss) else f"loss is {loss}"
        devices.say(
            f"{tenant.name}: stopped at its step {turn.step + 1}: the {what} on {examples}; what it had learnt before "
            "is kept, and the others go on"
        )

    def write(self, tenant: int, step: int, values: dict[str, float], *, every: int = 1) -> None:
        """Adds values of a tenant's own step to its metrics.jsonl."""
        if is_first() and step % every == 0:
            self.rows[tenant].add(step, values)

    def flush(self) -> None:
        """Writes the rows that the logs keep back; see `Log.flush`."""
        self.log.flush()
        if is_first():
            with self.log.errors_named(), ThreadPoolExecutor(AT_ONCE) as pool:
                list(pool.map(Rows.flush, self.rows))

    def folder(self, tenant: int) -> Path:
        return expanded(self.tenants[tenant].config.output_dir)

    # ---------------------------------------------------------------------------------------------- scores and endings

    def due(self, standing: Standing) -> list[int]:
        """The tenants to evaluate after this step."""
        found = []
        for tenant in standing.resident:
            own, total = standing.steps[tenant], self.tenants[tenant].order.total_steps
            reached = own == total or (own > 0 and own % self.config.eval.every == 0)
            if reached and standing.evaluated[tenant] < own and standing.failed[tenant] is None:
                found.append(tenant)
        return found

    def leaving(self, standing: Standing) -> list[tuple[int, str]]:
        """The tenants that end after this step, and why."""
        patience, found = self.config.eval.patience, []
        for tenant in standing.resident:
            last = standing.steps[tenant] == self.tenants[tenant].order.total_steps
            failed = standing.failed[tenant]
            if failed is not None and (last or failed < standing.step):
                found.append((tenant, "not finite"))
            elif last:
                found.append((tenant, "done"))
            elif patience is not None and failed is None and standing.since_best[tenant] >= patience:
                found.append((tenant, "patience"))
        return found

    def evaluate(self, state: TenantsState, standing: Standing, due: list[int]) -> Standing:
        """Scores the tenants' adapters, and keeps each where it is its best so far."""
        with self.stop.interrupting():
            found = self.validation.scores(Stack(state.adapters), {tenant: standing.resident[tenant] for tenant in due})
        for tenant in due:
            own = standing.steps[tenant]
            standing = standing.changed(tenant, evaluated=own)
            if tenant not in found:
                continue
            score = found[tenant]
            if not math.isfinite(score.loss):
                name = self.tenants[tenant].name
                kept = "its best adapter is kept" if standing.best_score[tenant] is not None else "its last one is kept"
                devices.say(f"{name}: stopped at its step {own}: the validation loss is {score.loss}; {kept}")
                standing = standing.changed(tenant, failed=standing.step - 1)
                continue
            self.write(tenant, own, scores("validation", score))
            self.log.write(standing.step, {
                f"{self.tenants[tenant].name}/{name}": value for name, value in scores("validation", score).items()
            })  # fmt: skip
            best = standing.best_score[tenant]
            if best is not None and score.score <= best:
                standing = standing.changed(tenant, since_best=standing.since_best[tenant] + 1)
                continue
            self.keep(state, standing, tenant, score)
            standing = standing.changed(tenant, best_score=score.score, best_step=own, since_best=0)
        return standing

    def keep(self, state: TenantsState, standing: Standing, tenant: int, score: Score | None) -> None:
        """Writes a tenant's adapter as it is now into its folder."""
        adapter = gathered(tenant_of(state.adapters, jnp.int32(standing.resident[tenant])))
        steps = int(gathered(state.step)[standing.resident[tenant]])
        card = card_lines(self.tenants[tenant].config, steps, score)
        card.append(f"Trained in one run with {len(self.tenants) - 1} others.")
        to, source = self.folder(tenant) / "adapter", self.config.backbone.source
        by_first(lambda: save_adapter(adapter, to, base_model=source, model=self.model, card=card))

    def with_best(self, state: TenantsState, standing: Standing, tenant: int) -> TenantsState:
        """The state with a leaving tenant's best adapter in its slot, where its test scores it in the programs that
        scored validation. The given state is donated; a stop during the test saves the new one."""
        best, slot = standing.best_step[tenant], standing.resident[tenant]
        is_last = standing.best_score[tenant] is None or best == standing.steps[tenant]
        if is_last or not self.tenants[tenant].test:
            return state
        kept = kept_adapter(self.folder(tenant), self.model, tenant_of(state.adapters, jnp.int32(slot)))
        return put_adapter(state, jnp.int32(slot), kept)

    def finish(self, state: TenantsState, standing: Standing, tenant: int, why: str) -> Standing:
        """Ends a tenant, whose best adapter is in its slot: its adapter and its entry in tenants.json are written, and
        the slot is free."""
        own, slot = self.tenants[tenant], standing.resident[tenant]
        steps = int(gathered(state.step)[slot])
        if standing.best_score[tenant] is None:  # no validation data, or none scored: the last one is kept
            standing = standing.changed(tenant, best_step=steps)
            if steps > 0 or why != "not finite":
                self.keep(state, standing, tenant, None)
        test_after = None
        if own.test and by_first((self.folder(tenant) / "adapter").exists):
            with self.stop.interrupting():
                found = self.test.scores(Stack(state.adapters), {tenant: slot})[tenant]
            self.write(tenant, standing.steps[tenant], scores("test_after", found))
            test_after = found.score if math.isfinite(found.score) else None
        entry = {
            "examples": len(own.data.examples),
            "steps": steps,
            "best_step": standing.best_step[tenant],
            "best_score": standing.best_score[tenant],
            "metric": own.validation.metric if own.validation else own.test.metric if own.test else None,
            "test_before": standing.test_before[tenant],
            "test_after": test_after,
            "ended": why,
        }
        by_first(lambda: add_entry(self.log.folder, own.name, entry))
        ended = sum(standing.over) + 1
        best = standing.best_score[tenant]
        said = "" if best is None else f", best validation score {best:.4f} at step {standing.best_step[tenant]}"
        devices.say(f"{own.name}: {steps} steps{said} ({why}; {ended} of {len(self.tenants)} tenants have ended)")
        if is_first():
            with self.log.errors_named():
                self.rows[tenant].flush()
        slots = [-1 if held == tenant else held for held in standing.slots]
        return standing.changed(tenant, ended=why)._replace(slots=slots)

    def test_backbone(self, state: TenantsState, standing: Standing, asked: list[int]) -> Standing:
        """Scores the backbone alone on the test data of these tenants."""
        with self.stop.interrupting():
            found = self.test.scores(Stack(state.adapters), dict.fromkeys(asked, -1))
        for tenant, score in found.items():
            self.write(tenant, standing.steps[tenant], scores("test_before", score))
            standing = standing.changed(tenant, test_before=score.score)
        self.flush()
        return standing

    def running(self, standing: Standing, split: str, changed: list[str]) -> list[int]:
        """The tenants that have not ended and of whose data this split changed."""
        names = [tenant.name for tenant in self.tenants]
        return [
            i
            for i, name in enumerate(names)
            if standing.ended[i] is None and ({f"{split} data of {name}", "data"} & set(changed))
        ]

    def rescored(self, state: TenantsState, standing: Standing, asked: list[int]) -> Standing:
        """The standing where these tenants' validation data changed: the adapters that they kept are scored on the new
        ones, because scores of two data sets are never compared."""
        for tenant in asked:
            found = None
            if standing.best_score[tenant] is not None and self.tenants[tenant].validation:
                last = tenant_of(state.adapters, jnp.int32(standing.resident[tenant]))
                kept = Stack(jax.tree.map(lambda leaf: leaf[None], kept_adapter(self.folder(tenant), self.model, last)))
                with self.stop.interrupting():
                    score = self.validation.scores(kept, {tenant: 0})[tenant].score
                found = score if math.isfinite(score) else None
            standing = standing.changed(tenant, best_score=found, since_best=0)
        return standing

    def end_early(self, standing: Standing) -> NoReturn:
        self.flush()
        ended = f"{sum(standing.over)} of {len(self.tenants)} tenants ended"
        end_stopped(self.checkpoints, self.stop, self.log.folder, f"step {standing.step}, with {ended}")


def in_passes(mixed: Mixed, layout: Layout) -> tuple[Batch, np.ndarray]:
    """A step's batch [passes, rows, ...], and the slot of each group's tenant, int32 [passes, groups]. Different passes
    may hold different tenants."""
    rows = layout.groups * layout.rows
    batch = Batch(*(array.reshape(layout.passes, rows, *array.shape[2:]) for array in mixed.batch))
    return batch, mixed.slots.reshape(layout.passes, layout.groups)


class Pending(NamedTuple):
    """A step that is dispatched; its values may still be on their way."""

    done: Done
    turns: list[Turn]
