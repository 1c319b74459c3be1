"""What a run trains: one adapter, a tenant for each part of a folder, or the combinations of a sweep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..backbone.load import load_model_config
from ..config import ModelConfig, RunConfig, expanded, require
from ..data.batches import Bucket, Plan, example_lengths, for_mixed_rows, plan_buckets_of_sizes
from ..data.examples import Example
from ..data.packing import PackingPlan, RowShape, common_shape, plan_packing
from ..data.schedule import TenantOrder
from ..data.tenants import tenant_sections
from ..data.tokenizer import load_tokenizer
from ..data.training_data import TrainingData, load_training_data
from ..evaluation.tasks import EvalTask, task_of_run
from ..hub import resolve_backbone
from ..messages import say, warn
from ..storage.bucket import Place
from ..training.checkpoint import steps_in
from ..training.passes import Layout


class Tenant(NamedTuple):
    """One tenant of a run."""

    name: str
    """empty in a run of one adapter"""
    config: RunConfig
    """its own: data, output folder, learning rate and seed"""
    data: TrainingData
    order: TenantOrder
    validation: EvalTask | None
    test: EvalTask | None

    @property
    def folder(self) -> Place:
        return expanded(self.config.output_dir)

    def part(self, split: str) -> str:
        """The name of its training, validation or test data in a checkpoint: "test data of acme"."""
        return f"{split} data of {self.name}" if self.name else f"{split} data"


class Shared:
    """What several runs of one command load once."""

    def __init__(self):
        self.data: dict[Any, tuple[TrainingData, EvalTask | None, EvalTask | None]] = {}
        """training data, validation and test of a DataSection and an EvalSection"""
        self.backbones: dict[Any, Any] = {}
        """the backbone by its mesh"""


class Inputs(NamedTuple):
    """What every process of a run reads for itself before the backbone."""

    tokenizer: Any
    tenants: list[Tenant]
    buckets: tuple[Bucket, ...] | tuple[RowShape]
    """the compiled shapes that the tenants share; of packed rows there is one"""


def read_inputs(config: RunConfig, layout: Layout, shared: Shared | None = None) -> Inputs:
    """The tokenizer, the tenants with their data, and the compiled shapes."""
    resolve_backbone(config.backbone.source)
    tokenizer, model = load_tokenizer(config.backbone.source), load_model_config(config.backbone.source)
    configs = tenant_configs(config)
    read_once = (shared or Shared()).data  # the combinations of a sweep share their data
    for name, own in configs.items():
        if (own.data, own.eval) not in read_once:
            try:
                read_once[own.data, own.eval] = read_data(own, tokenizer, model)
            except ValueError as error:
                raise ValueError(f"{name}: {error}" if name else str(error)) from None
    data = {name: read_once[own.data, own.eval][0] for name, own in configs.items()}
    say_data(config, data)
    buckets, plans = plan_batches(config, configs, data, layout.tenant_rows)
    tenants = []
    for name, own in configs.items():
        train, validation, test = read_once[own.data, own.eval]
        steps = own.train.max_steps or math.ceil(own.train.num_epochs * plans[name].batches_per_epoch)
        order = TenantOrder(train.examples, plans[name], steps)
        tenants.append(Tenant(name, own, train, order, validation, test if config.eval.test else None))
    return Inputs(tokenizer, tenants, buckets)


def read_data(
    config: RunConfig, tokenizer, model: ModelConfig
) -> tuple[TrainingData, EvalTask | None, EvalTask | None]:
    """A tenant's training data, and its validation and test tasks."""
    data = load_training_data(config.data, tokenizer)
    require(len(data.examples) > 0, "data.train", config.data.train, "at least one training example")
    validation, test = (task_of_run(config, split, tokenizer) for split in ("validation", "test"))
    require_room(model, data, (validation, test))
    return data, validation, test


def say_data(config: RunConfig, data: dict[str, TrainingData]) -> None:
    if not config.many:
        say(f"training data: {data[''].report()}")
        return
    counts = [len(one.examples) for one in data.values()]
    if config.sweep:
        combinations = "1 combination" if len(counts) == 1 else f"{len(counts)} combinations"
        say(f"{combinations} on {counts[0]} training examples")
        return
    if len(counts) == 1:
        say(f"1 tenant with {counts[0]} training examples")
        return
    say(f"{len(counts)} tenants with {min(counts)} to {max(counts)} training examples, {sum(counts)} in all")


def plan_batches(
    config: RunConfig, configs: dict[str, RunConfig], data: dict[str, TrainingData], rows: int
) -> tuple[tuple, dict[str, Any]]:
    """The compiled shapes, and each tenant's plan: which examples its steps of `rows` rows hold."""
    examples = {name: one.examples for name, one in data.items()}
    if config.data.packing:
        length = config.data.max_seq_length
        plans = {
            name: plan_packing(examples[name], length=length, rows=rows, seed=own.seed) for name, own in configs.items()
        }
        shape = common_shape(one.shape for one in plans.values())
        say_packing(plans, shape, sum(map(len, examples.values())), sum(len(one.ids) for one in examples.values()))
        return (shape,), plans
    distinct = {id(one): one for one in examples.values()}
    sizes = np.concatenate([one.sizes for one in distinct.values()])
    buckets = plan_buckets_of_sizes(sizes, config.data.buckets)
    if len(configs) > 1:
        buckets = for_mixed_rows(buckets)
    return buckets, {
        name: Plan(example_lengths(examples[name]), buckets=buckets, rows=rows, seed=own.seed)
        for name, own in configs.items()
    }


def say_packing(plans: dict[str, PackingPlan], shape: RowShape, examples: int, tokens: int) -> None:
    rows = sum(len(one.packed) for one in plans.values())
    say(
        f"packed {examples} examples into {rows} rows of {shape.length} tokens, at most {shape.segments} per row; "
        f"{1 - tokens / (rows * shape.length):.1%} of the tokens are padding"
    )


# ------------------------------------------------------------------------------------------------------------- configs


def tenant_configs(config: RunConfig) -> dict[str, RunConfig]:
    """Each tenant's own config by name: the config of a run of this tenant alone, with output_dir set to its folder
    inside the run's. A run of one adapter has one tenant without a name, whose config is the run's.

    Raises ValueError for a folder or names that data/tenants.py refuses.
    """
    if not config.many:
        return {"": config}
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
    """Every combination of a sweep, by its name, which has the fields that are swept: learning_rate-0.003-seed-1. A run
    that an earlier version began keeps its names, which always had both."""
    rates = config.sweep.learning_rate or (config.train.learning_rate,)
    seeds = config.sweep.seed or (config.seed,)
    alone = replace(config, sweep=type(config.sweep)())

    def name(rate, seed, fields) -> str:
        parts = {"learning_rate": f"learning_rate-{rate!r}", "seed": f"seed-{seed}"}
        return "-".join(parts[field] for field in fields).replace("+", "")

    both = "learning_rate", "seed"
    old = expanded(config.output_dir) / name(rates[0], seeds[0], both) / "config.yaml"
    fields = both if old.is_file() else [field for field in both if getattr(config.sweep, field)]
    return {
        name(rate, seed, fields): replace(alone, train=replace(config.train, learning_rate=rate), seed=seed)
        for rate, seed in itertools.product(rates, seeds)
    }


# ------------------------------------------------------------------------------------------------------- what must hold


def require_validation(config: RunConfig, validation: Sequence[EvalTask | None]) -> None:
    """Raises ValueError for eval.patience where no tenant has validation data: only its scores could end a run early.
    A run that an earlier version began like this resumes, and a line says that patience ends nothing."""
    if config.eval.patience is None or any(validation):
        return
    missing = "validation data (data.validation, or validation.jsonl next to train.jsonl)"
    checkpoints = expanded(config.output_dir) / "checkpoints"
    resumes = checkpoints.is_dir() and bool(steps_in(checkpoints))
    require(resumes, "eval.patience", config.eval.patience, f"{missing}; or eval.patience=null")
    warn(f"eval.patience ends nothing here: there is no {missing}")


def require_room(model: ModelConfig, data: TrainingData, tasks: Iterable[EvalTask | None]) -> None:
    """Raises ValueError, naming its place, for an example with a token that the model does not know, or with more
    tokens than the model has positions. The answer that is to be written counts."""
    known, most = model.vocab_size, model.max_positions
    asked: list[tuple[Sequence[Example], Sequence[str], int]] = []
    if data.examples.ids.max() >= known or data.examples.lengths.max() > most:
        asked.append((data.examples, data.places, 0))
    for task in filter(None, tasks):
        where = [record.place for record in task.records]
        asked.append((task.examples or [], where, task.max_new_tokens if task.writes else 0))
    for examples, where, new in asked:
        room = f"at most {most}, the model's positions; data.max_seq_length with data.truncate limits them"
        room += f", next to {new} for eval.max_new_tokens" if new else ""
        for (prompt, completion), at in zip(examples, where, strict=True):
            largest, length = max(max(prompt), max(completion)), len(prompt) + max(len(completion), new)
            require(largest < known, f"{at}: token id", largest, f"less than {known}, the model's tokens")
            require(length <= most, f"{at}: tokens", length, room)
