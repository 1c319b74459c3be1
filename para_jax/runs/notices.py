"""What a run says about its data before it trains, how much there is and how it is scored; and at its end about an
adapter that is worse than the base model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..config import RunConfig
from ..data.training_data import describe_lengths
from ..evaluation.tasks import say_long
from ..io.messages import say
from ..io.untrusted import safe_names
from ..training.scores_file import Records
from .tenants import Tenant, TenantData

#: The share by which a loss is above the base model's before that is said.
ABOVE_BASE = 0.02


def say_data(config: RunConfig, data: Mapping[str, TenantData]) -> None:
    """Describes the data of a run."""
    train = {name: one.train for name, one in data.items()}
    counts = [len(one.examples) for one in train.values()]
    each = f"{min(counts)} to {max(counts)}" if min(counts) < max(counts) else str(max(counts))
    if config.sweep:
        say(f"{len(counts)} combination{'s' * (len(counts) > 1)} on {each} training examples")
    elif config.many:
        say(f"{len(counts)} tenant{'s' * (len(counts) > 1)} with {each} training examples, {sum(counts)} in all")
    else:
        say(f"training data: {train[''].report()}")
    distinct = {id(one): one for one in data.values()}  # the combinations of a sweep share theirs
    if config.data.max_seq_length is None:
        lengths = np.concatenate([one.train.examples.lengths for one in distinct.values()])
        say(describe_lengths(lengths, config.data.packing))
    say_long("validation", [one.validation for one in distinct.values()])
    say_long("test", [one.test for one in distinct.values()])
    say_scoring(data)


def say_scoring(data: Mapping[str, TenantData]) -> None:
    """Says which metric was chosen from the data, and for which tenants."""
    alike: dict[str, list[str]] = {}
    for name, one in data.items():
        if one.rule.from_data:
            alike.setdefault(one.rule.describe(), []).append(name)
    for described, names in alike.items():
        say(f"metric: {described}" + (f": {safe_names(names)}" if len(names) < len(data) else ""))


def say_unscored(config: RunConfig, tenants: Sequence[Tenant]) -> None:
    """Says that there is no validation or test data."""
    few = "data.validation_split holds out none of so few rows" if config.data.validation_split else ""
    place = "write validation.jsonl into a tenant's folder" if config.data.tenants else "data.validation"
    advice = few or f"set data.validation_split=0.1, or {place}"
    without = [tenant.name for tenant in tenants if not tenant.validation]
    if not any(tenant.validation or tenant.test for tenant in tenants):
        say(f"no validation data, so nothing is scored: {advice}")
    elif without and (few or config.data.tenants):
        whose = f" of {safe_names(without)} ({len(without)} of {len(tenants)} tenants)"
        say(f"no validation data{whose * (config.data.tenants is not None)}: {advice}")
    if config.eval.test and not any(tenant.test for tenant in tenants):
        say("eval.test=true scores nothing: there is no test data; set data.test")


def worse_than_base(scores: Records, learning_rate: float) -> str | None:
    """What is wrong with the adapter by its scores, and what to do about it; None if nothing is, or if it was not
    compared. A loss may rise while the metric gets better: the model becomes too sure of the answers it gets wrong."""
    for split in ("validation", "test"):
        base, adapter = scores.get(f"{split}_base"), scores.get(split)
        if base is None or adapter is None:
            continue
        before, after, metric = base["values"], adapter["values"], adapter["metric"]
        better = metric != "loss" and after[metric] > before[metric]
        if not better and after["loss"] > before["loss"] + ABOVE_BASE * abs(before["loss"]):
            return (
                f"{split} loss {after['loss']:.3g} is above the base model's {before['loss']:.3g}; lower "
                f"train.learning_rate ({learning_rate:g})"
            )
    return None
