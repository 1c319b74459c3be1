"""Fields that a config sets although nothing of its run reads them."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from math import inf

from .run import RunConfig, is_tfds

#: Metrics for which choices may be ranked.
RANKING = {"accuracy", "macro_f1", "matthews"}


def unused_fields(config: RunConfig, metrics: Collection[str] = ()) -> Iterator[str]:
    """A line for each such field: its name, its value, and why nothing reads it. data.train next to data.tenants is
    none: many configs have one.

    Args:
        metrics: those of the run's validation and test data. If none are given, eval.metric.
    """
    adapter, data, train, evaluation = config.adapter, config.data, config.train, config.eval
    start = config.profiler.start_step
    one_adapter, tenants = not config.many, bool(data.tenants)
    without_rank = not (config.sweep.method or hasattr(adapter, "r"))
    without_biases = not (config.sweep.method or getattr(adapter, "up_bias", False))
    used = set(metrics or filter(None, [evaluation.metric]))
    metric = f"eval.metric={' and '.join(sorted(used))}"
    unread = [
        ("data.train", tenants, "data.tenants is set; data.tenants=null trains on data.train instead"),
        ("data.validation", tenants, "data.tenants is set; each tenant's folder has its own"),
        ("data.test", tenants, "data.tenants is set; each tenant's folder has its own"),
        ("data.buckets", data.packing, "data.packing has one length, data.max_seq_length"),
        ("data.data_dir", not any(map(is_tfds, (data.train, data.validation, data.test))), "it is for tfds: data"),
        ("train.num_epochs", train.max_steps is not None, f"train.max_steps={train.max_steps} comes first"),
        ("train.learning_rate", bool(config.sweep.learning_rate), "sweep.learning_rate has the rates"),
        ("train.rows_per_tenant", one_adapter, "the run trains one adapter; train.per_device_batch_size has its rows"),
        ("train.tenants_at_once", one_adapter, "the run trains one adapter"),
        ("train.sampling", one_adapter, "the run trains one adapter"),
        ("train.up_lr_ratio", without_rank, "the adapter's method has no matrices that lead out of a rank"),
        ("train.bias_lr_ratio", without_biases, "the adapter has no biases; adapter.up_bias=true makes them"),
        ("eval.choices", bool(used) and not used & RANKING, f"{metric} ranks no choices"),
        ("eval.max_new_tokens", bool(used) and used <= {"loss", "accuracy"}, f"{metric} writes no answers"),
        ("eval.test_limit", not evaluation.test, "eval.test=true scores the test data"),
        ("profiler.steps", start is None, "profiler.start_step says where the trace begins"),
        ("profiler.start_step", (start or 0) > (train.max_steps or inf), f"the run has {train.max_steps} steps"),
    ]
    for name, nothing_reads_it, why in unread:
        section, field = name.split(".")
        held = getattr(config, section)
        value, default = getattr(held, field), getattr(type(held), field)
        if nothing_reads_it and value != default:
            yield f"{name}={value} has no effect: {why}"
    if config.seed and config.sweep.seed:
        yield f"seed={config.seed} has no effect: sweep.seed has the seeds"
