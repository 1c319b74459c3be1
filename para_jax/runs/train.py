"""train and train_tenants: a run from its config to a folder with the best adapters. The same command resumes.

output_dir/{config.yaml, metrics.jsonl, tensorboard/, checkpoints/<step>/, profile/}. A run of one adapter keeps it in
output_dir/adapter/ and its scores in scores.json. A run of many has tenants.json, and a folder for each tenant:
output_dir/NAME/{config.yaml, metrics.jsonl, adapter/}.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..adapters.adapter import Adapter
from ..adapters.bank import weights_hash
from ..adapters.methods import method_of
from ..backbone.content import digests_of_run
from ..backbone.load import load_backbone, load_model_config
from ..config import ModelConfig, RunConfig, config_dict
from ..config.unused import unused_fields
from ..data.example_arrays import examples_digest
from ..data.given import with_data, with_tenants
from ..data.tenants import OWN_FILE, of_most_memory, own_values
from ..estimate.memory import run_mesh
from ..evaluation.score import describe_best
from ..io.checks import expanded, shorten
from ..io.error_frames import errors_forget
from ..io.messages import say, warn
from ..io.storage.bucket import Place
from ..io.untrusted import safe_names
from ..runtime import devices
from ..runtime.processes import on_every_process, on_first_process, require_same
from ..runtime.sharding import place
from ..training.passes import Layout, batch_devices, lay_out
from ..training.prompt_cache import PromptCache, cached_prompts
from ..training.scores_file import Records, write_scores
from ..training.step import TrainState, tenant_of
from ..training.stop import end_if_told
from ..training.tenants_file import read_entries
from .chosen import chosen_rates, is_auto, resolved
from .fit import fit
from .folder import HOST_FIELDS, check_folder, check_tenants, claim_folders, locked_folder
from .initial import check_initial
from .parts import Part, has_begun, parts_of_run, write_parts
from .rates import FIRST, as_trials, choose_rates, resolved_inputs
from .report import sample_lines, score_table, tenants_table
from .rows_per_step import say_rows, with_rows_before
from .scoring import kept_adapter
from .standing import Standing
from .tenants import Inputs, SharedResources, read_inputs, require_validation, tenant_configs, with_length
from .unscored import say_unscored


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

    def __repr__(self) -> str:
        return "\n\n".join(filter(None, (f"{self.output_dir}: {self.best}", self.report())))

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

    def __repr__(self) -> str:
        return f"{self.output_dir}\n{self.report()}"

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


@errors_forget()
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
    return TrainResult(best, *of_best, standing.step, folder, metric, records, standing.entry(0).get("warning"))


@errors_forget()
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
        raise ValueError(f"config is {shorten(config)}; give a RunConfig, such as load_config('own-data')")


def refuse_methods(config: RunConfig) -> None:
    if config.sweep.method:
        raise ValueError(f"sweep.method {list(config.sweep.method)} makes several runs; use compare_methods")


def trained(config: RunConfig, shared: SharedResources | None = None) -> Ended:
    """Runs a run to its end.

    Args:
        shared: what it shares with other runs of this process.
    """
    shared = shared or SharedResources()
    start(config)
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
    written = {metric for task in tasks if task.writes for metric in task.also}
    for line in unused_fields(config, written | {task.metric for task in tasks}):
        warn(line)
    say_unscored(config, tenants)
    with ExitStack() as held:
        on_first_process(lambda: held.enter_context(locked_folder(config)))
        if parts_of_run(config, list(own)) != parts:  # another process has added tenants since
            raise ValueError(f"output_dir {config.output_dir} has changed meanwhile\nstart the command again")
        on_first_process(lambda: write_parts(parts))
        on_first_process(lambda: claim_folders(config, tenants))
        model = shared_backbone(config, mesh, shared)
        say_doubt(config, [one for name, one in own.items() if name not in chosen], model.config)
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
        end_if_told()
        return Ended(model, mesh, list(own), state, standing, metric)


def say_doubt(config: RunConfig, own: list[RunConfig], model_config: ModelConfig) -> None:
    """Warns of a learning rate at which the method may learn little on the backbone. The lowest rate of a
    sweep counts, and the highest of the tenants. train.learning_rate=auto finds out by itself.

    Args:
        own: the configs of the tenants, or of the one run. Rates that trials have chosen are left out.
    """
    rates = [one.train.peak_learning_rate for one in own if not is_auto(one)]
    worst = min if config.sweep else max
    said = method_of(config.adapter).doubt(config.adapter, model_config, worst(rates)) if rates else None
    if said:
        warn(said)


def start(config: RunConfig) -> None:
    """Joins the processes of a run. Raises ValueError on all of them if their configs differ."""
    devices.start(config.runtime)
    require_same("the config", lambda: {k: v for k, v in config_dict(config).items() if k not in HOST_FIELDS})


def known_run(config: RunConfig) -> tuple[RunConfig, dict[str, RunConfig], list[Part], dict[str, float]]:
    """The config of the run, those of its tenants, its parts, and the rates that trials have chosen before, which take
    the place of `auto` in the configs. Raises ValueError for an output folder that holds another run."""
    on_first_process(lambda: check_folder(config))
    own = on_every_process(lambda: tenant_configs(config))
    require_same("the list of tenants", lambda: list(own))
    parts = parts_of_run(config, list(own))
    by_part = on_first_process(lambda: [chosen_rates(part.folder) for part in parts])
    chosen = {name: rate for rates in by_part for name, rate in rates.items()}
    config, own = resolved(config, chosen), {name: resolved(one, chosen, name) for name, one in own.items()}
    on_first_process(lambda: check_tenants(config, own))
    return config, own, parts, chosen


def kept_as_reported(folder: Place, model, last: Adapter, standing: Standing) -> Adapter:
    """The adapter in a run's folder. Raises ValueError if it is missing, or if the reported scores are another one's.

    Args:
        last: the one after the last step, for its shapes.
    """
    there, known = on_first_process((folder / "adapter").exists), standing.kept[standing.names[0]]
    kept = kept_adapter(folder, model, last) if there else None
    if kept is None or weights_hash(kept) != known:
        raise ValueError(
            f"{folder / 'adapter'} is not the adapter of step {standing.best_step[0]} that this run kept; restore it "
            "from a copy, or train into another output_dir"
        )
    return kept


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

    def inputs_of(part: Part, layout: Layout) -> Inputs:
        names = part.names if len(parts) > 1 else None
        return resolved_inputs(read_inputs(config, layout, names, shared=shared), chosen)

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
    return cached_prompts(model, orders, inputs.buckets, **rows, held=shared.prompts)
