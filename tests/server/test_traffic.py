"""Each token is counted once, for the tenant that it was for, however tenants come and go."""

from types import SimpleNamespace

from para_jax.server.traffic import OTHER, Outcome, Traffic

STREAM = SimpleNamespace(times=SimpleNamespace(queued=0.0, started=0.0, first_token=None))


def of(*names, limit=1000):
    models = SimpleNamespace(names=names)
    models.has = lambda name: name in models.names
    return Traffic(models, limit), models


def begun(traffic, tenant, new=0, streams=(STREAM,)):
    outcome = Outcome("POST", "/v1/completions", "id", served=True, tenant=tenant, prompt_tokens=10)
    traffic.begin(outcome)
    outcome.note_times(streams)
    outcome.note_piece(0, 0.0, new, None)
    return outcome


def new_tokens(traffic):
    return {name: counts.new_tokens for name, counts in traffic.by_tenant().items()}


def test_tokens_are_counted_while_they_come_and_once():
    traffic, _ = of("A", "B")
    mine, _ = begun(traffic, "A"), begun(traffic, None, 5)
    assert new_tokens(traffic) == {None: 5, "A": 0}
    mine.note_times([STREAM])
    mine.note_piece(0, 0.0, 7, "stop")
    assert new_tokens(traffic) == {None: 5, "A": 7} and traffic.total.new_tokens == 12
    traffic.end(mine)
    assert new_tokens(traffic) == {None: 5, "A": 7} and traffic.total.prompt_tokens == 20
    assert traffic.by_tenant()["A"].requests == {"completed": 1} and not traffic.by_tenant()[None].requests


def test_a_prompt_that_never_left_the_queue_is_not_counted():
    traffic, _ = of("A")
    outcome = begun(traffic, "A", streams=())
    outcome.error = "client_left"
    traffic.end(outcome)
    assert traffic.by_tenant()["A"].prompt_tokens == 0 and traffic.by_tenant()["A"].requests == {"client_left": 1}


def test_tenants_above_the_limit_share_counts_and_those_that_have_left_make_room():
    traffic, models = of("A", "B", "C", limit=2)
    for name in ("A", "B", "C", "C", None):
        begun(traffic, name, 1)
    assert new_tokens(traffic) == {None: 1, "A": 1, "B": 1, OTHER: 2}
    models.names = ("B", "C")
    assert new_tokens(traffic) == {None: 1, "B": 1, OTHER: 2}
    begun(traffic, "C", 1)
    assert new_tokens(traffic) == {None: 1, "B": 1, "C": 1, OTHER: 2} and traffic.total.new_tokens == 6


def test_a_tenant_that_is_named_other_shares_its_counts():
    traffic, _ = of(OTHER, "B", limit=1)
    begun(traffic, OTHER, 1), begun(traffic, "B", 1), begun(traffic, "C", 1)
    assert new_tokens(traffic) == {None: 0, "B": 1, OTHER: 2}
