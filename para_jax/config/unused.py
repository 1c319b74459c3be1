"""Fields that a config sets although nothing of its run reads them."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from .run import RunConfig

#: Metrics for which choices may be ranked.
RANKING = {"accuracy", "macro_f1", "matthews"}


def unused_fields(config: RunConfig, metrics: Collection[str] = ()) -> Iterator[str]:
    """A line for each such field: its name, its value, and why nothing reads it.

    Args:
        metrics: those of the run's validation and test data. If none are given, eval.metric.
    """
    train, evaluation = config.train, config.eval
    one_adapter, tenants = not config.many, bool(config.data.tenants)
    used = set(metrics or filter(None, [evaluation.metric]))
    metric = f"eval.metric={' and '.join(sorted(used))}"
    unread = [
        ("data.validation", tenants, "data.tenants is set; each tenant's folder has its own"),
        ("data.test", tenants, "data.tenants is set; each tenant's folder has its own"),
        ("train.num_epochs", train.max_steps is not None, f"train.max_steps={train.max_steps} comes first"),
        ("train.learning_rate", bool(config.sweep.learning_rate), "sweep.learning_rate has the rates"),
        ("train.rows_per_tenant", one_adapter, "the run trains one adapter; train.per_device_batch_size has its rows"),
        ("train.tenants_at_once", one_adapter, "the run trains one adapter"),
        ("train.sampling", one_adapter, "the run trains one adapter"),
        ("eval.choices", bool(used) and not used & RANKING, f"{metric} ranks no choices"),
        ("eval.max_new_tokens", bool(used) and used <= {"loss", "accuracy"}, f"{metric} writes no answers"),
        ("eval.test_limit", not evaluation.test, "eval.test=true scores the test data"),
    ]
    for name, nothing_reads_it, why in unread:
        section, field = name.split(".")
        held = getattr(config, section)
        value, default = getattr(held, field), getattr(type(held), field)
        if nothing_reads_it and value != default:
            yield f"{name}={value} has no effect: {why}"
