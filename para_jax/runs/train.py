"""train and train_tenants: a run from its config to a folder with the best adapters. The same command resumes.

output_dir/{config.yaml, metrics.jsonl, tensorboard/, checkpoints/<step>/, profile/}. A run of one adapter keeps it in
output_dir/adapter/ and its scores in scores.json. A run of many has tenants.json, and a folder for each tenant:
output_dir/NAME/{config.yaml, metrics.jsonl, adapter/}.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import devices
from ..adapters.adapter import Adapter
from ..adapters.bank import weights_hash
from ..backbone.content import digests_of_run
from ..backbone.kernel_choice import describe_attention
from ..backbone.load import load_backbone, load_model_config
from ..config import ModelConfig, RunConfig, config_dict, expanded, require, shorten
from ..config.unused import unused_fields
from ..data.example_arrays import examples_digest
from ..data.given import with_data, with_tenants
from ..data.schedule import admitted
from ..data.tenants import OWN_FILE
from ..evaluation.evaluate import Tasks, share_shapes
from ..evaluation.score import describe_best
from ..evaluation.shapes import say_evaluation
from ..memory import run_mesh
from ..messages import say, warn
from ..model import init_adapter
from ..processes import on_every_process, on_first_process, require_same
from ..roofline import peak_rate
from ..sharding import place, replicated_lines, tenant_axes, tenants_shardings
from ..storage.bucket import Place
from ..training.checkpoint import changed_data, describe_changes, open_checkpoints, restore_checkpoint
from ..training.log import Log
from ..training.metrics_file import Reached
from ..training.passes import Layout, batch_devices, lay_out
from ..training.profiler import Profiler
from ..training.prompt_cache import PromptCache, cached_prompts
from ..training.scores_file import Records, write_scores
from ..training.step import TrainState, init_state, tenant_of
from ..training.stop import Interrupted, end_if_told, stop_signals
from ..training.tenants_file import read_entries
from ..untrusted import safe_names
from .chosen import chosen_rates, is_auto, resolved
from .folder import (
    HOST_FIELDS,
    began_before,
    check_folder,
    check_tenants,
    claim_folders,
    locked_folder,
    mend_folders,
    rows_before,
    run_digests,
)
from .health import Health
from .initial import check_initial, require_same_start, starts_of
from .logs import Logs, tenant_rows
from .loop import Loop
from .parts import Part, has_begun, parts_of_run, write_parts
from .rates import FIRST, as_trials, choose_rates, resolved_inputs
from .report import sample_lines, score_table, tenants_table
from .scoring import Scoring, kept_adapter
from .standing import Standing, fresh_standing, reopened, require_same_tenants
from .tenant_file import of_most_memory, own_values
from .tenants import Inputs, SharedResources, Tenant, read_inputs, require_validation, tenant_configs, with_length


class TrainResult(NamedTuple):
    """What `train` gives back: the adapter, its score, and where the run folder is."""

    adapter: Adapter
    """the best one by validation score; the last one where there is no validation data"""
    best_score: float | None
    best_step: int
    step: int
    output_dir: Place
    metric: str | None = None
    """what best_score is; for "loss" it is the negated loss, so that higher is better"""
    scores: Records = {}
    """of base model and adapter, as training/scores_file.py describes them"""
    warning: str | None = None
    """what went wrong without stopping the run (runs/health.py)"""

    @property
    def best(self) -> str:
        """ "best validation accuracy 0.5833 at step 60", or "no validation data"."""
        return describe_best(self.metric, self.best_score, self.best_step)

    def report(self) -> str:
        """Base model and adapter side by side, and some answers of both; empty if nothing was scored."""
        return "\n\n".join(filter(None, (score_table(self.scores), sample_lines(self.scores))))


class TenantsResult(NamedTuple):
    """What `train_tenants` gives back. The adapters are in output_dir/NAME/adapter."""

    tenants: dict[str, dict[str, Any]]
    """by name: examples, steps, best_step, best_score, metric, ended, warning (None: nothing went wrong), test_before
    and test_after (None: not measured), and scores, as training/scores_file.py describes them"""
    output_dir: Place

    def report(self) -> str:
        """A table with a line for each tenant: base model and adapter side by side."""
        return tenants_table(self.tenants)


class Ended(NamedTuple):
    """What a run leaves in memory."""

    model: Any
    mesh: Any
    names: list[str]
    """of the tenants, in their order"""
    state: TrainState
    """of the part that was trained last"""
    standing: Standing
    metric: str | None
    """of the validation data, in a run of one adapter"""


def train(config: RunConfig, data: Any = None) -> TrainResult:
    """Trains the adapter of a run, or resumes it where it stopped.

    Args:
        data: the rows, instead of data.train: a list of dicts, a pandas or polars DataFrame, a datasets.Dataset, or a
            dict of these by split, {"train": ..., "validation": ..., "test": ...} (also a datasets.DatasetDict). Each
            row has `prompt` and `completion` (texts or chat messages) or `messages`, and perhaps `references` (a list
            of texts) and `label`; or any columns, with data.prompt and data.completion as templates. NaN and None are
            missing values. Rows without splits are training data; validation data may then be named in the config.
            To resume, give the same rows again: a checkpoint identifies them by their content.

    SIGTERM saves and raises Stopped, a SystemExit with code 0 or runtime.stopped_exit_code; Ctrl-C saves and raises
    KeyboardInterrupt.
    Raises ValueError, before anything is written, for data, a mesh or an output folder that do not fit the config, and
    for a folder that another run is writing.
    """
    require_config(config)
    if config.many:
        raise ValueError("this config trains many adapters (data.tenants, or a sweep); use train_tenants, not train")
    refuse_methods(config)
    if data is not None:
        config = replace(config, data=with_data(config.data, data))
    model, mesh, _, state, standing, metric = trained(config)
    folder, records = expanded(config.output_dir), standing.records(0)
    with jax.set_mesh(mesh):
        last = tenant_of(state.adapters, jnp.int32(0))
        kept = kept_as_reported(folder, model, last, standing)
        best = last if standing.best_step[0] == standing.step else place(kept, mesh, model.config)
    of_best = standing.best_score[0], standing.best_step[0]
    return TrainResult(best, *of_best, standing.step, folder, metric, records, standing.warning)


def train_tenants(config: RunConfig, data: Any = None) -> TenantsResult:
    """Trains the adapters of many tenants (data.tenants, or the combinations of `sweep`) in one run, or resumes
    it where it stopped.

    Args:
        data: instead of data.tenants, {name: the data of that tenant}, each as `train` takes it. For a sweep, which
            has one data set, as `train` takes it.

    Each tenant has its own loss, clipping, schedule, validation, best adapter and early stopping. One whose loss is not
    finite is stopped, and the others continue. SIGTERM and Ctrl-C save, and ValueErrors are raised, as in `train`.
    """
    require_config(config)
    if data is not None:
        own = with_data(config.data, data) if config.sweep else with_tenants(config.data, data)
        config = replace(config, data=own)
    if not config.many:
        raise ValueError("train_tenants needs data.tenants or a sweep; `train` is for a run of one adapter")
    refuse_methods(config)
    names, folder = trained(config).names, expanded(config.output_dir)
    entries = on_first_process(lambda: read_entries(folder))
    return TenantsResult({name: entries[name] for name in names}, folder)


def require_config(config: Any) -> None:
    """Raises ValueError for anything but a RunConfig."""
    if not isinstance(config, RunConfig):
        raise ValueError(f"config is {shorten(config)}; give a RunConfig, such as load_config('configs/own-data.yaml')")


def refuse_methods(config: RunConfig) -> None:
    if config.sweep.method:
        raise ValueError(f"sweep.method {list(config.sweep.method)} makes several runs; use compare_methods")


def trained(config: RunConfig, shared: SharedResources | None = None) -> Ended:
    """Runs a run to its end.

    Args:
        shared: what it shares with other runs of this process.
    """
    shared = shared or SharedResources()
    devices.start(config.runtime)
    require_same("the config", lambda: {k: v for k, v in config_dict(config).items() if k not in HOST_FIELDS})
    if config.train.cache_prompts != "off" and (count := jax.process_count()) > 1:
        raise ValueError(
            f"train.cache_prompts={config.train.cache_prompts} keeps the prompts of one process, and this run has "
            f"{count}; use train.cache_prompts=off"
        )
    config, own, parts, chosen = known_run(config)
    kept = with_rows_before(config, shared.rows)
    mesh = mesh_of_run(kept, list(own.values()), parts)
    if kept is not config and (rows := kept.train.batch_size):
        say_rows(rows, lay_out(config, mesh).tenant_rows, batch_devices(mesh))
    layouts = on_every_process(lambda: [lay_out(kept, mesh, len(part.names)) for part in parts])
    shared.rows = shared.rows or (None if config.data.tenants else layouts[0].tenant_rows)
    inputs = read_parts(config, parts, layouts, chosen, shared)
    tenants = [tenant for of_part in inputs for tenant in of_part.tenants]
    tasks = [task for tenant in tenants for task in (tenant.validation, tenant.test) if task]
    for line in unused_fields(config, {task.metric for task in tasks}):
        warn(line)
    if not any(tenant.validation or tenant.test for tenant in tenants):
        few = "data.validation_split holds out none of so few rows" if config.data.validation_split else ""
        say(f"no validation data, so nothing is scored: {few or 'set data.validation_split=0.1, or data.validation'}")
    if config.eval.test and not any(tenant.test for tenant in tenants):
        say("eval.test=true scores nothing: there is no test data (data.test, or test.jsonl next to train.jsonl)")
    with ExitStack() as held:
        on_first_process(lambda: held.enter_context(locked_folder(config)))
        if parts_of_run(config, list(own)) != parts:  # another process has added tenants since
            raise ValueError(f"output_dir {config.output_dir} has changed meanwhile\nstart the command again")
        on_first_process(lambda: write_parts(parts))
        on_first_process(lambda: claim_folders(config, tenants))
        model = shared_backbone(config, mesh, shared)
        for part, of_part, layout in zip(parts, inputs, layouts, strict=True):
            if part is not parts[0]:
                end_if_told()
            if part is parts[-1] and len(parts) > 1:
                say(f"added to the run after it had begun: {safe_names(part.names)}")
            state, standing = train_part(config, model, of_part, layout, mesh, part, shared)
        records = {} if config.many else standing.records(0)
        if records:
            on_first_process(lambda: write_scores(expanded(config.output_dir), records))
        metric = tenants[0].validation.metric if not config.many and tenants[0].validation else None
        return Ended(model, mesh, list(own), state, standing, metric)


def known_run(config: RunConfig) -> tuple[RunConfig, dict[str, RunConfig], list[Part], dict[str, float]]:
    """The config of the run, those of its tenants, its parts, and the rates that trials have chosen before, which take
    the place of `auto` in the configs. Raises ValueError for an output folder that holds another run."""
    on_first_process(lambda: check_folder(config))
    own = on_every_process(lambda: tenant_configs(config))
    parts = parts_of_run(config, list(own))
    by_part = on_first_process(lambda: [chosen_rates(part.folder) for part in parts])
    chosen = {name: rate for rates in by_part for name, rate in rates.items()}
    config, own = resolved(config, chosen), {name: resolved(one, chosen, name) for name, one in own.items()}
    on_first_process(lambda: check_tenants(config, own))
    return config, own, parts, chosen


def with_rows_before(config: RunConfig, otherwise: int | None = None) -> RunConfig:
    """The config of a run of one adapter, or of a sweep, with its rows per step so far as train.batch_size, if it
    leaves that open. They then stay the same on other devices, and so do the batches and the number of steps. The rows
    of a tenant do not depend on the devices.

    Args:
        otherwise: rows per step of a run that has not begun. None: the devices decide.
    """
    if config.data.tenants or config.train.batch_size is not None or (config.many and config.train.rows_per_tenant):
        return config
    rows = on_first_process(lambda: rows_before(config) or otherwise)
    if rows is None:
        return config
    return replace(config, train=replace(config.train, batch_size=rows, gradient_accumulation_steps=1))


def require_same_rows(config: RunConfig, layout: Layout) -> None:
    """Raises ValueError if this start took its rows per step from a checkpoint that turned out to be damaged."""
    kept = with_rows_before(config)
    if kept is not config and kept.train.batch_size != layout.tenant_rows:
        raise ValueError(
            f"the rows of a step ({layout.tenant_rows}) are those of a damaged checkpoint, which is set aside now; "
            f"before, they were {kept.train.batch_size}\nstart the command again"
        )


def kept_as_reported(folder: Place, model, last: Adapter, standing: Standing) -> Adapter:
    """The adapter in a run's folder. Raises ValueError if it is missing, or if the reported scores are another one's.

    Args:
        last: the one after the last step, for its shapes.
    """
    there, known = on_first_process((folder / "adapter").exists), (standing.kept or {}).get(standing.names[0])
    kept = kept_adapter(folder, model, last) if there else None
    if kept is None or (known is not None and weights_hash(kept) != known):
        raise ValueError(
            f"{folder / 'adapter'} is not the adapter of step {standing.best_step[0]} that this run kept; restore it "
            "from a copy, or train into another output_dir"
        )
    return kept


def say_rows(kept: int, of_devices: int, devices: int) -> None:
    """Says that a step keeps its number of rows, although these devices would give it another one. Raises ValueError
    if they can't."""
    expected = f"a divisor of {kept}, the rows of a step of this run so far"
    require(kept % devices == 0, "the number of devices (mesh.data x mesh.fsdp)", devices, expected)
    if kept != of_devices:
        say(f"a step keeps the {kept} rows that it had on other devices (train.batch_size)")


def mesh_of_run(config: RunConfig, own: list[RunConfig], parts: list[Part]):
    """The mesh on which every part fits by its estimate, with the trials of its learning rates if there are any."""
    estimated = of_most_memory(config, own)
    if config.data.max_seq_length is None and jax.device_count() > 1:  # one device needs no estimate
        estimated = on_every_process(lambda: with_length(estimated))
    trials = len(FIRST) if any(map(is_auto, own)) else 1
    if trials > 1 and not config.many:
        estimated = as_trials(estimated)
    return run_mesh(estimated, max(len(part.names) for part in parts) * trials)


def read_parts(
    config: RunConfig, parts: list[Part], layouts: list[Layout], chosen: dict[str, float], shared: SharedResources
) -> list[Inputs]:
    """The inputs of each part. Raises ValueError where the data or a tenant.yaml of two hosts differ."""
    before = on_first_process(lambda: began_before(config))

    def inputs_of(part: Part, layout: Layout) -> Inputs:
        names = part.names if len(parts) > 1 else None
        return resolved_inputs(read_inputs(config, layout, names, before=before, shared=shared), chosen)

    inputs = on_every_process(lambda: [inputs_of(*one) for one in zip(parts, layouts, strict=True)])
    tenants = [tenant for of_part in inputs for tenant in of_part.tenants]
    require_same(
        "the data",
        lambda: [
            (t.name, *(p and examples_digest(p.examples or []) for p in (t.data, t.validation, t.test)))
            for t in tenants
        ],
    )
    require_same(f"a tenant's {OWN_FILE}", lambda: [own_values(tenant.config) for tenant in tenants])
    on_first_process(lambda: require_validation(config, [tenant.validation for tenant in tenants]))

    def check_start() -> None:
        new = [of_part for of_part, part in zip(inputs, parts, strict=True) if not has_begun(part.folder)]
        starting = [tenant.config for of_part in new for tenant in of_part.tenants]
        check_initial(starting, load_model_config(config.backbone.source))

    on_first_process(check_start)
    return inputs


def shared_backbone(config: RunConfig, mesh, shared: SharedResources):
    """The backbone on this mesh, loaded once for all runs that share it."""
    if mesh not in shared.backbones:
        shared.backbones.clear()  # two at once may not fit
        shared.prompts.clear()
        shared.backbones[mesh] = load_backbone(**vars(config.backbone), mesh=mesh, layout="stacked")
        with jax.set_mesh(mesh):
            shared.digests = digests_of_run(shared.backbones[mesh])
    model = shared.backbones[mesh]
    require_same("the backbone", lambda: [model.fingerprint, shared.digests])
    return model


def train_part(
    config: RunConfig, model, inputs: Inputs, layout: Layout, mesh, part: Part, shared: SharedResources
) -> tuple[TrainState, Standing]:
    """Trains a part's tenants, after the trials of those whose learning rate is still to be chosen."""
    prompts = partial(prompts_of, config, model, inputs, layout, mesh, shared)
    backbone = shared.digests
    if any(is_auto(tenant.config) for tenant in inputs.tenants):
        chosen = choose_rates(
            config,
            model,
            inputs,
            layout,
            mesh,
            partial(fit, prompts=prompts, backbone=backbone, quiet=True),
            part.folder,
        )
        config, inputs = resolved(config, chosen), resolved_inputs(inputs, chosen)
        on_first_process(lambda: claim_folders(config, inputs.tenants))
    return fit(config, model, inputs, layout, mesh, part, prompts, backbone)


def prompts_of(
    config: RunConfig, model, inputs: Inputs, layout: Layout, mesh, shared: SharedResources
) -> PromptCache | None:
    """The states of the prompts that a run and its trials read, where the config asks to keep them."""
    train, orders = config.train, [tenant.order for tenant in inputs.tenants]
    if train.cache_prompts == "off":
        return None
    rows = dict(step_rows=layout.passes * layout.pass_rows, rows=train.per_device_batch_size * batch_devices(mesh))
    given = train.cache_prompts, model, config.adapter, orders, inputs.buckets
    return cached_prompts(*given, **rows, held=shared.prompts)


def fit(
    config: RunConfig,
    model,
    inputs: Inputs,
    layout: Layout,
    mesh,
    part: Part,
    prompts: Callable[[], PromptCache | None],
    backbone: dict[str, str],
    *,
    quiet: bool = False,
) -> tuple[TrainState, Standing]:
    """The training loop of one part, with a backbone that is loaded already. The folders must be claimed.

    Args:
        prompts: computes the states of train.cache_prompts. It is called once a step is to be done.
        backbone: what a checkpoint keeps of it.
        quiet: no warnings and no scores of the base model: these are trials, and some may go wrong.
    """
    folder, (tokenizer, tenants, buckets) = part.folder, inputs
    for line in replicated_lines(model, mesh, model.config):
        say(line)
    say_attention(model, [bucket.length for bucket in buckets], mesh, packed=config.data.packing)
    with jax.set_mesh(mesh), open_checkpoints(folder / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        validation, test = tasks_of(model, tokenizer, tenants)
        run = run_digests(config, model.fingerprint, tenants)
        require_same("the data", lambda: run)  # also what the ids don't show, such as references
        run |= backbone
        state = empty_state(config, model, layout.slots, mesh)
        restored = restore_checkpoint(checkpoints, state, Standing, run, config.data.changed == "accept")
        state, standing = restored or (state, fresh_standing(tenants, layout, run))
        changed, standing = accepted_changes(standing, run)
        require_same_tenants(standing, tenants, layout)
        standing = reopened(standing, tenants, changed)._replace(rows=layout.tenant_rows)
        standing = with_starts(standing, tenants, model.config)
        if restored:
            say(describe_position(standing, tenants))
        log = open_log(config, folder, model, mesh, standing if restored else None)
        where = dict(log=folder / "metrics.jsonl", resumed=bool(restored), others=not part.alone)
        on_first_process(lambda: mend_folders(config, standing, tenants, **where))
        profiler = Profiler(config.profiler, folder)
        signals = stop_signals(config.runtime.distributed == "given", config.runtime.stopped_exit_code)
        with closing(log), closing(profiler), signals as stop:
            encoded = {tasks.split: list(tasks.encoded.values()) for tasks in (validation, test) if tasks.encoded}
            say_evaluation(encoded, config.eval.batch_size)
            health = Health([tenant.name for tenant in tenants], [tenant.config for tenant in tenants], quiet=quiet)
            if restored and not quiet:
                require_same_rows(config, layout)
            if restored:
                on_first_process(lambda: [health.read(i, t.folder / "metrics.jsonl") for i, t in enumerate(tenants)])
            logs = Logs(log, tenant_rows(tenants) if config.many else [], health)
            scoring = Scoring(config, model, tenants, validation, test, logs, stop)
            loop = Loop(config, model, tenants, buckets, layout, scoring, checkpoints, logs, profiler, stop)
            try:
                if not quiet:
                    standing = with_base_scores(scoring, state, standing, changed if restored else None)
                standing = scoring.without_removed(standing, changed)
                standing = scoring.with_kept_best(state, standing) if restored else standing
                standing = scoring.rescored(state, standing, scoring.with_changed(standing, "validation", changed))
                if restored and standing.scores is not None:  # an earlier version had none
                    for i in range(len(tenants)):
                        health.compare_with(i, standing.records(i))
                if not all(standing.over):
                    with stop.interrupting():
                        loop = loop._replace(prompts=prompts())
                return loop.run(state, standing)
            except Interrupted:
                loop.end_early(standing)


def with_base_scores(scoring: Scoring, state: TrainState, standing: Standing, changed: list[str] | None) -> Standing:
    """The standing with the base model's scores on test and validation data.

    Args:
        changed: the parts of the data that changed before a resume, which alone are scored again; None: a new run.
    """
    for split in ("test", "validation"):
        everyone = list(range(len(scoring.tenants)))
        asked = everyone if changed is None else scoring.with_changed(standing, split, changed)
        if not scoring.config.eval.base:  # but a score of other data is replaced
            asked = [tenant for tenant in asked if standing.has_base(tenant, split)]
        standing = scoring.score_backbone(state, standing, split, asked)
    return standing


def tasks_of(model, tokenizer, tenants: Sequence[Tenant]) -> tuple[Tasks, Tasks]:
    """The validation and the test tasks of the tenants, in shapes that both share."""
    limits = [tenant.config.eval.limit for tenant in tenants]
    validation = Tasks(model, tokenizer, [t.validation for t in tenants], limits, "validation")
    limits = [tenant.config.eval.test_limit for tenant in tenants]
    test = Tasks(model, tokenizer, [t.test for t in tenants], limits, "test")
    share_shapes(validation, test)
    return validation, test


def empty_state(config: RunConfig, model, slots: int, mesh) -> TrainState:
    """A stack of zeros, for tenants to be put into, laid out over the current mesh."""
    shapes = jax.eval_shape(lambda: init_adapter(config.adapter, model.config))

    def fresh():
        stack = jax.tree.map(lambda leaf: jnp.zeros((slots, *leaf.shape), leaf.dtype), shapes)
        return init_state(stack, config.train)

    used = math.prod(mesh.shape[axis] for axis in tenant_axes(slots, mesh.shape))
    if used < mesh.size and slots > 1:
        where = f"are spread over {used} of the" if used > 1 else "are complete on each of the"
        say(
            f"the weights of {slots} tenants {where} {mesh.size} devices, which do not divide them; with a multiple of "
            f"{mesh.size} as train.tenants_at_once they take the least memory"
        )
    shardings = tenants_shardings(jax.eval_shape(fresh), mesh, model.config)
    # A constraint, not out_shardings: then a restored state has the very layouts that a step gives, and one program.
    return jax.jit(lambda: jax.lax.with_sharding_constraint(fresh(), shardings))()


def accepted_changes(standing: Standing, run: dict[str, str]) -> tuple[list[str], Standing]:
    """The parts of the data that changed since a checkpoint was written, which the config accepts. Also returns its
    standing, now as one of the new data."""
    changed = changed_data(standing.run, run)
    if changed:
        said = describe_changes(changed, standing.run or {}, run)
        say(f"data.changed=accept: the checkpoint of step {standing.step} is of {said}; the run resumes from it")
    return changed, standing._replace(run=run)


def with_starts(standing: Standing, tenants: Sequence[Tenant], model_config: ModelConfig) -> Standing:
    """The standing with what the tenants that wait for a slot will start from (train.init_from). Raises ValueError if
    that changed since the run began."""
    slots = admitted(standing.slots, standing.over)
    begun = [i in slots or standing.over[i] or standing.steps[i] > 0 for i in range(len(tenants))]
    waiting = {one.name: one.config for one, has in zip(tenants, begun, strict=True) if not has}
    waiting = {name: own for name, own in waiting.items() if own.train.init_from}
    starts = on_first_process(lambda: starts_of(waiting, model_config))
    for name, own in waiting.items():
        require_same_start(name, own, standing.starts, starts[name])
    return standing._replace(starts=(standing.starts or {}) | starts)


def describe_position(standing: Standing, tenants: Sequence[Tenant]) -> str:
    """Where a run resumes."""
    if all(standing.over):
        return f"nothing is left to train after step {standing.step}"
    if not tenants[0].name:
        return f"resuming at step {standing.step} of {tenants[0].order.total_steps}"
    return f"resuming at step {standing.step}, with {sum(standing.over)} of {len(tenants)} tenants ended"


def open_log(config: RunConfig, folder: Place, model, mesh, standing: Standing | None) -> Log:
    """The log in a part's folder, without the rows that a run resumed from here writes again."""
    reached, ended = None, False
    if standing:
        evaluated = standing.step if config.many else standing.evaluated[0]
        reached, ended = Reached(standing.step, evaluated), all(standing.over)
    cached = config.train.cache_prompts != "off"  # then a step doesn't compute its prompts' tokens
    peak = None if cached else peak_rate(model.config, mesh.devices.flatten())
    return Log(config, folder, reached, ended=ended, peak_rate=peak)


def say_attention(model, lengths: list[int], mesh, *, packed: bool) -> None:
    """Names the kernels of training, evaluation and decoding, and why they are used."""
    platform = mesh.devices.flat[0].platform
    say(describe_attention(model.config, model.dtype, platform, model.attention, lengths, packed=packed))
