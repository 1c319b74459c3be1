"""Speculation gives the tokens that the engine gives without it, and only where it pays."""

import numpy as np
import pytest
from golden_models import FIXTURES
from tiny_engine import answers, answers_despite, bank_of, engine_of, fail_after, plain, prompt, tenants_of
from tiny_run import tokenizer

from para_jax import Request, load_backbone, make_mesh
from para_jax.data.examples import encode_prompt
from para_jax.serving import decoder, rounds
from para_jax.serving.speculation import UNMEASURED, Lookup

DRAFTED = 3


@pytest.fixture(scope="module")
def bank(model):
    return bank_of(model, tenants_of(model))


def requests(**options):
    """Requests of different prompts."""
    names = ["A", None, "B", "C", "R", "A", None]
    return [Request(prompt(i, 5 + i), name, max_new_tokens=14 - i, **options) for i, name in enumerate(names)]


@pytest.fixture
def drafted(monkeypatch):
    """Makes drafts of known answers: most tokens are right."""

    def draft(known: dict[tuple, list[int]], wrong: int):
        class Known(Lookup):
            def __init__(self, ids, most):
                super().__init__(ids, most)
                self.answer = [token if i % wrong else (token + 1) % 256 for i, token in enumerate(known[tuple(ids)])]

            def draft(self, answer):
                return self.answer[len(answer) :][: self.most]

        monkeypatch.setattr(rounds, "Lookup", Known)

    return draft


@pytest.fixture
def both(model, bank, drafted):
    """Answers of an engine that speculates, and of one that does not."""

    def answer(asked, cost=0.0, **options):
        engine = engine_of(model, bank, **options)
        expected = answered(engine, asked)
        ids = [tuple(encode_prompt(tokenizer(), request.prompt)) for request in asked]
        drafted({key: answer.tokens for key, answer in zip(ids, expected, strict=True)}, wrong=7)
        engine = engine_of(model, bank, speculative_tokens=DRAFTED, **options)
        engine._decoder.verify_cost = at(cost)
        return engine, expected

    return answer


def at(cost):
    """What a pass over drafts is taken to cost, in steps."""
    return {False: cost, True: cost}


def answered(engine, asked):
    ids = [engine.submit(request) for request in asked]
    found = answers(engine)
    return [found[id, 0] for id in ids]


@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.7, "seed": 3}, {"temperature": 1.0, "top_p": 0.6, "seed": 3}, {"ignore_eos": True}],
)
def test_answers_are_those_without_it(both, options):
    engine, expected = both(requests(**options))
    found = answered(engine, requests(**options))
    assert list(map(plain, found)) == list(map(plain, expected))
    stats = engine.speculation
    assert stats.drafted > stats.accepted > stats.drafts > 0  # wrong drafts were met too


def test_what_follows_a_wrong_token_does_not_count(model, bank, monkeypatch):
    engine, ids = engine_of(model, bank), tuple(encode_prompt(tokenizer(), prompt(0)))
    asked = [Request(ids, max_new_tokens=12, ignore_eos=True)]
    (expected,) = answered(engine, asked)
    begun, wrong = expected.tokens[: 1 + decoder.STEPS], (expected.tokens[1 + decoder.STEPS] + 1) % 256
    (after,) = answered(engine, [Request((*ids, *begun, wrong), max_new_tokens=DRAFTED - 1, ignore_eos=True)])
    drafts = {len(begun): [wrong, *after.tokens]}  # the model itself continues the wrong token like this
    monkeypatch.setattr(Lookup, "draft", lambda self, answer: drafts.get(len(answer), []))
    engine = engine_of(model, bank, speculative_tokens=DRAFTED)
    engine._decoder.verify_cost = at(0.0)
    assert plain(answered(engine, asked)[0]) == plain(expected) and engine.speculation == (1, DRAFTED, 0)


def test_an_answer_may_fill_its_row(both):
    asked = [Request(prompt(0), "A", max_new_tokens=34, ignore_eos=True)]
    engine, expected = both(asked, max_length=40)
    found = answered(engine, asked)
    assert len(found[0].tokens) == 34 and plain(found[0]) == plain(expected[0])


def test_log_probabilities_are_those_without_it(both):
    engine, expected = both(requests(logprobs=2), max_logprobs=2)
    found = answered(engine, requests(logprobs=2))
    assert list(map(plain, found)) == list(map(plain, expected))
    for one, other in zip(found, expected, strict=True):
        values = [[record.logprob for record in answer.logprobs] for answer in (one, other)]
        np.testing.assert_allclose(*values, atol=2e-5)


def test_nothing_is_compiled_after_warm_up(both, compiled):
    engine, _ = both(requests(), max_logprobs=1)
    engine.warm_up()
    assert UNMEASURED not in engine._decoder.verify_cost.values()
    compiled.clear()
    for cost in 0, 100:
        engine._decoder.verify_cost = at(cost)
        answered(engine, requests())
        answered(engine, requests(logprobs=1))
    assert compiled == []


def test_it_is_off_while_it_does_not_pay(both):
    engine, expected = both(requests(), cost=DRAFTED + 2)  # more than a whole draft brings
    assert list(map(plain, answered(engine, requests()))) == list(map(plain, expected))
    assert engine.speculation.drafts == 0
    engine._decoder.verify_cost = at(1.25)  # rounds without drafts show first that they would be right
    answered(engine, requests())
    assert engine.speculation.accepted > engine.speculation.drafts > 0


def test_a_failed_pass_changes_no_answer(both, monkeypatch):
    engine, expected = both(requests())
    fail_after(monkeypatch, decoder, "verify", {2, 3})
    ids = [engine.submit(request) for request in requests()]
    found, raised = answers_despite(engine)
    assert raised == 2 and [plain(found[id, 0]) for id in ids] == list(map(plain, expected))


def test_a_mesh_speculates_as_one_device_does(both):
    engine, expected = both(requests())
    model = load_backbone(FIXTURES / "llama", dtype="float32", mesh=make_mesh(tensor=2))
    over = engine_of(model, bank_of(model, tenants_of(model)), speculative_tokens=DRAFTED)
    over._decoder.verify_cost = at(0.0)
    assert list(map(plain, answered(over, requests()))) == list(map(plain, expected))
    assert over.speculation.accepted > over.speculation.drafts


@pytest.mark.parametrize("count", [-1, 40])
def test_a_wrong_number_is_named(model, bank, count):
    with pytest.raises(ValueError, match=f"speculative_tokens.*{count}"):
        engine_of(model, bank, speculative_tokens=count)


# ------------------------------------------------------------------------------------------------------------- look-up


def test_the_last_occurrence_of_the_longest_match_is_drafted():
    lookup = Lookup([1, 2, 3, 4, 9, 2, 3, 5, 1, 2], 2)
    assert lookup.draft([3]) == [4, 9]  # 1 2 3 occurred once; 2 3 later, with 5 after it
    assert lookup.draft([3, 7]) == []
    assert lookup.draft([3, 7, 2, 3]) == [7, 2]


def test_a_repetition_is_drafted_beyond_its_end():
    assert Lookup([8, 1, 2, 1, 2], 5).draft([]) == [1, 2, 1, 2, 1]


def test_the_estimate_follows_the_drafts():
    lookup = Lookup([0], 4)
    assert lookup.compare([1, 2, 3, 4], [1, 2, 9]) == 2 and lookup.expected == pytest.approx(0.6)
    assert lookup.compare([1, 2, 3, 4], [1, 2]) == 2 and lookup.expected == pytest.approx(1.02)
    assert lookup.compare([1], [5, 6]) == 0 and lookup.expected == pytest.approx(0.714)
