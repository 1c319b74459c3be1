"""Answers written in batches: their texts, their ends, and what needs an engine."""

import pytest
from golden_models import backbone
from tiny_run import tokenizer

from para_jax.evaluation import writing
from para_jax.evaluation.questions import Generation, Written
from para_jax.evaluation.shapes import OpenShapes
from para_jax.evaluation.writing import known_answer, write_in_batches
from para_jax.inference.draw import NO_TOKEN

SHAPES = OpenShapes(64)


def written(questions, tokenizer=tokenizer, stop_ids=(2,)):
    asked = [(None, question) for question in questions]
    return dict(write_in_batches(backbone("llama"), None, tokenizer(), asked, 2, SHAPES, stop_ids))


def test_an_answer_keeps_its_spaces(monkeypatch):
    """A tokenizer that tidies up would turn "a , b" into another answer than generate gives."""
    seen = {}
    monkeypatch.setattr(writing, "generate_tokens", lambda *a, **s: [[9, 10]] * 2)

    class Tidy:
        def decode(self, tokens, **options):
            seen.update(options)
            return " w9 w10 "

    assert written([Generation((3,), 4)], Tidy) == {0: Written(" w9 w10 ", 2)}
    assert seen == {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


def test_an_answer_before_logits_that_are_not_finite_is_empty(monkeypatch):
    """What came before might be right by chance. After the answer's last token they don't matter."""
    monkeypatch.setattr(writing, "generate_tokens", lambda *a, **s: [[9, 10, NO_TOKEN]] * 2)
    assert written([Generation((3,), 4), Generation((4,), 2)]) == {0: Written("", 3), 1: Written("w9w10", 2)}


def test_an_answer_ends_at_its_own_stop_ids_too(monkeypatch):
    stops = []
    monkeypatch.setattr(writing, "generate_tokens", lambda *a, stop_ids, **s: stops.append(stop_ids) or [[9, 5, 8]] * 2)
    found = written([Generation((3,), 4, stop_ids=(7,)), Generation((4,), 2, stop_ids=(8,)), Generation((4,), 4)])
    assert sorted(stops) == [(2,), (2, 7), (2, 8)]
    assert {i: one.tokens for i, one in found.items()} == {0: 3, 1: 2, 2: 3}


def test_greedy_tokens_are_an_answer_if_it_ends_within_them():
    question = Generation((3,), 4, stop_ids=(7,))
    assert known_answer(tokenizer(), question, (9, 10), (2,)) is None  # it may go on
    for end in (2, 7):
        assert known_answer(tokenizer(), question, (9, 10, end), (2,)) == Written("w9w10", 2)
    assert known_answer(tokenizer(), question, (9, 10, 11, 12, 2), (2,)).tokens == 4
    for other in (question._replace(temperature=1.0), question._replace(stop=("x",))):
        assert known_answer(tokenizer(), other, (9, 10, 2), (2,)) is None


@pytest.mark.parametrize("field", [{"temperature": 0.5}, {"stop": ("w9",)}])
def test_sampled_answers_and_stop_texts_need_an_engine(field):
    ((name, value),) = field.items()
    with pytest.raises(ValueError, match=name):
        written([Generation((3,), 4, **{name: value})])
