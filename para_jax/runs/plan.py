"""plan_run: from a config to what a run trains, on which devices, before the backbone is loaded.

What the config leaves open is decided once: the rows of a step, the metric, the length of answers and of sequences. The
first start writes it to output_dir/config.yaml, and later starts read it there (runs/folder.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from ..adapters.scope import invocation_tokens, require_invocation
from ..backbone.load import load_model_config
from ..config import ModelConfig, RunConfig
from ..data.example_arrays import examples_digest
from ..data.records import split_records
from ..data.schedule import TenantOrder
from ..data.tenants import of_most_memory, own_values
from ..data.tokenizer import run_tokenizer
from ..data.training_data import TrainingData, chosen_length, load_training_data
from ..estimate.memory import run_mesh
from ..evaluation.defaults import scoring_rule
from ..evaluation.metrics import LABEL_METRICS
from ..evaluation.tasks import task_of_run, with_limit
from ..io.hub import resolve_backbone
from ..io.messages import say
from ..runtime.processes import on_every_process, on_first_process, require_same
from ..training.passes import Layout, lay_out
from ..training.prompt_cache import PromptCache
from .folder import at_once, check_folder, check_tenants, decided, with_decided
from .initial import initial_adapter
from .notices import say_data
from .rates import FIRST, as_trials, is_auto
from .tenants import Plan, Tenant, TenantData, padding_of, plan_batches, steps_of, tenant_configs

#: The share of padding from which on a run names it.
LARGE_PADDING = 0.5


class SharedResources:
    """What several runs of one command load once."""

    def __init__(self):
        self.data: dict[Any, TenantData] = {}
        """by the sections data and eval"""
        self.backbones: dict[Any, Any] = {}
        """the backbone by its mesh"""
        self.digests: dict[str, str] = {}
        """what a checkpoint keeps of that backbone"""
        self.prompts: dict[Any, PromptCache] = {}
        """of train.cache_prompts, for that backbone"""


def plan_run(config: RunConfig, shared: SharedResources | None = None) -> Plan:
    """Reads the data, and decides what the config leaves open.

    Args:
        shared: what has been read already.

    Raises ValueError for an output folder that holds another run, for data or devices that don't fit the config, and
    where the data of two hosts differ.
    """
    on_first_process(lambda: check_folder(config))
    config = with_decided(config, on_first_process(lambda: decided(config)))
    own = on_every_process(lambda: tenant_configs(config))
    require_same("the list of tenants", lambda: list(own))
    mesh = mesh_of_run(config, own)
    layout = on_every_process(lambda: lay_out(config, mesh, len(own)))
    # The rows of a step are written down, so that a resume on other devices keeps them.
    if not config.data.tenants and not (config.many and config.train.rows_per_tenant):
        config = with_decided(config, {"train.batch_size": layout.tenant_rows})
        own = tenant_configs(config)
    # Each tenant's own folder says what its first start decided.
    if config.many:
        on_first_process(lambda: check_tenants(config, own))
        values = on_first_process(lambda: at_once(decided, own.values()))
        own = {name: with_decided(own[name], held) for name, held in zip(own, values, strict=True)}
    plan = on_every_process(lambda: planned(config, own, layout, mesh, shared or SharedResources()))
    model = load_model_config(config.backbone.source)
    on_first_process(lambda: read_initial(plan, model))  # only the first process has the checkpoints
    own_fields = [own_values(tenant.config) for tenant in plan.tenants]
    require_same("the data or a tenant's tenant.yaml", lambda: [run_digests({}, plan.tenants), own_fields])
    return plan


def read_initial(plan: Plan, model: ModelConfig) -> None:
    """Raises ValueError, before anything is written, for adapters of train.init_from that don't fit the run."""
    if not (plan.folder / "checkpoints").is_dir():
        starts = {own.train.init_from: own for own in (tenant.config for tenant in plan.tenants)}
        for own in starts.values():
            if own.train.init_from:
                initial_adapter(own, model)


def mesh_of_run(config: RunConfig, own: dict[str, RunConfig]):
    """The mesh on which the run fits by its estimate, with the trials of its learning rates if there are any."""
    estimated = of_most_memory(config, list(own.values()))
    if config.data.max_seq_length is None and jax.device_count() > 1:  # one device needs no estimate
        estimated = on_every_process(lambda: with_length(estimated, own))
    trials = len(FIRST) if any(map(is_auto, own.values())) else 1
    if trials > 1 and not config.many:
        estimated = as_trials(estimated)
    return run_mesh(estimated, len(own) * trials)


def with_length(config: RunConfig, own: dict[str, RunConfig]) -> RunConfig:
    """The config with a number as data.max_seq_length, for estimates: null follows from the longest training example of
    all tenants."""
    resolve_backbone(config.backbone.source)
    tokenizer, model = run_tokenizer(config), load_model_config(config.backbone.source)
    sections = {with_limit(one.data, model) for one in own.values()}
    lengths = np.concatenate([load_training_data(one, tokenizer).examples.lengths for one in sections])
    return replace(config, data=replace(config.data, max_seq_length=chosen_length(lengths, config.data.packing)))


def planned(config: RunConfig, own: dict[str, RunConfig], layout: Layout, mesh, shared: SharedResources) -> Plan:
    """What every process of a run reads for itself.

    Args:
        own: the config of each tenant.
    """
    for one in own.values():  # so that a missing file is an error before a backbone is fetched
        split_records(one.data, "train")
    resolve_backbone(config.backbone.source)
    tokenizer, model = run_tokenizer(config), load_model_config(config.backbone.source)
    for name, one in own.items():  # the combinations of a sweep share their data
        if (one.data, one.eval) not in shared.data:
            try:
                shared.data[one.data, one.eval] = read_data(one, tokenizer, model)
            except ValueError as error:
                raise ValueError(f"{name}: {error}" if name else str(error)) from None
    held = {name: shared.data[one.data, one.eval] for name, one in own.items()}
    say_data(config, held)
    buckets, plans = plan_batches(config, own, {name: one.train for name, one in held.items()}, layout.tenant_rows)
    tenants = []
    for name, one in own.items():
        data = held[name]
        require_prompt_ends(one.adapter, name, data)
        order = TenantOrder(data.train.examples, plans[name], steps_of(one, plans[name].batches_per_epoch))
        values = decisions(one, data, model)
        one = with_decided(one, values)
        tenants.append(Tenant(name, one, data.train, order, data.validation, data.test if one.eval.test else None))
        if not config.data.tenants:
            config = with_decided(config, values)
    if not config.data.packing and (share := padding_of(buckets, tenants)) >= LARGE_PADDING:
        say(f"{share:.0%} of the training rows' tokens are padding; data.buckets sets how many lengths there are")
    return Plan(config, tokenizer, tenants, buckets, layout, mesh)


def read_data(config: RunConfig, tokenizer, model: ModelConfig) -> TenantData:
    """A tenant's training data, its validation and test tasks, and how these are scored."""
    config = replace(config, data=with_limit(config.data, model))
    data = load_training_data(config.data, tokenizer)
    require_room(model, data)
    rule = scoring_rule(config, tokenizer, model=model)
    validation, test = (task_of_run(config, split, tokenizer, rule, model=model) for split in ("validation", "test"))
    return TenantData(data, validation, test, rule)


def decisions(own: RunConfig, data: TenantData, model: ModelConfig) -> dict[str, Any]:
    """What a tenant's data decide, by folder.DECIDED's names."""
    rule = data.rule
    ranks = rule.metric == "accuracy" or (rule.metric in LABEL_METRICS and bool(rule.choices))
    values: dict[str, Any] = {
        "eval.metric": rule.metric,
        "eval.also": list(rule.also),
        "eval.choices": list(rule.choices),
    }
    if not ranks and (rule.metric != "loss" or rule.also):
        values["eval.max_new_tokens"] = rule.max_new_tokens
    length = chosen_length(data.train.examples.lengths, own.data.packing)
    scored = [example for task in (data.validation, data.test) if task for example in task.examples or []]
    longest = max((len(prompt) + len(completion) for prompt, completion in scored), default=0)
    if own.data.packing and longest <= length <= model.max_positions:  # else null sets no limit, also in `evaluate`
        values["data.max_seq_length"] = length
    return values


def run_digests(backbone: dict[str, str], tenants: Sequence[Tenant]) -> dict[str, str]:
    """What a checkpoint says about the run that it belongs to; see Standing. A part of the data is its number of
    examples and their digest."""
    parts = dict(backbone)
    for tenant in tenants:
        examples = tenant.data.examples
        parts[tenant.part("training")] = f"{len(examples)} {examples_digest(examples)}"
        for name, task in (("validation", tenant.validation), ("test", tenant.test)):
            rows = None if task is None else [record._replace(place="") for record in task.records]
            text = json.dumps(rows, default=str).encode()
            # How answers are scored may follow from the training data: the choices are its completions by default.
            scoring = "" if task is None else json.dumps([task.metric, task.choices, task.max_new_tokens])
            parts[tenant.part(name)] = f"{len(rows or ())} {hashlib.sha256(text + scoring.encode()).hexdigest()}"
    return parts


# ------------------------------------------------------------------------------------------------------- what must hold


def require_room(model: ModelConfig, data: TrainingData) -> None:
    """Raises ValueError, naming its place, for a training example with a token that the model does not know, or with
    more tokens than the model has positions. JAX would clip both silently."""
    arrays = data.examples
    problem, example = "", 0
    if arrays.ids.max() >= model.vocab_size:
        example = int(np.searchsorted(arrays.starts, arrays.ids.argmax(), side="right")) - 1
        problem = f"token id {arrays.ids.max()} is not one of the model's {model.vocab_size}"
    elif arrays.lengths.max() > model.max_positions:
        example = int(arrays.lengths.argmax())
        problem = (
            f"{arrays.lengths.max()} tokens, but the model has {model.max_positions} positions; data.max_seq_length "
            "with data.truncate limits them"
        )
    if problem:
        raise ValueError(f"{data.places[example]}: {problem}")


def require_prompt_ends(adapter: Any, name: str, data: TenantData) -> None:
    """Raises ValueError, naming its place, for the first prompt that does not end with the adapter's
    alora_invocation_tokens. Most adapters have none."""
    if not invocation_tokens(adapter):
        return
    prompts = list(zip(data.train.places, data.train.examples, strict=True))
    for task in filter(None, (data.validation, data.test)):
        prompts += zip((record.place for record in task.records), task.examples or [], strict=True)
    for place, example in prompts:
        require_invocation(
            adapter, example.prompt_ids, f"{name}: {place}: the prompt" if name else f"{place}: the prompt"
        )
