"""The answerer: what is asked once, refused, kept, and left behind after an interrupt."""

import re
from contextlib import closing
from copy import deepcopy

import jax
import pytest
from golden_models import backbone, strong
from tiny_questions import ROWS, answers, asked, bank_of
from tiny_run import tokenizer

from para_jax import AdapterBank, Engine, ParaConfig, Request, generate, init_adapter
from para_jax.backbone.content import backbone_content
from para_jax.evaluation import answers as answering
from para_jax.evaluation.answers import Answerer
from para_jax.evaluation.journal import AnswerJournal
from para_jax.evaluation.questions import (
    Generation,
    Likelihood,
    Scored,
    Written,
)


@pytest.mark.long
def test_written_answers_are_those_of_generate_alone_and_mixed():
    questions = [(tenant, Generation(one.context[:9], 4)) for one in asked()[::3][:3] for tenant in ("A", None)]
    found = answers("llama", questions, "A")
    texts = [" ".join(f"w{i}" for i in one.context) for _, one in questions]
    options = dict(tokenizer=tokenizer(), adapters=bank_of("llama", "A"), max_new_tokens=4)
    expected = generate(backbone("llama"), texts, tenants=[tenant for tenant, _ in questions], **options)
    assert [one.text for one in found] == expected and len(set(expected)) > 3
    assert answers("llama", questions[::2], "A") == found[::2]


def test_a_written_answer_ends_at_its_own_stop_ids():
    one = Generation(asked()[0].context, 6)
    (answer,) = answers("llama", [("A", one)], "A")
    found = re.findall("w[0-9]+", answer.text)
    assert answer.tokens == len(found) == 6
    stopped = one._replace(stop_ids=(int(found[3][1:]), 255))
    first = found.index(found[3])
    assert answers("llama", [("A", stopped)], "A") == [Written("".join(found[:first]), first)]
    assert (
        answers("llama", [("A", stopped._replace(stop=(found[1],)))], "A")[0].text
        == answer.text[: answer.text.index(found[1])]
    )


def test_a_likelihood_gives_away_the_answer_of_its_own_adapter_and_factors_alone(monkeypatch):
    """What one of them writes is no answer of the base model, nor of the adapter with another prompt's factors."""

    def computed(self, pending, *_):
        return ((one, Written("computed", 1), 0) for one in pending)

    monkeypatch.setattr(Answerer, "_in_batches", computed)
    monkeypatch.setattr(Answerer, "_by_engine", computed)
    bank, greedy, one = bank_of("llama", "A"), Likelihood((3, 4), (5, 6, 7)), Generation((3, 4), 2)
    journal = AnswerJournal()
    journal.add((bank.entry("A").version, greedy), Scored(-1.0, True))
    questions = [("A", greedy), ("A", one), (None, one), ("A", one._replace(reads=(8,)))]
    _, *found = Answerer(backbone("llama"), bank, tokenizer(), journal=journal).answer(questions)
    assert [answer.text == "computed" for answer in found] == [False, True, True]


@pytest.mark.long
def test_an_answer_ends_at_the_stop_ids_of_the_engine_that_is_given(tmp_path):
    """Also an answer that its likelihood gives away; and the same journal keeps answers with other stop ids apart."""
    model, question = backbone("llama"), Generation(asked()[0].context, 6)
    engine = Engine(model, None, tokenizer(), slots=2, max_length=64, stop_ids=())
    engine.submit(Request(question.context, max_new_tokens=6))
    (written,) = engine.run()
    tokens, end = written.tokens, written.tokens[3]
    first = tokens[: tokens.index(end)]
    for given in ([], [(None, Likelihood(question.context, tuple(tokens)))]):
        journal = AnswerJournal(tmp_path / str(len(given)) / "answers.jsonl")
        for stop_ids, expected in ((), tokens), ((end,), first):
            engine = Engine(model, None, tokenizer(), slots=2, max_length=64, stop_ids=stop_ids)
            how = dict(rows=ROWS, journal=journal, backbone=backbone_content(model))
            answerer = Answerer(model, None, tokenizer(), engine=engine, **how)
            assert answerer.answer([*given, (None, question)])[-1].tokens == len(expected)


@pytest.mark.long
def test_a_journal_answers_equal_questions_for_the_same_content_only(tmp_path, monkeypatch):
    model, questions = backbone("llama"), [("A", one) for one in asked()[:4]]
    content = backbone_content(model)

    def answered(names, tenant, backbone=content):
        journal = AnswerJournal(tmp_path / "a" / "answers.jsonl")
        answerer = Answerer(model, bank_of("llama", names), tokenizer(), rows=ROWS, journal=journal, backbone=backbone)
        found = answerer.answer([(tenant, one) for _, one in questions] * 2)
        return found[: len(questions)], answerer.tokens

    first, tokens = answered("ABCD", "A")
    contexts = {one.context for _, one in questions}
    assert len(contexts) == 2 and len(questions) == 4  # each is computed once
    assert tokens == sum(map(len, contexts)) + sum(len(one.continuation) - 1 for _, one in questions)
    other, computed = answered("ABCD", "B")
    assert computed and other != first

    def never(model, bank, questions, *_):
        assert not questions, "asked again"
        return iter(())

    monkeypatch.setattr(answering, "likelihoods", never)
    assert answered("BACD", "A") == (first, 0)  # under another version, in another bank
    with pytest.raises(AssertionError, match="asked again"):
        answered("ABCD", "A", "another backbone")


def stop(*_):
    raise KeyboardInterrupt


def test_an_engine_goes_on_after_an_interrupt_in_a_round():
    model, bank, words = backbone("llama"), bank_of("llama", "A"), deepcopy(tokenizer())
    engine = Engine(model, bank, words, slots=2, max_length=32)
    answerer = Answerer(model, bank, words, rows=ROWS, engine=engine)
    questions = [("A", Generation(one.context[:9], 4, ("w1 w1",))) for one in asked()[::3][:5]]
    interrupts, decode = iter([False] * 5 + [True]), words.decode
    words.decode = lambda *a, **k: stop() if next(interrupts, False) else decode(*a, **k)
    with pytest.raises(KeyboardInterrupt):
        answerer.answer(questions)
    assert not engine.open and next(interrupts, None) is None
    assert answerer.answer(questions) == answers("llama", questions, "A")


def test_replacing_an_adapter_meanwhile_changes_no_answer(monkeypatch):
    """The tenant's adapter is replaced while likelihoods are answered; what is written follows them."""
    model = backbone("llama")
    bank = AdapterBank(model.config, max_r=4)
    old, new = (strong(init_adapter(ParaConfig(r=4), model.config), seed, 0.3) for seed in (1, 2))
    bank.add("A", old)
    questions = [("A", asked()[0]), *(("A", Generation(one.context[:9], 4)) for one in asked()[::3][:2])]
    journal, real = AnswerJournal(), answering.likelihoods

    def replaced(*arguments):
        yield from real(*arguments)
        bank.replace("A", new)

    monkeypatch.setattr(answering, "likelihoods", replaced)
    answerer = Answerer(model, bank, tokenizer(), rows=ROWS, journal=journal)
    first = bank.entry("A")
    found = answerer.answer(questions)
    assert answerer.entries["A"] is first is not bank.entry("A")
    bank.replace("A", old)
    monkeypatch.setattr(answering, "likelihoods", real)
    assert Answerer(model, bank, tokenizer(), rows=ROWS).answer(questions) == found
    bank.replace("A", new)
    assert Answerer(model, bank, tokenizer(), rows=ROWS, journal=journal).answer(questions)[1:] != found[1:]


def test_an_adapter_that_overflows_answers_nothing_and_the_others_answer_as_without_it(caplog, tmp_path):
    model, bank = backbone("llama"), AdapterBank(backbone("llama").config, max_r=4)
    adapter = strong(init_adapter(ParaConfig(r=4), model.config), 0, 0.3)
    bank.add("A", adapter)
    bank.add("wild", jax.tree.map(lambda leaf: leaf * 1e25, adapter))
    engine = Engine(model, bank, tokenizer(), slots=2, max_length=32)
    answerer = Answerer(model, bank, tokenizer(), rows=ROWS, engine=engine)
    questions = [Generation(one.context[:9], 4) for one in asked()[::3][:3]]
    found = answerer.answer([(tenant, one) for one in questions for tenant in ("A", "wild")])
    assert [one.text for one in found[1::2]] == [""] * 3 and all(one.text for one in found[::2])
    assert answerer.answer([("A", one) for one in questions]) == found[::2]
    answerer.answer([("wild", Generation((20, 21), 4))])
    (said,) = [one.getMessage() for one in caplog.records if "wild" in one.getMessage()]
    assert said.startswith("an answer of tenant 'wild' is empty") and "logits are not finite" in said
    for _ in range(2):  # asked, then in the journal
        caplog.clear()
        with closing(AnswerJournal(tmp_path / "answers.jsonl")) as journal:
            given = dict(rows=ROWS, engine=engine, journal=journal, backbone="b")
            again = Answerer(model, bank, tokenizer(), **given).answer([("wild", questions[0]), ("A", questions[0])])
        assert again == [found[1], found[0]] and [one.getMessage() for one in caplog.records].count(said) == 1
    assert (tmp_path / "answers.jsonl").read_text().count('"finite": false') == 1


@pytest.mark.parametrize("limit", ["queue_limit", "queue_limit_per_tenant"])
def test_a_small_queue_is_enough_and_an_engine_with_open_requests_is_refused(limit):
    model, bank = backbone("llama"), bank_of("llama", "A")
    engine = Engine(model, bank, tokenizer(), slots=ROWS, max_length=32, **{limit: 2})
    answerer = Answerer(model, bank, tokenizer(), rows=ROWS, engine=engine)
    questions = [("A", Generation(one.context[:9], 4)) for one in asked()[::3][:5]]
    assert answerer.answer(questions)[:3] == answers("llama", questions[:3], "A")
    engine.submit(Request("w20", "A", 4))
    with pytest.raises(ValueError, match="1 open requests"):
        answerer.answer([("A", Generation((3,), 4))])
    assert [one.error for one in engine.run()] == [None]
