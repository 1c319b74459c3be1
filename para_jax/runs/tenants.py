"""What a run trains: one adapter, a tenant for each part of a folder, or the combinations of a sweep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from ..adapters.scope import invocation_tokens, require_invocation
from ..backbone.load import load_model_config
from ..config import ModelConfig, RunConfig
from ..data.batches import (
    Bucket,
    Plan,
    example_lengths,
    for_mixed_rows,
    lengths_worth_compiling,
    plan_buckets_of_sizes,
)
from ..data.example_arrays import ExampleArrays
from ..data.examples import Example
from ..data.packing import PackingPlan, RowShape, common_shape, plan_packing
from ..data.schedule import TenantOrder
from ..data.sources import is_folder, is_held_out, unread
from ..data.tenants import AT_ONCE, tenant_sections, with_own_fields
from ..data.tokenizer import run_tokenizer
from ..data.training_data import TooLong, TrainingData, chosen_length, describe_lengths, load_training_data
from ..evaluation.defaults import ScoringRule, scoring_rule
from ..evaluation.tasks import EvalTask, say_long, task_of_run, with_limit
from ..io.checks import expanded, require
from ..io.hub import resolve_backbone
from ..io.messages import say, warn
from ..io.storage.bucket import Place
from ..training.passes import Layout
from ..training.prompt_cache import PromptCache
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


class SharedResources:
    """What several runs of one command load once."""

    def __init__(self):
        self.data: dict[Any, tuple[TrainingData, EvalTask | None, EvalTask | None, ScoringRule]] = {}
        """what `read_data` gives, by `of_data`"""
        self.backbones: dict[Any, Any] = {}
        """the backbone by its mesh"""
        self.digests: dict[str, str] = {}
        """what a checkpoint keeps of that backbone"""
        self.prompts: dict[Any, PromptCache] = {}
        """of train.cache_prompts, for that backbone"""
        self.rows: int | None = None
        """of each step of the first run of one adapter; on other devices the others keep them too"""


class Inputs(NamedTuple):
    """What every process of a run reads for itself before the backbone."""

    tokenizer: Any
    tenants: list[Tenant]
    buckets: tuple[Bucket, ...] | tuple[RowShape]
    """the compiled shapes that the tenants share; of packed rows there is one"""


def read_inputs(
    config: RunConfig,
    layout: Layout,
    names: Sequence[str] | None = None,
    *,
    shared: SharedResources | None = None,
) -> Inputs:
    """The tokenizer, the tenants with their data, and the compiled shapes.

    Args:
        names: only these tenants; default: all.
        shared: what has already been read.
    """
    resolve_backbone(config.backbone.source)
    tokenizer, model = run_tokenizer(config), load_model_config(config.backbone.source)
    configs = {name: own for name, own in tenant_configs(config).items() if names is None or name in names}
    read_once = (shared or SharedResources()).data  # the combinations of a sweep share their data
    long: dict[str, TooLong] = {}
    for name, own in configs.items():
        if of_data(own) not in read_once:
            try:
                read_once[of_data(own)] = read_data(own, tokenizer, model)
            except TooLong as error:
                long[name] = error
            except ValueError as error:
                raise ValueError(f"{name}: {error}" if name else str(error)) from None
    if long:
        raise too_long_in(long)
    data = {name: read_once[of_data(own)][0] for name, own in configs.items()}
    say_data(config, data)
    # files next to a tenant's file are other tenants
    warn_of_unread(own for own in configs.values() if not config.data.tenants or is_folder(own.data.train))
    say_held_out(configs.values(), read_once)
    alike = [read_once[key] for key in dict.fromkeys(map(of_data, configs.values()))]
    say_long("validation", [validation for _, validation, *_ in alike])
    say_long("test", [test for _, _, test, _ in alike])
    say_scoring({name: read_once[of_data(own)][3] for name, own in configs.items()})
    planned = buckets, plans = plan_batches(config, configs, data, layout.tenant_rows)
    if not config.data.packing and (share := padding_of(planned, data)) >= LARGE_PADDING:
        say(describe_padding(config, configs, data, layout.tenant_rows, share))
    tenants = []
    for name, own in configs.items():
        train, validation, test, _ = read_once[of_data(own)]
        require_prompt_ends(own.adapter, name, train, (validation, test))
        if own.eval.patience not in (None, config.eval.patience) and validation is None:
            raise ValueError(
                f"{name}: eval.patience ({own.eval.patience} in tenant.yaml) needs validation data\n"
                "add validation.jsonl next to train.jsonl, or remove eval.patience"
            )
        order = TenantOrder(train.examples, plans[name], steps_of(own, plans[name].batches_per_epoch, name))
        tenants.append(Tenant(name, own, train, order, validation, test if own.eval.test else None))
    return Inputs(tokenizer, tenants, buckets)


def of_data(own: RunConfig) -> tuple:
    """What the data and the tasks of a tenant follow from."""
    return own.data, own.eval


def read_data(
    config: RunConfig, tokenizer, model: ModelConfig
) -> tuple[TrainingData, EvalTask | None, EvalTask | None, ScoringRule]:
    """A tenant's training data, its validation and test tasks, and how these are scored."""
    config = replace(config, data=with_limit(config.data, model))
    data = load_training_data(config.data, tokenizer)
    require(len(data.examples) > 0, "data.train", config.data.train, "at least one training example")
    by = scoring_rule(config, tokenizer, model=model)
    validation, test = (task_of_run(config, split, tokenizer, by, model=model) for split in ("validation", "test"))
    require_room(model, data, (validation, test))
    return data, validation, test, by


def steps_of(own: RunConfig, batches_per_epoch: int, tenant: str = "") -> int:
    """The optimiser steps of a tenant with this config; an error names the tenant."""
    epochs, given = own.train.num_epochs, own.train.max_steps
    steps = given or max(1, math.ceil(round(epochs * batches_per_epoch, 6)))  # 0.07 * 100 is a little more than 7
    name, value = ("train.max_steps", given) if given else ("train.num_epochs", epochs)
    name = f"{tenant}: {name}" if tenant else name
    require(steps < 2**31, name, value, f"less: fewer than {2**31} steps, and not {steps}")
    return steps


#: The share of padding from which on a run names it.
LARGE_PADDING = 0.5
#: Tenants that an error names.
NAMED = 10


def too_long_in(found: dict[str, TooLong]) -> ValueError:
    """One error for the tenants whose examples are too long."""
    if len(found) == 1:
        ((name, error),) = found.items()
        return ValueError(f"{name}: {error}" if name else str(error))
    each = [f"{name} ({error.long} of {error.count})" for name, error in list(found.items())[:NAMED]]
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    error = next(iter(found.values()))
    return ValueError(
        f"{len(found)} tenants have examples of more than data.max_seq_length {error.limit} tokens: "
        f"{', '.join(each)}{more}\n{error.advice}"
    )


def say_data(config: RunConfig, data: dict[str, TrainingData]) -> None:
    if config.many:
        say_tenants(config, data)
    else:
        say(f"training data: {data[''].report()}")
    if config.data.max_seq_length is None:
        for line in describe_lengths(all_lengths(data), config.data.packing).splitlines():
            say(line)


def say_tenants(config: RunConfig, data: dict[str, TrainingData]) -> None:
    counts = [len(one.examples) for one in data.values()]
    each = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(max(counts))
    if config.sweep:
        say(f"{len(counts)} combination{'s' * (len(counts) > 1)} on {each} training examples")
    elif len(counts) == 1:
        say(f"1 tenant with {each} training examples")
    else:
        say(f"{len(counts)} tenants with {each} training examples, {sum(counts)} in all")


def warn_of_unread(configs: Iterable[RunConfig]) -> None:
    """Names the files that were probably meant as validation data."""
    sections = {(own.data.train, own.data.validation): own.data for own in configs}  # a sweep shares its data
    found = sorted(filter(None, (unread(section, "validation") for section in sections.values())))
    if found:
        more = f", and neither are {len(found) - 1} more" if len(found) > 1 else ""
        name = f"validation{found[0].suffix.lower()}"
        renames = found[0].name != name and any(is_folder(train) for train, _ in sections)
        advice = f"rename it to {name}, or " if renames else ""
        warn(f"{found[0]} is not read{more}; {advice}set data.validation")


def say_held_out(configs: Iterable[RunConfig], found: dict[tuple, tuple]) -> None:
    """Says how many examples are held out of the training data as validation data."""
    tasks = {of_data(own): found[of_data(own)][1] for own in configs if is_held_out(own.data)}
    held = [len(task.records) for task in tasks.values() if task]
    if held:
        whose, count = f" of {len(held)} tenants" if len(held) > 1 else "", sum(held)
        say(f"validation data{whose}: {count} examples held out of the training data (data.validation_split)")


def all_lengths(data: dict[str, TrainingData]) -> np.ndarray:
    """The tokens of each example. Tenants that share their data count once."""
    return np.concatenate([one.lengths for one in {id(one.examples): one.examples for one in data.values()}.values()])


def with_length(config: RunConfig) -> RunConfig:
    """The config with a number as data.max_seq_length, for estimates: null follows from the longest training example of
    all tenants."""
    resolve_backbone(config.backbone.source)
    tokenizer, model = run_tokenizer(config), load_model_config(config.backbone.source)
    sections = {with_limit(own.data, model) for own in tenant_configs(config).values()}
    lengths = np.concatenate([load_training_data(one, tokenizer).examples.lengths for one in sections])
    return replace(config, data=replace(config.data, max_seq_length=chosen_length(lengths, config.data.packing)))


def say_scoring(by: dict[str, ScoringRule]) -> None:
    """Says which metric was chosen from the data, and for which tenants."""
    alike: dict[str, list[str]] = {}
    for name, one in by.items():
        if one.from_data:
            alike.setdefault(one.describe(), []).append(name)
    for described, names in alike.items():
        shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        say(f"metric: {described}" + (f": {shown}" if shown and len(names) < len(by) else ""))


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
    own_buckets = {which: plan_buckets_of_sizes(sizes, count) for which, sizes in distinct.items()}
    sizes = np.concatenate([*distinct.values()])
    steps = [steps_of(own, -(-len(examples[name]) // rows), name) for name, own in configs.items()]
    compiled = lengths_worth_compiling(sizes.sum(axis=1), count, max(steps) if config.sweep else sum(steps))
    shapes = plan_buckets_of_sizes(sizes, compiled)
    if len(configs) > 1 or compiled < count:
        shapes = for_mixed_rows(shapes)

    def plan(found: ExampleArrays, seed: int) -> Plan:
        return Plan(example_lengths(found), buckets=own_buckets[id(found)], rows=rows, seed=seed, shapes=shapes)

    return shapes, {name: plan(examples[name], own.seed) for name, own in configs.items()}


def padding_of(planned: tuple[tuple, dict[str, Any]], data: dict[str, TrainingData]) -> float:
    """The share of padding in the rows of an epoch, from what `plan_batches` gives."""
    shapes, plans = planned
    batches = ((plan, i) for plan in plans.values() for i in range(plan.batches_per_epoch))
    padded = sum(plan.rows * shapes[plan.batch_indices(i)[0]].length for plan, i in batches)
    return 1 - sum(len(data[name].examples.ids) for name in plans) / padded


def describe_padding(
    config: RunConfig, configs: dict[str, RunConfig], data: dict[str, TrainingData], rows: int, share: float
) -> str:
    """ "61% of the training rows' tokens are padding; data.buckets=6 makes it 40%": other lengths are named where they
    help, more or, where they leave batches half empty, one. Tenants in one batch are padded to the longest of them, so
    there it is a minimum."""
    said = f"{'at least ' * (config.data.tenants is not None)}{share:.0%} of the training rows' tokens are padding"
    if config.data.packing or share < LARGE_PADDING:
        return said
    others = [replace(config, data=replace(config.data, buckets=n)) for n in (1, 2 * config.data.buckets)]
    better, best = min((padding_of(plan_batches(o, configs, data, rows), data), o.data.buckets) for o in others)
    return f"{said}; data.buckets={best} makes it {better:.0%}" if better < share - 0.05 else said


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


# ------------------------------------------------------------------------------------------------------- what must hold


def require_validation(config: RunConfig, validation: Sequence[EvalTask | None]) -> None:
    """Raises ValueError for eval.patience without validation data: no score could ever end the run early."""
    if config.eval.patience is None or any(validation):
        return
    missing = "validation data (data.validation, data.validation_split, or validation.jsonl in the folder of the data)"
    if share := config.data.validation_split:
        missing = f"validation data (data.validation_split={share} holds out none of so few rows)"
    raise ValueError(f"eval.patience ({config.eval.patience}) needs {missing}; or set eval.patience=null")


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


def require_prompt_ends(adapter: Any, name: str, data: TrainingData, tasks: Iterable[EvalTask | None]) -> None:
    """Raises ValueError, naming its place, for the first prompt that does not end with the adapter's
    alora_invocation_tokens. Most adapters have none.

    Args:
        name: of the tenant.
    """
    if not invocation_tokens(adapter):
        return
    prompts = list(zip(data.places, data.examples, strict=True))
    for task in filter(None, tasks):
        prompts += zip((record.place for record in task.records), task.examples or [], strict=True)
    for place, example in prompts:
        require_invocation(
            adapter, example.prompt_ids, f"{name}: {place}: the prompt" if name else f"{place}: the prompt"
        )
