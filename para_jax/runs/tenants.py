"""What a run trains: one adapter, a tenant for each part of a folder, or the combinations of a sweep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..config import RunConfig
from ..data.batches import (
    Bucket,
    example_lengths,
    for_mixed_rows,
    lengths_worth_compiling,
    plan_buckets_of_sizes,
)
from ..data.batches import (
    Plan as BatchPlan,
)
from ..data.example_arrays import ExampleArrays
from ..data.packing import PackingPlan, RowShape, common_shape, plan_packing
from ..data.schedule import TenantOrder
from ..data.tenants import AT_ONCE, tenant_sections, with_own_fields
from ..data.training_data import TrainingData, chosen_length
from ..evaluation.defaults import ScoringRule
from ..evaluation.tasks import EvalTask
from ..io.checks import expanded
from ..io.messages import say
from ..io.storage.bucket import Place
from ..training.passes import Layout
from .initial import initial_places


class Tenant(NamedTuple):
    """One tenant of a run."""

    name: str
    """empty in a run of one adapter"""
    config: RunConfig
    """its own: data, output folder, seed, and what its tenant.yaml sets"""
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


class Plan(NamedTuple):
    """What a run trains, and on which devices."""

    config: RunConfig
    """with all that was decided"""
    tokenizer: Any
    tenants: list[Tenant]
    buckets: tuple[Bucket, ...] | tuple[RowShape]
    """the compiled shapes that the tenants share; of packed rows there is one"""
    layout: Layout
    mesh: Any

    @property
    def folder(self) -> Place:
        return expanded(self.config.output_dir)


class TenantData(NamedTuple):
    """What is read of a tenant."""

    train: TrainingData
    validation: EvalTask | None
    test: EvalTask | None
    rule: ScoringRule


def steps_of(own: RunConfig, batches_per_epoch: int) -> int:
    """The optimiser steps of a tenant with this config."""
    epochs, given = own.train.num_epochs, own.train.max_steps
    return given or max(1, math.ceil(round(epochs * batches_per_epoch, 6)))  # 0.07 * 100 is a little more than 7


def plan_batches(
    config: RunConfig, configs: dict[str, RunConfig], data: dict[str, TrainingData], rows: int
) -> tuple[tuple, dict[str, Any]]:
    """The compiled shapes, which all tenants share, and each tenant's plan: which examples its steps of `rows` rows
    hold. A plan is cut by the lengths of its own examples, so that it doesn't depend on the other tenants."""
    examples = {name: one.examples for name, one in data.items()}
    if config.data.packing:
        plans = {}
        for name, own in configs.items():
            length = config.data.max_seq_length or chosen_length(examples[name].lengths, packing=True)
            plans[name] = plan_packing(examples[name], length=length, rows=rows, seed=own.seed)
        shape = common_shape(one.shape for one in plans.values())
        say_packing(plans, shape, sum(map(len, examples.values())), sum(len(one.ids) for one in examples.values()))
        return (shape,), plans
    distinct = {id(one): one.sizes for one in examples.values()}  # the combinations of a sweep share theirs
    count = config.data.buckets
    # Cut by a tenant's own buckets and padded to the compiled shapes: which rows meet does not depend on others.
    own_buckets = {which: plan_buckets_of_sizes(sizes, count) for which, sizes in distinct.items()}
    sizes = np.concatenate([*distinct.values()])
    steps = [steps_of(own, -(-len(examples[name]) // rows)) for name, own in configs.items()]
    compiled = lengths_worth_compiling(sizes.sum(axis=1), count, max(steps) if config.sweep else sum(steps))
    shapes = plan_buckets_of_sizes(sizes, compiled)
    # A batch then holds rows of several of the tenants' own buckets, and a long bucket may lack the longest completion.
    if len(configs) > 1 or compiled < count:
        shapes = for_mixed_rows(shapes)

    def plan(found: ExampleArrays, seed: int) -> BatchPlan:
        return BatchPlan(example_lengths(found), buckets=own_buckets[id(found)], rows=rows, seed=seed, shapes=shapes)

    return shapes, {name: plan(examples[name], own.seed) for name, own in configs.items()}


def padding_of(shapes: Sequence[Bucket | RowShape], tenants: Sequence[Tenant]) -> float:
    """The share of padding in the rows of an epoch, where each tenant's rows are padded by themselves."""
    plans = [tenant.order.plan for tenant in tenants]
    batches = ((plan, i) for plan in plans for i in range(plan.batches_per_epoch))
    padded = sum(plan.rows * shapes[plan.batch_indices(i)[0]].length for plan, i in batches)
    return 1 - sum(len(tenant.data.examples.ids) for tenant in tenants) / padded


def say_packing(plans: dict[str, PackingPlan], shape: RowShape, examples: int, tokens: int) -> None:
    rows = sum(len(one.packed) for one in plans.values())
    say(
        f"packed {examples} examples into {rows} rows of {shape.length} tokens, at most {shape.segments} per row; "
        f"{1 - tokens / (rows * shape.length):.1%} of the tokens are padding"
    )


# ------------------------------------------------------------------------------------------------------------- configs


def tenant_configs(config: RunConfig) -> dict[str, RunConfig]:
    """Each tenant's own config by name: the config of a run of this tenant alone, with what its tenant.yaml sets, and
    with output_dir set to its folder inside the run's. A run of one adapter has one tenant without a name, whose config
    is the run's.

    Raises ValueError for a folder or names that data/tenants.py refuses, and for what tenant_file.py refuses.
    """
    if not config.many:
        start = initial_places(config.train.init_from, [""])[""]
        return {"": replace(config, train=replace(config.train, init_from=start))}
    if config.data.tenants:
        sections = tenant_sections(config.data.tenants, config.data)
        alone = {name: replace(config, data=section) for name, section in sections.items()}
        with ThreadPoolExecutor(AT_ONCE) as pool:  # in a bucket each file takes a request
            given = pool.map(lambda own: with_own_fields(own, expanded(own.data.train)), alone.values())
            made = dict(zip(alone, given, strict=True))
    else:
        made = sweep_configs(config)
    rows = config.rows_per_tenant
    batch = {"per_device_batch_size": rows}
    if config.train.batch_size is not None:
        batch = {"batch_size": rows, "gradient_accumulation_steps": 1}  # the run's may not divide them
    starts = initial_places(config.train.init_from, made if config.data.tenants else [""])
    return {
        name: replace(
            own,
            output_dir=str(expanded(config.output_dir) / name),
            train=replace(own.train, rows_per_tenant=rows, init_from=starts.get(name, starts.get("")), **batch),
        )
        for name, own in made.items()
    }


def sweep_configs(config: RunConfig) -> dict[str, RunConfig]:
    """Every combination of a sweep, by its name, which has the fields that are swept: learning_rate-0.003-seed-1."""
    rates = config.sweep.learning_rate or (config.train.learning_rate,)
    seeds = config.sweep.seed or (config.seed,)
    alone = replace(config, sweep=type(config.sweep)())

    def name(rate, seed) -> str:
        parts = {"learning_rate": f"learning_rate-{rate!r}", "seed": f"seed-{seed}"}
        return "-".join(text for field, text in parts.items() if getattr(config.sweep, field)).replace("+", "")

    return {
        name(rate, seed): replace(alone, train=replace(config.train, learning_rate=rate), seed=seed)
        for rate, seed in itertools.product(rates, seeds)
    }
