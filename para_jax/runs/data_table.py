"""What `inspect --data` says about the data of many tenants: a table with a line for each, and the padded lengths."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from ..backbone.load import load_model_config
from ..config import DataSection, RunConfig
from ..data.packing import RowShape
from ..data.records import load_records, split_records
from ..data.tenants import own_values
from ..data.training_data import TooLong, TrainingData, encode_records, load_training_data
from ..evaluation.defaults import RANKED, scoring_rule
from ..evaluation.metrics import single_spaced
from ..evaluation.tasks import with_limit
from ..io.checks import printable
from ..io.table import table
from .tenants import describe_padding, padding_of, plan_batches, steps_of, tenant_configs, too_long_in

#: Lines about odd records of tenants.
NOTES = 20


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
    planned = buckets, plans = plan_batches(config, configs, data, config.tenant_batch)
    columns = ["examples", "validation", "test", "steps", "mean tokens", "longest", "longest completion"]
    rows, notes = [["tenant", *columns, "metric", "tenant.yaml"]], list[str]()
    for name, own in configs.items():
        sizes = data[name].examples.sizes
        lengths = sizes.sum(axis=1)
        try:
            held = [held_examples(own.data, split, tokenizer) for split in ("validation", "test")]
            rule = scoring_rule(own, tokenizer, model=model)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        numbers = [len(sizes), *held, steps_of(own, plans[name].batches_per_epoch, name)]
        tokens = [f"{lengths.mean():.0f}", lengths.max(), sizes[:, 1].max()]
        notes += [f"{printable(name)}: {line}" for line in labels_and_oddities(own.data)[1]]
        metric = f"{rule.metric} of {len(rule.choices)} labels" if rule.choices else rule.metric
        rows.append([name, *map(str, (*numbers, *tokens)), metric, own_fields(config, own)])
    lengths = " or ".join(str(bucket.length) for bucket in buckets)
    packed = isinstance(buckets[0], RowShape)
    said = f"packed into rows of {lengths} tokens" if packed else f"padded to {lengths} tokens"
    total, cut = sum(len(one.examples) for one in data.values()), sum(one.cut + one.skipped for one in data.values())
    lost = f", {cut} too long and cut or skipped" if cut else ""
    last = f"{total} examples of {len(data)} tenant{'s' * (len(data) > 1)}{lost}; {said}"
    named = notes[:NOTES] + [f"... and {len(notes) - NOTES} more lines like these"] * (len(notes) > NOTES)
    padding = describe_padding(config, configs, data, config.tenant_batch, padding_of(planned, data))
    lines = "\n".join([last, padding, *named])
    return f"{table(rows, left=(0, len(columns) + 1, len(columns) + 2))}\n\n{lines}", next(iter(data.values()))


def scoring_lines(config: RunConfig, tokenizer) -> list[str]:
    """The metric of a run on one data set, the labels with their counts, and what is odd about the records."""
    rule, (labels, odd) = scoring_rule(config, tokenizer), labels_and_oddities(config.data)
    metric = rule.describe() if rule.from_data else " and ".join([rule.metric, *rule.also])
    counts = ", ".join(f"{printable(label, 60)} {count}" for label, count in labels.most_common())
    return [f"metric: {metric}", *([f"labels: {counts}"] if counts else []), *odd]


def labels_and_oddities(section: DataSection) -> tuple[Counter[str], list[str]]:
    """How often the training data has each label (nothing where the completions are no labels), and a line each on
    labels that differ only in case and on prompts that end with a space."""
    labels, spaced, examples = Counter[str](), 0, 0
    for record in split_records(section, "train") or ():
        examples += 1
        spaced += isinstance(record.prompt, str) and record.prompt.endswith(" ")
        if len(labels) <= RANKED:
            labels[single_spaced(record.completion)] += 1
    labels = labels if len(labels) <= min(RANKED, examples // 2) else Counter[str]()
    folded, lines = Counter(label.casefold() for label in labels), []
    if same := [label for label in sorted(labels, key=str.casefold) if folded[label.casefold()] > 1]:
        lines.append(f"{len(same)} labels differ only in case: {', '.join(printable(label, 60) for label in same)}")
    if spaced:
        why = "which tokenizers often make a token of its own: PARA then reads that token"
        lines.append(f"{spaced} of {examples} prompts end with a space, {why}")
    return labels, lines


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
