"""Says before a run trains what its scores will leave out."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import RunConfig
from ..data.sources import unread
from ..evaluation.defaults import missing_answer
from ..io.messages import say, warn
from ..io.untrusted import safe_names
from .tenants import Tenant


def say_unscored(config: RunConfig, tenants: Sequence[Tenant]) -> None:
    """Says that there is no validation or test data, and which answers a limit leaves out."""
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
        say(f"eval.test=true scores nothing: {reason_without_test(tenants)}")
    left_out = [answers_left_out(tenant, named=config.data.tenants is not None) for tenant in tenants]
    said = list(dict.fromkeys(line for lines in left_out for line in lines))  # a sweep shares its data
    if said:
        warn(said[0] + (f" (and {len(said) - 1} more like this)" if len(said) > 1 else ""))


def reason_without_test(tenants: Sequence[Tenant]) -> str:
    """Why no tenant has test data."""
    for tenant in tenants:
        if beside := unread(tenant.config.data, "test"):
            return f"{beside} is not read; set data.test"
    return "there is no test data; set data.test, or write test.jsonl into the folder that data.train names"


def answers_left_out(tenant: Tenant, *, named: bool) -> list[str]:
    """A line for each limit (eval.limit, eval.test_limit) that leaves out an answer of sorted data. The best adapter
    would be chosen without that answer."""
    section, whose = tenant.config.eval, f"{tenant.name}: " if named else ""
    limits = ("eval.limit", tenant.validation, section.limit), ("eval.test_limit", tenant.test, section.test_limit)
    return [
        f"{whose}{task.name}: the first {limit} examples have no answer {missing}; shuffle the data, or raise {field}"
        for field, task, limit in limits
        if task and limit and (missing := missing_answer(task.records, limit))
    ]
