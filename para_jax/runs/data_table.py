"""What `inspect --data` says about the data of a run: how it is scored and padded, and a line for each tenant."""

from __future__ import annotations

from collections import Counter

from ..config import RunConfig
from ..data.packing import RowShape
from ..data.records import split_records
from ..data.tenants import own_values
from ..evaluation.defaults import RANKED
from ..evaluation.metrics import single_spaced
from ..io.checks import printable
from ..io.table import table
from .tenants import Plan, Tenant, padding_of


def data_lines(plan: Plan) -> list[str]:
    """The metric and the labels of a run on one data set, and how its rows are padded or packed."""
    config, tenant = plan.config, plan.tenants[0]
    batches = f"{tenant.order.plan.batches_per_epoch} batches of {plan.layout.tenant_rows} rows per epoch"
    held = [f"{count} {split}" for split, count in zip(("validation", "test"), held_out(tenant), strict=True) if count]
    also = f"; also {' and '.join(held)} examples" if held else ""
    metric = " and ".join([config.eval.metric or "loss", *config.eval.also])
    return [
        f"metric: {metric}" + f" over {len(config.eval.choices)} choices" * bool(config.eval.choices),
        *label_lines(config),
        padding_line(plan),
        f"{tenant.data.report()}; {describe_shapes(plan)}; {batches}{also}",
    ]


def tenant_lines(plan: Plan) -> list[str]:
    """A table of the tenants, and how their rows are padded or packed."""
    columns = ["examples", "validation", "test", "steps", "mean tokens", "longest", "longest completion"]
    rows = [["tenant", *columns, "metric", "tenant.yaml"]]
    for tenant in plan.tenants:
        sizes, section = tenant.data.examples.sizes, tenant.config.eval
        lengths = sizes.sum(axis=1)
        numbers = [len(sizes), *held_out(tenant), tenant.order.total_steps]
        tokens = [f"{lengths.mean():.0f}", lengths.max(), sizes[:, 1].max()]
        metric = f"{section.metric} of {len(section.choices)} labels" if section.choices else str(section.metric)
        rows.append([tenant.name, *map(str, (*numbers, *tokens)), metric, own_fields(plan.config, tenant)])
    count = sum(len(tenant.data.examples) for tenant in plan.tenants)
    last = f"{count} examples of {len(plan.tenants)} tenants; {describe_shapes(plan)}"
    return [table(rows, left=(0, len(columns) + 1, len(columns) + 2)), "", last, padding_line(plan)]


def held_out(tenant: Tenant) -> list[int]:
    """How many examples there are to score of the validation and the test data."""
    return [len(task.records) if task else 0 for task in (tenant.validation, tenant.test)]


def padding_line(plan: Plan) -> str:
    return f"{padding_of(plan.buckets, plan.tenants):.0%} of the training rows' tokens are padding, at least"


def describe_shapes(plan: Plan) -> str:
    """ "padded to 16 tokens (6 of completion), 24 tokens (6 of completion)"."""
    sizes = ", ".join(f"{one.length} tokens ({one.completion} of completion)" for one in plan.buckets)
    most = "".join(f", at most {one.segments} examples each" for one in plan.buckets if isinstance(one, RowShape))
    return f"packed into rows of {sizes}{most}" if most else f"padded to {sizes}"


def label_lines(config: RunConfig) -> list[str]:
    """How often the training data has each label; nothing where the completions are no labels."""
    labels, examples = Counter[str](), 0
    for record in split_records(config.data, "train") or ():
        examples += 1
        if len(labels) <= RANKED:
            labels[single_spaced(record.completion)] += 1
    if len(labels) > min(RANKED, examples // 2):
        return []
    return ["labels: " + ", ".join(f"{printable(label, 60)} {count}" for label, count in labels.most_common())]


def own_fields(config: RunConfig, tenant: Tenant) -> str:
    """What a tenant's tenant.yaml changes: "learning_rate 0.01, max_steps 7". How it is scored has a column."""
    run, found = own_values(config), own_values(tenant.config)
    names = [name for name in run if found[name] != run[name] and not name.startswith("eval.")]
    return printable(", ".join(f"{name.partition('.')[2]} {found[name]}" for name in names), 200)
