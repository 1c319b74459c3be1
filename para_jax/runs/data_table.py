"""What `inspect --data` says about the data of many tenants: a table with a line for each, and the padded lengths."""

from __future__ import annotations

from dataclasses import replace

from ..backbone.load import load_model_config
from ..config import DataSection, RunConfig, printable
from ..data.encode_records import TooLong, encode_records
from ..data.packing import RowShape
from ..data.records import load_records
from ..data.training_data import TrainingData, load_training_data
from ..evaluation.tasks import with_limit
from ..table import table
from .tenant_file import own_values
from .tenants import plan_batches, steps_of, tenant_configs, too_long_in


def tenants_data(config: RunConfig, tokenizer) -> tuple[str, TrainingData]:
    """The table of all tenants, and the training data of the first.

    Raises ValueError as a run does, for example with all tenants that have examples of too many tokens.
    """
    model, data, long = load_model_config(config.backbone.source), {}, {}
    configs = {name: replace(own, data=with_limit(own.data, model)) for name, own in tenant_configs(config).items()}
    for name, own in configs.items():
        try:
            data[name] = load_training_data(own.data, tokenizer)
        except TooLong as error:
            long[name] = error
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if long:
        raise too_long_in(long)
    buckets, plans = plan_batches(config, configs, data, config.tenant_batch)
    columns = ["examples", "validation", "test", "steps", "mean tokens", "longest", "longest completion"]
    rows = [["tenant", *columns, "tenant.yaml"]]
    for name, own in configs.items():
        sizes = data[name].examples.sizes
        lengths = sizes.sum(axis=1)
        try:
            held = [held_examples(own.data, split, tokenizer) for split in ("validation", "test")]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        numbers = [len(sizes), *held, steps_of(own, plans[name].batches_per_epoch, name)]
        tokens = [f"{lengths.mean():.0f}", lengths.max(), sizes[:, 1].max()]
        rows.append([name, *map(str, (*numbers, *tokens)), own_fields(config, own)])
    lengths = " or ".join(str(bucket.length) for bucket in buckets)
    packed = isinstance(buckets[0], RowShape)
    said = f"packed into rows of {lengths} tokens" if packed else f"padded to {lengths} tokens"
    total, cut = sum(len(one.examples) for one in data.values()), sum(one.cut + one.skipped for one in data.values())
    lost = f", {cut} too long and cut or skipped" if cut else ""
    last = f"{total} examples of {len(data)} tenant{'s' * (len(data) > 1)}{lost}; {said}"
    return f"{table(rows, left=(0, len(columns) + 1))}\n\n{last}", next(iter(data.values()))


def held_examples(section: DataSection, split: str, tokenizer) -> int:
    """How many examples a run has to score of its validation or test data, without those that data.truncate=skip leaves
    out. Raises ValueError for one that is too long with data.truncate=error, as a run does."""
    records = load_records(section, split)
    return len(encode_records(records, tokenizer, section).examples) if records else 0


def own_fields(config: RunConfig, own: RunConfig) -> str:
    """What a tenant's tenant.yaml changes: "learning_rate 0.01, metric loss"."""
    run, found = own_values(config), own_values(own)
    changed = [f"{name.partition('.')[2]} {found[name]}" for name in run if found[name] != run[name]]
    return printable(", ".join(changed), 200)
