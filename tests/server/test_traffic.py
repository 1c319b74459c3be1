"""Each token is counted once, for the tenant that it was for, however tenants come and go."""

from types import SimpleNamespace

from para_jax.server.outcome import Outcome
from para_jax.server.traffic import OTHER, Traffic


def outcome(tenant, new=0, **fields):
    times = {"received": 0.0, "queued": 0.0, "started": 0.0}
    given = {"served": True, "tenant": tenant, "prompt_tokens": 10, "new_tokens": new} | times | fields
    return Outcome("POST", "/v1/completions", "id", **given)


def of(*names, limit=1000):
    models = SimpleNamespace(names=names)
    return Traffic(models, limit), models


def new_tokens(traffic):
    return {name: counts.new_tokens for name, counts in traffic.by_tenant().items()}


def test_tokens_are_counted_while_they_come_and_once():
    traffic, _ = of("A", "B")
    mine, base = outcome("A"), outcome(None, 5)
    traffic.begin(mine)
    traffic.begin(base)
    assert new_tokens(traffic) == {None: 5, "A": 0}
    mine.new_tokens = 7
    assert new_tokens(traffic) == {None: 5, "A": 7} and traffic.total().new_tokens == 12
    traffic.end(mine)
    mine.new_tokens = 100  # whatever happens to the record later
    assert new_tokens(traffic) == {None: 5, "A": 7} and traffic.total().prompt_tokens == 20
    assert traffic.by_tenant()["A"].requests == {"completed": 1} and not traffic.by_tenant()[None].requests


def test_a_prompt_that_never_left_the_queue_is_not_counted():
    traffic, _ = of("A")
    traffic.end(outcome("A", started=None, error="client_left"))
    assert traffic.by_tenant()["A"].prompt_tokens == 0 and traffic.by_tenant()["A"].requests == {"client_left": 1}


def test_tenants_above_the_limit_share_counts():
    traffic, models = of("A", "B", "C", limit=2)
    for name in ("A", "B", "C", "C", None, "unknown"):
        traffic.end(outcome(name, 1))
    assert new_tokens(traffic) == {None: 1, "A": 1, "B": 1, OTHER: 3}
    models.names = ("B", "C")
    assert new_tokens(traffic) == {None: 1, "B": 1, OTHER: 3}
    traffic.end(outcome("C", 1))  # there is room now
    assert new_tokens(traffic) == {None: 1, "B": 1, "C": 1, OTHER: 3}
    assert traffic.total().new_tokens == 7


def test_what_goes_on_when_its_tenant_is_unloaded_never_counts_for_a_later_one_of_its_name():
    traffic, models = of("A")
    early = outcome("A", 3)
    traffic.begin(early)
    models.names = ()
    assert new_tokens(traffic) == {None: 0, OTHER: 3}
    models.names = ("A",)
    traffic.begin(outcome("A", 5))
    assert new_tokens(traffic) == {None: 0, "A": 5, OTHER: 3}
    traffic.end(early)
    assert new_tokens(traffic) == {None: 0, "A": 5, OTHER: 3} and traffic.total().new_tokens == 8


def test_a_tenant_that_comes_back_begins_at_zero_although_no_one_looked_meanwhile():
    traffic, models = of("A")
    early = outcome("A", 3)
    traffic.begin(early)
    traffic.end(outcome("A", 4))
    models.on_forget("A")
    traffic.begin(outcome("A", 5))
    traffic.end(early)
    assert new_tokens(traffic) == {None: 0, "A": 5, OTHER: 3} and traffic.total().new_tokens == 12


def test_a_tenant_that_is_named_other_shares_its_counts():
    traffic, _ = of(OTHER, "B", limit=1)
    for name in (OTHER, "B"):
        traffic.begin(outcome(name, 1))
        traffic.end(outcome(name, 1))
    assert new_tokens(traffic) == {None: 0, OTHER: 4}
