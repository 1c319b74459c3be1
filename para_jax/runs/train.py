"""train and train_tenants: a run from its config to a folder with the best adapters. The same command resumes.

output_dir/{config.yaml, metrics.jsonl, tensorboard/, checkpoints/<step>/, profile/}. A run of one adapter keeps it in
output_dir/adapter/. A run of many has tenants.json, and a folder for each tenant: output_dir/NAME/{config.yaml,
metrics.jsonl, adapter/}.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .. import devices
from ..adapters.adapter import Adapter
from ..backbone.kernel_choice import describe_attention
from ..backbone.load import load_backbone
from ..config import RunConfig, config_dict, expanded, require
from ..data.example_arrays import digest
from ..evaluation.evaluate import Tasks, share_shapes
from ..evaluation.shapes import say_evaluation
from ..memory import run_mesh
from ..messages import say
from ..model import init_adapter
from ..processes import on_every_process, on_first_process, require_same
from ..roofline import peak_rate
from ..sharding import place, replicated_lines, tenant_axes, tenants_shardings
from ..storage.bucket import Place
from ..training.checkpoint import changed_data, describe_changes, open_checkpoints, restore_checkpoint
from ..training.log import Log
from ..training.metrics_file import Reached
from ..training.passes import Layout, lay_out
from ..training.profiler import Profiler
from ..training.step import TrainState, init_state, tenant_of
from ..training.stop import Interrupted, stop_signals
from ..training.tenants_file import read_entries
from .chosen import chosen_rates, is_auto, resolved
from .folder import FREE_FIELDS, claim_folders, locked_folder, mend_folders, run_digests
from .health import Health, logged_warning
from .logs import Logs, tenant_rows
from .loop import Loop
from .rates import FIRST, choose_rates, resolved_inputs
from .scoring import Scoring, kept_adapter
from .standing import Standing, fresh_standing, reopened, require_same_tenants
from .tenants import Inputs, Shared, read_inputs, require_validation, tenant_configs


class TrainResult(NamedTuple):
    adapter: Adapter
    """the best one by validation score; the last one where there is no validation data"""
    best_score: float | None
    best_step: int
    step: int
    output_dir: Place
    warning: str | None = None
    """what went wrong without stopping the run (runs/health.py)"""


class TenantsResult(NamedTuple):
    tenants: dict[str, dict[str, Any]]
    """by name: examples, steps, best_step, best_score, metric, ended, warning (None: nothing went wrong), test_before
    and test_after (None: not measured)"""
    output_dir: Path


class Ended(NamedTuple):
    """What a run leaves in memory."""

    model: Any
    mesh: Any
    state: TrainState
    standing: Standing


def train(config: RunConfig) -> TrainResult:
    """Trains the adapter of a run, or resumes it where it stopped.

    SIGTERM saves and raises Stopped, a SystemExit with code 0; Ctrl-C saves and raises KeyboardInterrupt.
    Raises ValueError, before anything is written, for data, a mesh or an output folder that do not fit the config, and
    for a folder that another run is writing.
    """
    require(not config.many, "data.tenants or sweep", config.output_dir, "a run of one adapter; use train_tenants")
    refuse_methods(config)
    model, mesh, state, standing = trained(config)
    folder = expanded(config.output_dir)
    with jax.set_mesh(mesh):
        best = tenant_of(state.adapters, jnp.int32(0))
        if standing.best_step[0] != standing.step:
            best = place(kept_adapter(folder, model, best), mesh, model.config)
    warning = on_first_process(lambda: logged_warning(resolved(config, chosen_rates(folder)), folder / "metrics.jsonl"))
    return TrainResult(best, standing.best_score[0], standing.best_step[0], standing.step, folder, warning)


def train_tenants(config: RunConfig) -> TenantsResult:
    """Trains the adapters of many tenants (data.tenants, or the combinations of `sweep`) in one run, or resumes
    it where it stopped.

    Each tenant has its own loss, clipping, schedule, validation, best adapter and early stopping. One whose loss is not
    finite is stopped, and the others continue. SIGTERM and Ctrl-C save, and ValueErrors are raised, as in `train`.
    """
    require(config.many, "data.tenants", None, "a folder of tenants, or `sweep`; `train` is for a run of one adapter")
    refuse_methods(config)
    standing, folder = trained(config).standing, expanded(config.output_dir)
    entries = on_first_process(lambda: read_entries(folder))
    return TenantsResult({name: entries[name] for name in standing.names}, folder)


def refuse_methods(config: RunConfig) -> None:
    if config.sweep.method:
        raise ValueError(f"sweep.method {list(config.sweep.method)} makes several runs; use compare_methods")


def trained(config: RunConfig, shared: Shared | None = None) -> Ended:
    """Runs a run to its end.

    Args:
        shared: what it shares with other runs of this process.
    """
    shared = shared or Shared()
    devices.start(config.runtime)
    require_same("the config", lambda: {k: v for k, v in config_dict(config).items() if k not in FREE_FIELDS})
    folder = expanded(config.output_dir)
    chosen = on_first_process(lambda: chosen_rates(folder)) if is_auto(config) else {}
    trials = is_auto(config) and not chosen
    config = resolved(config, chosen)
    count = on_every_process(lambda: len(tenant_configs(config)))
    mesh = run_mesh(config, count * (len(FIRST) if trials else 1))
    layout = on_every_process(lambda: lay_out(config, mesh, count))
    inputs = on_every_process(lambda: resolved_inputs(read_inputs(config, layout, shared), chosen))
    tenants = inputs.tenants
    require_same(
        "the data",
        lambda: [(t.name, *(p and digest(p.examples or []) for p in (t.data, t.validation, t.test))) for t in tenants],
    )
    on_first_process(lambda: require_validation(config, [tenant.validation for tenant in tenants]))
    with ExitStack() as held:
        on_first_process(lambda: held.enter_context(locked_folder(config)))
        on_first_process(lambda: claim_folders(config, tenants))
        if mesh not in shared.backbones:
            shared.backbones.clear()  # two at once may not fit
            shared.backbones[mesh] = load_backbone(**vars(config.backbone), mesh=mesh, layout="stacked")
        model = shared.backbones[mesh]
        require_same("the backbone", lambda: model.fingerprint)
        if trials:
            chosen = choose_rates(config, model, inputs, layout, mesh, partial(fit, quiet=True))
            config, inputs = resolved(config, chosen), resolved_inputs(inputs, chosen)
            on_first_process(lambda: claim_folders(config, inputs.tenants))
        return Ended(model, mesh, *fit(config, model, inputs, layout, mesh))


def fit(
    config: RunConfig, model, inputs: Inputs, layout: Layout, mesh, *, quiet: bool = False
) -> tuple[TrainState, Standing]:
    """The training loop, with a backbone that is loaded already. The folders must be claimed.

    Args:
        quiet: no warnings, because some trials may go wrong.
    """
    folder, (tokenizer, tenants, buckets) = expanded(config.output_dir), inputs
    for line in replicated_lines(model, mesh, model.config):
        say(line)
    say_attention(model, [bucket.length for bucket in buckets], mesh, packed=config.data.packing)
    with jax.set_mesh(mesh), open_checkpoints(folder / "checkpoints", keep=config.checkpoint.keep) as checkpoints:
        validation = Tasks(model, tokenizer, [t.validation for t in tenants], config.eval.limit)
        test = Tasks(model, tokenizer, [t.test for t in tenants])
        share_shapes(validation, test)
        run = run_digests(config, model.fingerprint, tenants)
        require_same("the data", lambda: run)  # also what the ids don't show, such as references
        state = empty_state(config, model, layout.slots, mesh)
        restored = restore_checkpoint(checkpoints, state, Standing, run, config.data.changed == "accept")
        state, standing = restored or (state, fresh_standing(tenants, layout, run))
        changed, standing = accepted_changes(standing, run)
        require_same_tenants(standing, tenants, layout)
        standing = reopened(standing, tenants, changed)
        log = open_log(config, model, mesh, standing if restored else None)
        on_first_process(lambda: mend_folders(config, standing, tenants, resumed=bool(restored)))
        profiler = Profiler(config.profiler, folder)
        with closing(log), closing(profiler), stop_signals() as stop:
            parts = {"validation": validation, "test": test}
            held = {name: list(tasks.encoded.values()) for name, tasks in parts.items() if tasks.encoded}
            say_evaluation(held, config.eval.batch_size)
            health = Health([tenant.name for tenant in tenants], [tenant.config for tenant in tenants], quiet=quiet)
            if restored:
                on_first_process(lambda: [health.read(i, t.folder / "metrics.jsonl") for i, t in enumerate(tenants)])
            logs = Logs(log, tenant_rows(tenants) if config.many else [], health)
            scoring = Scoring(config, model, tenants, validation, test, logs, stop)
            loop = Loop(config, model, tenants, buckets, layout, scoring, checkpoints, logs, profiler, stop)
            try:
                everyone = list(range(len(tenants)))
                standing = scoring.test_backbone(
                    state, standing, scoring.with_changed(standing, "test", changed) if restored else everyone
                )
                standing = scoring.rescored(state, standing, scoring.with_changed(standing, "validation", changed))
                return loop.run(state, standing)
            except Interrupted:
                loop.end_early(standing)


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
    """The parts of the data that changed since a checkpoint was written, which the config accepts. Also its standing
    as one of the new data."""
    changed = changed_data(standing.run, run)
    if changed:
        said = describe_changes(changed, standing.run or {}, run)
        say(f"data.changed=accept: the checkpoint of step {standing.step} is of {said}; the run resumes from it")
    return changed, standing._replace(run=run)


def open_log(config: RunConfig, model, mesh, standing: Standing | None) -> Log:
    """The run's log, without the rows that a run resumed from here writes again."""
    reached, ended = None, False
    if standing:
        evaluated = standing.step if config.many else standing.evaluated[0]
        reached, ended = Reached(standing.step, evaluated), all(standing.over)
    peak = peak_rate(model.config, mesh.devices.flatten())
    return Log(config, expanded(config.output_dir), reached, ended=ended, peak_rate=peak)


def say_attention(model, lengths: list[int], mesh, *, packed: bool) -> None:
    """Names the kernels of training, evaluation and decoding, and why they are used."""
    platform = mesh.devices.flat[0].platform
    say(describe_attention(model.config, model.dtype, platform, model.attention, lengths, packed=packed))
