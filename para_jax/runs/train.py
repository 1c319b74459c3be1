"""train and train_tenants: a run from its config to a folder with the best adapters. The same command resumes.

output_dir/{config.yaml, metrics.jsonl, tensorboard/, checkpoints/<step>/, profile/}. A run of one adapter keeps it in
output_dir/adapter/ and its scores in scores.json. A run of many has tenants.json, and a folder for each tenant:
output_dir/NAME/{config.yaml, metrics.jsonl, adapter/}.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..adapters.adapter import Adapter
from ..adapters.methods import method_of
from ..backbone.content import digests_of_run
from ..backbone.load import load_backbone
from ..config import ModelConfig, RunConfig, config_dict
from ..data.given import with_data, with_tenants
from ..evaluation.score import describe_best
from ..io.error_frames import errors_forget
from ..io.messages import warn
from ..io.storage.bucket import Place
from ..runtime import devices
from ..runtime.processes import on_first_process, require_same
from ..runtime.sharding import place
from ..training.passes import batch_devices
from ..training.prompt_cache import PromptCache, cached_prompts
from ..training.scores_file import Records, write_scores
from ..training.step import TrainState, tenant_of
from .folder import claim_folders, locked_folder
from .loop import fit
from .notices import say_unscored
from .plan import SharedResources, plan_run
from .rates import is_auto, with_chosen_rates
from .report import sample_lines, score_table, tenants_table
from .scoring import kept_adapter
from .standing import Standing
from .tenants import Plan

#: Sections and fields that may differ between the hosts of a run. All hosts save a checkpoint at the same step.
OF_HOST = ("output_dir", "logging", "profiler", "runtime")


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
    """what went wrong without stopping the run (runs/notices.py)"""

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

    plan: Plan
    model: Any
    state: TrainState
    standing: Standing


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

    >>> rows = [{"prompt": "Hello", "completion": "w9 w10"}] * 16
    >>> config = load_config("own-data", ["eval.test=false", "train.max_steps=2", "output_dir=runs/rows"])
    >>> result = train(config, data=rows)
    >>> result.step
    2
    """
    require_function(config, "train")
    if data is not None:
        config = replace(config, data=with_data(config.data, data))
    plan, model, state, standing = trained(config)
    one, folder, validation = standing.tenants[0], plan.folder, plan.tenants[0].validation
    with jax.set_mesh(plan.mesh):
        best = tenant_of(state.adapters, jnp.int32(0))
        if one.best_step != standing.step:
            best = place(kept_adapter(folder, model, best), plan.mesh, model.config)
    metric, warning = validation.metric if validation else None, one.about.get("warning")
    return TrainResult(best, one.best_score, one.best_step, standing.step, folder, metric, one.scores, warning)


@errors_forget()
def train_tenants(config: RunConfig, data: Any = None) -> TenantsResult:
    """Trains the adapters of many tenants (data.tenants, or the combinations of `sweep`) in one run, or resumes
    it where it stopped.

    Args:
        data: instead of data.tenants, {name: the data of that tenant}, each as `train` takes it. For a sweep, which
            has one data set, as `train` takes it.

    Each tenant has its own loss, clipping, schedule, validation, best adapter and early stopping. One whose loss is not
    finite is stopped, and the others continue. SIGTERM and Ctrl-C save, and ValueErrors are raised, as in `train`.

    >>> config = load_config("smollm2-tenants", ["data.tenants=data/tenants", "train.max_steps=2", "output_dir=runs/t"])
    >>> sorted(train_tenants(config).tenants)
    ['acme', 'globex']
    """
    if data is not None:
        own = with_data(config.data, data) if config.sweep else with_tenants(config.data, data)
        config = replace(config, data=own)
    require_function(config, "train_tenants")
    plan, _, _, standing = trained(config)
    return TenantsResult({one.name: one.entry() for one in standing.tenants}, plan.folder)


def require_function(config: RunConfig, called: str) -> None:
    """Raises ValueError if this is not the function that runs a config."""
    meant = "compare_methods" if config.sweep.method else "train_tenants" if config.many else "train"
    if called != meant:
        raise ValueError(
            f"this config is not for {called}; use {meant}: train_tenants takes data.tenants or a sweep, "
            "compare_methods takes sweep.method"
        )


def trained(config: RunConfig, shared: SharedResources | None = None) -> Ended:
    """Runs a run to its end.

    Args:
        shared: what it shares with other runs of this process.
    """
    shared = shared or SharedResources()
    start(config)
    if config.train.cache_prompts != "off" and (count := jax.process_count()) > 1:
        raise ValueError(
            f"train.cache_prompts keeps the prompts of one process, and this run has {count}; set it to off"
        )
    plan = plan_run(config, shared)
    say_unscored(config, plan.tenants)
    with ExitStack() as held:
        on_first_process(lambda: held.enter_context(locked_folder(config)))
        on_first_process(lambda: claim_folders(plan.config, plan.tenants))
        model = shared_backbone(plan, shared)
        say_doubt(config, [tenant.config for tenant in plan.tenants], model.config)
        prompts = partial(prompts_of, plan, model, shared)
        if any(is_auto(tenant.config) for tenant in plan.tenants):
            plan = with_chosen_rates(plan, lambda trials: fit(trials, model, prompts, shared.digests, quiet=True))
            on_first_process(lambda: claim_folders(plan.config, plan.tenants))
        state, standing = fit(plan, model, prompts, shared.digests)
        if not config.many:
            on_first_process(lambda: write_scores(plan.folder, standing.tenants[0].scores))
        return Ended(plan, model, state, standing)


def start(config: RunConfig) -> None:
    """Joins the processes of a run. Raises ValueError on all of them if their configs differ."""
    devices.start(config.runtime)
    require_same("the config", lambda: {k: v for k, v in config_dict(config).items() if k not in OF_HOST})


def say_doubt(config: RunConfig, own: Sequence[RunConfig], model_config: ModelConfig) -> None:
    """Warns of a learning rate at which the method may learn little on the backbone. The lowest rate of a
    sweep counts, and the highest of the tenants. train.learning_rate=auto finds out by itself.

    Args:
        own: the configs of the tenants, or of the one run.
    """
    rates = [one.train.peak_learning_rate for one in own if not is_auto(one)]
    worst = min if config.sweep else max
    if rates and (said := method_of(config.adapter).doubt(config.adapter, model_config, worst(rates))):
        warn(said)


def shared_backbone(plan: Plan, shared: SharedResources):
    """The backbone on the plan's mesh, loaded once for all runs that share it."""
    mesh = plan.mesh
    if mesh not in shared.backbones:
        shared.backbones.clear()  # two at once may not fit
        shared.prompts.clear()
        shared.backbones[mesh] = load_backbone(**vars(plan.config.backbone), mesh=mesh, layout="stacked")
        with jax.set_mesh(mesh):
            shared.digests = {"backbone": shared.backbones[mesh].fingerprint or ""}
            shared.digests |= digests_of_run(shared.backbones[mesh])
    require_same("the backbone", lambda: shared.digests)
    return shared.backbones[mesh]


def prompts_of(plan: Plan, model, shared: SharedResources) -> PromptCache | None:
    """The states of the prompts that a run and its trials read, where the config asks to keep them."""
    train, layout, orders = plan.config.train, plan.layout, [tenant.order for tenant in plan.tenants]
    if train.cache_prompts == "off":
        return None
    rows = dict(step_rows=layout.passes * layout.pass_rows, rows=train.per_device_batch_size * batch_devices(plan.mesh))
    return cached_prompts(model, orders, plan.buckets, **rows, held=shared.prompts)
