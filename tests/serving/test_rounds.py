"""The schedule: empty slots are filled at once, within the bound on the prompts that decoding rows wait for."""

from collections import Counter
from statistics import mean

import numpy as np
import pytest
from tiny_engine import bank_of, engine_of, tenants_of

from para_jax import Request
from para_jax.serving import decoder, prefills

PADDED = 16
"""the shortest padded length of a prompt that is prefilled whole"""


@pytest.fixture(scope="module")
def bank(model):
    return bank_of(model, tenants_of(model))


def prompts(count, length=12):
    return [tuple(row) for row in np.random.default_rng(0).integers(20, 250, (count, length)).tolist()]


def submit_all(engine, count, tenants, new_tokens):
    for i, ids in enumerate(prompts(count)):
        name, new = tenants[i % len(tenants)], new_tokens[i % len(new_tokens)]
        engine.submit(Request(ids, name, new, ignore_eos=True))


def computed(monkeypatch):
    """Tokens of each program that reads prompts, with padding."""
    found = Counter()

    def counted(kind, real, tokens):
        def count(*arguments, **options):
            found[kind] += tokens(arguments).size
            return real(*arguments, **options)

        return count

    monkeypatch.setattr(decoder, "prefill", counted("whole", decoder.prefill, lambda a: a[2]))
    monkeypatch.setattr(prefills, "prefill_chunk", counted("chunk", prefills.prefill_chunk, lambda a: a[3].tokens))
    return found


@pytest.mark.parametrize("slots, tenants, new_tokens", [
    (1, ("A", None, "R", "C"), (1, 2, 3)), (8, ("A", "B"), (8, 12)), (8, (None, "R"), (4, 25)),
])  # fmt: skip
def test_slots_stay_full_while_requests_wait(model, bank, slots, tenants, new_tokens):
    engine = engine_of(model, bank, slots=slots, prefill_chunk=64, block_size=16)
    submit_all(engine, 4 * slots + 12, tenants, new_tokens)
    live = []
    while engine.open:
        engine.step()
        if engine.waiting:
            live.append(engine.decoding / slots)
    assert len(live) > 1 and mean(live) >= 0.9


@pytest.mark.parametrize("tenants", [("A", "B"), (None, "R")])
def test_a_round_computes_no_more_tokens_of_prompts_than_the_bound(model, bank, monkeypatch, tenants):
    engine = engine_of(model, bank, slots=8, prefill_chunk=16, max_prefill_tokens=4 * PADDED)
    submit_all(engine, 40, tenants, (3, 9))
    tokens, before, rounds = computed(monkeypatch), Counter(), []
    while engine.open:
        engine.step()
        rounds.append(tokens - before)
        before = tokens.copy()
    totals = [each.total() for each in rounds]
    assert max(totals) == 4 * PADDED and totals.count(max(totals)) > 2
    if len(tenants) == 4:
        assert any(each["whole"] and each["chunk"] for each in rounds), "both kinds take turns"


@pytest.mark.parametrize("tenant", ["A", None])
def test_one_long_prompt_holds_up_rows_for_a_quarter_of_the_bound(model, bank, monkeypatch, tenant):
    engine = engine_of(model, bank, slots=2, max_length=128, prefill_chunk=16, max_prefill_tokens=8 * PADDED)
    engine.submit(Request(prompts(1)[0], None, 40, ignore_eos=True))
    engine.step()
    engine.submit(Request(prompts(1, length=90)[0], tenant, 2, ignore_eos=True))
    tokens, before, rounds = computed(monkeypatch), Counter(), []
    while engine.open:
        engine.step()
        rounds.append((tokens - before).total())
        before = tokens.copy()
    assert max(rounds) == (128 if tenant else 2 * PADDED), "one that can't be cut may always run"


def test_a_prompt_above_the_bound_is_computed_all_the_same(model, bank):
    engine = engine_of(model, bank, max_prefill_tokens=1)
    submit_all(engine, 8, ("A", None, "R"), (3,))
    assert all(answer.error is None for answer in engine.run())
