"""A stream gives an answer in pieces to a thread that doesn't drive, and says how far its request is."""

import gc
import threading
import time

import pytest
from tiny_engine import BLOCK, LENGTH, SLOTS, answers, bank_of, engine_of, prompt, tenants_of
from tiny_run import tokenizer

from para_jax import Request
from para_jax.data.examples import encode_prompt
from para_jax.serving.open_requests import QueueFull
from para_jax.serving.queue import FairQueue
from para_jax.serving.stream import Stream


@pytest.fixture(scope="module")
def tenants(model):
    return tenants_of(model)


@pytest.fixture
def bank(model, tenants):
    return bank_of(model, tenants)


def test_what_is_taken_between_rounds_is_the_answer(model, bank):
    engine, request = engine_of(model, bank), Request(prompt(1), "A", 11, temperature=1.0, n=4, seed=3, stop="w99")
    engine.submit(request)
    expected = answers(engine)
    stream = engine.open_stream(request)
    assert isinstance(stream, Stream) and stream.take() == [] and not stream.ended
    taken = []
    while not stream.ended:
        assert engine.step() == []
        taken += stream.take()
    assert stream.take() == [] and engine.open == 0
    for (_, index), completion in expected.items():
        own = [piece for piece in taken if piece.index == index]
        assert [token for piece in own for token in piece.tokens] == completion.tokens
        assert "".join(piece.text for piece in own) == completion.text and len(own) > 1
        assert [piece.finish_reason for piece in own] == [None] * (len(own) - 1) + [completion.finish_reason]


def test_the_entry_of_a_stream_answers(model, tenants, bank):
    engine, entry = engine_of(model, bank), bank.entry("A")
    engine.submit(Request(prompt(4), "A", 5))
    (expected,) = answers(engine).values()
    bank.replace("A", tenants["B"])
    (piece,) = engine.open_stream(Request(prompt(4), "A", 5), entry=entry)
    assert piece.tokens == expected.tokens != [*engine.stream(Request(prompt(4), "A", 5))][0].tokens


def test_a_closed_stream_cancels_its_own_request_and_no_later_one_of_its_id(model, bank):
    engine = engine_of(model, bank)
    first = engine.open_stream(Request(prompt(1), "A", 20, id="x"))
    engine.step()
    first.close()
    assert engine.open == 0 and first.times.ended is not None
    assert [(piece.finish_reason, piece.error) for piece in first.take()] == [("error", "cancelled")] and first.ended
    second = engine.open_stream(Request(prompt(1), "A", 6, id="x"))
    first.close()
    (*_, last) = second
    assert last.finish_reason == "length"


def test_closing_a_stream_before_its_first_piece_cancels_its_request(model, bank):
    engine = engine_of(model, bank)
    engine.stream(Request(prompt(1), "A", 20)).close()
    del_unused = engine.stream(Request(prompt(1), "A", 20))
    del del_unused
    assert engine.open == 0 and engine.waiting == {}


@pytest.mark.long
def test_a_stream_that_the_collector_finds_within_a_round_is_cancelled_in_the_next(model, bank, monkeypatch):
    engine = engine_of(model, bank)
    kept = [engine.stream(Request(prompt(1), "A", 20, id="unread"))]
    kept.append(kept)
    del kept
    (sample,) = engine._requests.tickets["unread"].samples
    head = FairQueue.head

    def collected(queue, *fits):  # between looking at the queue and taking from it
        found = head(queue, *fits)
        gc.collect()
        return found

    monkeypatch.setattr(FairQueue, "head", collected)
    engine.submit(Request(prompt(2), "B", 5, id="read"))
    assert [answer.finish_reason for answer in engine.run()] == ["length"] and engine.open == 0
    assert sample.completion.error == "cancelled"


def test_a_stream_knows_its_prompt_and_what_was_cached(model, bank):
    engine, asked = engine_of(model, bank), prompt(2, 4 * BLOCK)
    ids = encode_prompt(tokenizer(), asked)
    for tenant in (None, "R", "A"):  # R shares the base model's blocks; A's prompt is prefilled whole
        stream = engine.open_stream(Request(asked, tenant, 2, n=2))
        assert stream.prompt_ids == ids and stream.cached_tokens == 0
        list(stream)
        complete = (len(ids) - 1) // BLOCK * BLOCK
        assert stream.cached_tokens == (complete if tenant == "R" else 0)
        again = engine.open_stream(Request(asked, tenant, 2))
        list(again)
        assert again.cached_tokens == len(ids)


def test_times_are_those_of_the_request(model, bank):
    engine, before = engine_of(model, bank), time.monotonic()
    others = [engine.submit(Request(prompt(i), "A", 8)) for i in range(SLOTS)]
    stream = engine.open_stream(Request(prompt(9), "A", 9))
    times = stream.times
    engine.step()
    assert before <= times.queued and (times.started, times.first_token, times.ended) == (None, None, None)
    while times.started is None:
        engine.step()
    assert times.first_token is not None and times.ended is None
    assert len(answers(engine)) <= len(others)
    assert times.queued < times.started < times.first_token < times.ended <= time.monotonic()


def test_samples_that_run_and_wait_are_counted_by_tenant(model, bank):
    engine = engine_of(model, bank)
    assert (engine.running, engine.waiting, engine.kv_usage) == ({}, {}, 0)
    engine.submit(Request(prompt(0, 6), "A", 20, n=2, ignore_eos=True))
    engine.submit(Request(prompt(1, 6), None, 20, n=3, ignore_eos=True))
    assert (engine.running, engine.waiting) == ({}, {"A": 2, None: 3})
    engine.step()
    running, waiting = engine.running, engine.waiting
    assert sum(running.values()) == SLOTS and sum(waiting.values()) == 2
    assert {name: running.get(name, 0) + waiting.get(name, 0) for name in ("A", None)} == {"A": 2, None: 3}
    used = engine.kv_usage
    assert 0 < used < 1
    engine.step()
    assert used < engine.kv_usage <= SLOTS * 26 / (SLOTS * LENGTH)
    answers(engine)
    assert (engine.running, engine.waiting, engine.kv_usage) == ({}, {}, 0)


def test_a_driver_waits_until_a_request_is_open(model, bank):
    engine, begun = engine_of(model, bank), time.monotonic()
    assert engine.wait(0.05) is False and time.monotonic() - begun >= 0.05
    asks = threading.Timer(0.05, engine.submit, [Request(prompt(0), max_new_tokens=1)])
    asks.start()
    assert engine.wait(60) is True and time.monotonic() - begun < 30
    answers(engine)
    assert engine.wait(0) is False


def test_a_full_queue_says_whose_it_is(model, bank):
    engine = engine_of(model, bank, queue_limit=3, queue_limit_per_tenant=2)
    engine.open_stream(Request(prompt(0), "A", 3, n=2))
    with pytest.raises(QueueFull, match="2 of 2") as of_tenant:
        engine.open_stream(Request(prompt(0), "A", 3))
    engine.open_stream(Request(prompt(0), "B", 3))
    with pytest.raises(QueueFull, match="3 of 3") as of_all:
        engine.open_stream(Request(prompt(0), "C", 3))
    assert of_tenant.value.tenant_full and not of_all.value.tenant_full


def test_a_refused_request_raises_at_the_call(model, bank):
    engine = engine_of(model, bank)
    with pytest.raises(ValueError, match="nobody"):
        engine.open_stream(Request(prompt(0), "nobody"))
    assert engine.open == 0
