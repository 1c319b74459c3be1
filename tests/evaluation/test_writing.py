"""Answers written in batches: their texts, their ends, and what needs an engine."""

import pytest
import tiny_tokenizers
from golden_models import backbone
from tiny_run import tokenizer

from para_jax.evaluation import writing
from para_jax.evaluation.questions import Generation, Written
from para_jax.evaluation.shapes import OpenShapes
from para_jax.evaluation.writing import as_request, known_answer, write_in_batches
from para_jax.inference.draw import NO_TOKEN
from para_jax.inference.generate import check_prompts
from para_jax.serving.ticket import Sample, Ticket

SHAPES = OpenShapes(512)


def written(questions, tokenizer=tokenizer, stop_ids=(2,)):
    asked = [(None, question) for question in questions]
    return dict(write_in_batches(backbone("llama"), None, tokenizer(), asked, 2, SHAPES, stop_ids))


@pytest.mark.parametrize("stop", [(), ("zz",)])
def test_an_engine_decodes_an_answer_as_batches_do(monkeypatch, stop):
    """Both decode it alone, as lm-eval's hf does: SentencePiece's decoder then drops its first space."""
    words = tiny_tokenizers.own_space()
    tokens = words("  return it ", add_special_tokens=False)["input_ids"]
    monkeypatch.setattr(writing, "generate_tokens", lambda *a, **s: [tokens] * 2)
    sample = Sample(Ticket(as_request(1, None, Generation((3,), 99, stop)), False), 0, [3], None)
    sample.follow_text(words)
    sample.tokens = tokens
    assert sample.text is None or not (any(map(sample.text.add, tokens)) or sample.text.finish())
    assert sample.full_text(words, partial=False) == written([Generation((3,), 99)], lambda: words)[0].text


def test_an_answer_before_logits_that_are_not_finite_is_empty(monkeypatch):
    """What came before might be right by chance. After the answer's last token they don't matter."""
    monkeypatch.setattr(writing, "generate_tokens", lambda *a, **s: [[9, 10, NO_TOKEN]] * 2)
    assert written([Generation((3,), 4), Generation((4,), 2)]) == {
        0: Written("", 3, finite=False),
        1: Written("w9w10", 2),
    }


def test_an_answer_of_a_batch_must_fit_the_models_positions_by_its_own_length(monkeypatch):
    """A short answer after a long prompt, next to a long answer after a shorter one."""
    seen = []

    def generate_tokens(model, adapters, prompts, sampling, *, most, **settings):
        check_prompts(model, adapters, prompts, most)
        seen.append((sampling.max_new_tokens, most))
        return [[9] * sampling.max_new_tokens] * 2

    monkeypatch.setattr(writing, "generate_tokens", generate_tokens)
    found = written([Generation((3,) * 504, 8), Generation((5,) * 400, 100)])  # of 512 positions
    assert seen == [(100, [100, 8])] and {i: one.tokens for i, one in found.items()} == {0: 8, 1: 100}
    with pytest.raises(ValueError, match="prompt 1: 504 tokens and max_new_tokens 9 are more than the model's 512"):
        written([Generation((3,) * 504, 9), Generation((5,) * 400, 100)])


def test_greedy_tokens_are_an_answer_if_it_ends_within_them():
    question = Generation((3,), 4, stop_ids=(7,))
    assert known_answer(tokenizer(), question, (9, 10), (2,)) is None  # it may go on
    for end in (2, 7):
        assert known_answer(tokenizer(), question, (9, 10, end), (2,)) == Written("w9w10", 2)
    assert known_answer(tokenizer(), question, (9, 10, 11, 12, 2), (2,)).tokens == 4
    for other in (question._replace(temperature=1.0), question._replace(stop=("x",))):
        assert known_answer(tokenizer(), other, (9, 10, 2), (2,)) is None
