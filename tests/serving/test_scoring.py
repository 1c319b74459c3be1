"""A prompt's log-probabilities are those of the teacher-forced pass, and their sums are those of the evaluation."""

import queue
import threading
from dataclasses import replace

import numpy as np
import pytest
from golden_models import backbone
from logprob_engine import CONFIGS, LENGTH, NAMES, TOP, assert_records, expected, made_bank, made_engine
from tiny_engine import answers, answers_despite, fail_after, plain, prompt
from tiny_run import tokenizer

from para_jax import Request
from para_jax.evaluation.answers import Answerer
from para_jax.evaluation.questions import Likelihood
from para_jax.serving import decoder

FREE = ("constant", "lora", "ia3")
"""the tenants for whom it doesn't matter where the prompt ends"""
SLOTS = 2


@pytest.fixture(scope="module")
def bank():
    return made_bank()


@pytest.fixture(scope="module")
def engine(bank):
    """A size that no other file has, so that its decode programs are compiled here."""
    return made_engine(bank, slots=SLOTS)


def ids(seed, length=12):
    return tuple(np.random.default_rng(seed).integers(20, 256, length).tolist())


def ask(engine, asked):
    for request in asked:
        engine.submit(request)
    return {id: completion for (id, _), completion in answers(engine).items()}


def scored(tokens, tenant, context, top=0, new=0, **options):
    return Request(tokens, tenant, new, prompt_logprobs=top, context_length=context, **options)


@pytest.mark.long
def test_nothing_is_compiled_after_warm_up(engine, compiled):
    """The first test here, before others could compile what warm_up forgot."""
    engine.warm_up()
    before = len(compiled)
    assert before
    asked = [Request(ids(i, 4 + 4 * i), name, 3, i % 2, logprobs=i % 3) for i, name in enumerate(NAMES)]
    asked += [replace(one, prompt_logprobs=2, context_length=len(one.prompt)) for one in asked]
    asked += [scored(ids(i, 5 * i + 2), name, 2, new=i % 2) for i, name in enumerate(NAMES)]
    assert len(ask(engine, asked)) == len(asked) and len(compiled) == before


def test_they_are_those_of_the_teacher_forced_pass(engine, bank):
    asked = [
        scored(ids(i, length), name, context, top=i % (TOP + 1), id=(i, context))
        for i, name in enumerate(NAMES)
        for length, context in ((12, 5), (12, 12), (LENGTH, 25))
    ]
    found = ask(engine, asked)
    for request in asked:
        completion, context = found[request.id], request.context_length
        reference = expected(bank, request.tenant, request.prompt, context)
        assert (completion.finish_reason, completion.tokens, completion.text) == ("length", [], "")
        first, *rest = completion.prompt_logprobs
        assert first is None and completion.logprobs is None
        assert_records(rest, request.prompt[1:], reference[:-1], request.prompt_logprobs)


@pytest.mark.long
def test_sums_over_a_continuation_are_those_of_the_evaluation(engine, bank):
    asked = [(name, Likelihood(ids(i), ids(50 + i, 1 + i % 4))) for i, name in enumerate(NAMES * 2)]
    greedy = Likelihood(ids(9), (ask(engine, [Request(ids(9), "para", 1, id="greedy")])["greedy"].tokens[0],))
    asked.append(("para", greedy))
    answer = Answerer(backbone("llama"), bank, tokenizer(), rows=4).answer(asked)
    requests = [
        scored(one.context + one.continuation, name, len(one.context), top=1, id=i)
        for i, (name, one) in enumerate(asked)
    ]
    found = ask(engine, requests)
    for i, ((_, one), scores) in enumerate(zip(asked, answer, strict=True)):
        records = found[i].prompt_logprobs[len(one.context) :]
        assert sum(record.logprob for record in records) == pytest.approx(scores.logprob, abs=2e-4)
        assert all(record.top[0][0] == record.token for record in records) == scores.greedy
    assert answer[-1].greedy


def test_one_more_token_is_drawn_from_the_same_pass(engine, bank):
    for name in NAMES:
        usual = Request(ids(3), name, 1, 1.0, seed=4, logprobs=2)
        asked = [replace(usual, id="usual"), replace(usual, prompt_logprobs=0, context_length=12, id="scored")]
        asked.append(replace(asked[1], context_length=7, id="continued"))
        found = ask(engine, asked)
        assert plain(found["scored"]) == plain(found["usual"])
        (one,), (other,) = found["scored"].logprobs, found["usual"].logprobs
        assert one.logprob == pytest.approx(other.logprob, abs=1e-4)
        reference = expected(bank, name, ids(3), 7)
        assert_records(found["continued"].logprobs, found["continued"].tokens, reference[-1:], 2)


def test_a_longer_answer_is_the_usual_one(engine):
    for name in NAMES:
        usual = Request(ids(4), name, 6, logprobs=1, id="usual")
        found = ask(engine, [usual, replace(usual, prompt_logprobs=2, context_length=12, id="scored")])
        found["alone"] = ask(engine, [scored(ids(4), name, 12, top=2, id="alone")])["alone"]
        assert plain(found["scored"]) == plain(found["usual"]) and found["usual"].prompt_logprobs is None
        assert found["scored"].logprobs == found["usual"].logprobs
        assert found["scored"].prompt_logprobs == found["alone"].prompt_logprobs


def test_a_stream_has_them_at_its_end(engine):
    stream = engine.open_stream(scored(ids(1), "para", 5, top=1))
    assert stream.prompt_logprobs is None
    (piece,) = stream
    assert (piece.tokens, piece.text, piece.finish_reason) == ([], "", "length") and stream.ended
    assert [record and record.token for record in stream.prompt_logprobs] == [None, *ids(1)[1:]]
    assert stream.times.started is not None and stream.times.first_token is None


@pytest.mark.parametrize("name", [None, *CONFIGS])
def test_a_context_length_is_needed_where_it_changes_the_result(engine, name):
    request = scored(ids(2), name, None, id="free")
    if name is None or name in FREE:
        found = ask(engine, [request, replace(request, context_length=5, id="5")])
        one, other = ([record.logprob for record in found[id].prompt_logprobs[1:]] for id in ("free", "5"))
        np.testing.assert_allclose(one, other, atol=1e-5)
    else:
        with pytest.raises(ValueError, match="context_length is missing"):
            engine.open_stream(request)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt_logprobs": TOP + 1}, f"prompt_logprobs is {TOP + 1}"),
        ({"n": 2, "max_new_tokens": 1}, "prompt_logprobs"),
        ({"context_length": 13}, "context_length is 13"),
        ({"context_length": 5, "max_new_tokens": 2}, "context_length is 5"),
        ({"prompt_logprobs": None, "max_new_tokens": 1}, "context_length is 12"),
    ],
)
def test_wrong_fields_are_refused_by_name(engine, wrong, message):
    with pytest.raises(ValueError, match=message):
        engine.open_stream(replace(scored(ids(2), None, 12), **wrong))


def test_rows_that_decode_wait_for_few_prompts(bank, monkeypatch):
    """A quarter of the bound, which is one prompt, for each of two free slots."""
    engine = made_engine(bank, slots=SLOTS, max_prefill_tokens=4 * 16)
    calls, real = [], decoder.score_prompt
    monkeypatch.setattr(decoder, "score_prompt", lambda *arguments: calls.append(1) or real(*arguments))
    engine.submit(Request(prompt(0), "para", 25))
    engine.step()
    for i in range(9):
        engine.submit(scored(ids(i), "para", 5))
    rounds = []
    while engine.open:
        before = len(calls)
        engine.step()
        rounds.append(len(calls) - before)
    assert sum(rounds) == 9 and max(rounds) == 2


def test_a_scored_prompt_needs_no_slot(engine):
    for i in range(SLOTS):
        engine.submit(Request(prompt(i), "para", 20, id=i))
    engine.step()
    engine.submit(Request(prompt(9), "constant", 20, id="waits"))
    engine.submit(scored(ids(1), "para", 5, id="scored"))
    assert [completion.id for completion in engine.step()] == ["scored"]
    assert len(answers(engine)) == SLOTS + 1


def test_an_interrupted_round_gives_the_same_values_again(engine, monkeypatch):
    asked = [scored(ids(i), "para", 5, top=2, new=i % 2, id=i) for i in range(4)]
    asked += [scored(ids(9), "para", 12, top=1, new=5, id=9)]
    expected = ask(engine, asked)
    fail_after(monkeypatch, decoder, "score_prompt", (2, 5))
    for request in asked:
        engine.submit(request)
    found, raised = answers_despite(engine)
    assert raised == 2
    assert {id: completion for (id, _), completion in found.items()} == expected


def test_a_stream_keeps_the_scores_it_may_be_about_to_show_when_rounds_fail(engine, monkeypatch):
    stream = engine.open_stream(Request(ids(3), max_new_tokens=12, prompt_logprobs=0, ignore_eos=True))
    while not stream.take():
        engine.step()
    with monkeypatch.context() as patch:
        patch.setattr(engine._prefills, "advance", lambda: 1 / 0)
        for _ in range(2):  # the second one starts again
            with pytest.raises(ZeroDivisionError):
                engine.step()
    assert stream.prompt_logprobs is not None
    list(stream)


def test_a_prompt_that_fails_is_an_error(engine, monkeypatch):
    monkeypatch.setattr(decoder, "score_prompt", lambda *_: 1 / 0)
    engine.submit(scored(ids(0), None, None))
    with pytest.raises(ZeroDivisionError):
        engine.step()
    (found,) = answers(engine).values()
    assert "division" in found.error and found.prompt_logprobs is None


def test_requests_of_all_kinds_from_many_threads_get_what_they_get_alone(engine):
    """The loop of a server: threads open streams, one drives and takes what is there. Some streams are closed."""
    kinds = [scored(ids(i, 10 + i), name, 5, top=2, new=i % 2) for i, name in enumerate(NAMES)]
    kinds += [
        Request(ids(i, 5 + i), name, 9, i % 2, seed=i, n=1 + i % 2, stop="w99", logprobs=1 if i % 3 else None)
        for i, name in enumerate(NAMES)
    ]

    def answer(stream, pieces):
        """By sample: tokens, text, finish_reason and logprobs; and those of the prompt."""
        own = [[piece for piece in pieces if piece.index == index] for index in {piece.index for piece in pieces}]
        texts = [("".join(one.text for one in each), each[-1].finish_reason) for each in own]
        tokens = [[token for one in each for token in one.tokens] for each in own]
        return tokens, texts, [[r for one in each for r in one.logprobs or ()] for each in own], stream.prompt_logprobs

    alone = []
    for request in kinds:
        stream = engine.open_stream(request)
        alone.append(answer(stream, [*stream]))
    opened, ended = queue.SimpleQueue(), []

    def client(thread):
        for i in range(30):
            number = (thread * 7 + i) % len(kinds)
            opened.put((number, engine.open_stream(kinds[number]), i % 5 == 4))

    threads = [threading.Thread(target=client, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    streams, closed = [], 0
    while streams or engine.open or not opened.empty() or any(thread.is_alive() for thread in threads):
        if engine.wait(0.01):
            assert engine.step() == []
        while not opened.empty():
            streams.append((*opened.get(), []))
        for number, stream, leaves, pieces in list(streams):
            pieces += stream.take()
            if leaves and not stream.ended:
                stream.close()
                pieces += stream.take()
            if stream.ended:
                streams.remove((number, stream, leaves, pieces))
                closed += pieces[-1].error == "cancelled"
                if pieces[-1].error is None:
                    ended.append((number, answer(stream, pieces)))
    assert len(ended) + closed == 120 and closed > 5 and len({number for number, _ in ended}) == len(kinds)
    assert all(found == alone[number] for number, found in ended)
    assert (engine.running, engine.waiting, engine.kv_usage) == ({}, {}, 0)
