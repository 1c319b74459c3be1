"""Each token is counted once, for the tenant that it was for, however tenants come and go."""

from types import SimpleNamespace

from para_jax.server.traffic import Outcome, Traffic

STREAM = SimpleNamespace(times=SimpleNamespace(queued=0.0, started=0.0, first_token=None))


def of(*names):
    models = SimpleNamespace(names=names)
    models.has = lambda name: name in models.names
    return Traffic(models), models


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
