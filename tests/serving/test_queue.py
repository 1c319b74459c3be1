"""Tenants that wait are served in turn, whatever the order and number of their requests."""

from hypothesis import given, settings
from hypothesis import strategies as st

from para_jax.serving.queue import FairQueue

CALLS = st.lists(st.tuples(st.sampled_from(["put", "put", "take", "remove"]), st.integers(0, 3), st.integers(0, 30)))


@settings(max_examples=300)
@given(CALLS)
def test_a_tenant_waits_for_one_item_of_every_other_at_most(calls):
    queue, lines, number = FairQueue(), {}, 0
    passed = {}  # by tenant that waits: who was served since it became the first to wait in its line
    for call, tenant, chosen in calls:
        if call == "put":
            queue.put(tenant, number, (tenant, number))
            lines.setdefault(tenant, []).append(number)
            passed.setdefault(tenant, [])
            number += 1
        elif call == "remove" and lines.get(tenant):
            gone = lines[tenant].pop(chosen % len(lines[tenant]))
            queue.remove(tenant, gone)
            queue.remove(tenant, gone)
        elif call == "take" and any(lines.values()):
            head = queue.head()
            assert queue.take(head[0]) == head
            taken, item = head
            assert item == lines[taken].pop(0)
            for other in passed:
                passed[other] = [] if other == taken else [*passed[other], taken]
        lines = {name: line for name, line in lines.items() if line}
        passed = {name: seen for name, seen in passed.items() if name in lines}
        assert all(len(seen) == len(set(seen)) for seen in passed.values())
        assert len(queue) == sum(map(len, lines.values())) and all(queue.waiting(t) == len(lines[t]) for t in lines)
    assert (queue.head() is None) == (not lines)


def test_the_first_items_that_fit_pass_those_that_do_not():
    queue = FairQueue()
    for number, (tenant, item) in enumerate([("a", 2), ("a", 1), ("b", 1), ("b", 2), ("c", 3)]):
        queue.put(tenant, number, item)
    odd = lambda item: item % 2 == 1  # noqa: E731
    assert queue.head(odd) == 1 and queue.take("b") == 1
    assert queue.head(odd) == 3 and queue.take("c") == 3
    assert queue.head(odd) is None and queue.head() == 2 and len(queue) == 3
