"""Scores: what is compared, printed and written of them."""

from copy import deepcopy

import numpy as np
import pytest
import tiny_tokenizers
from tiny_run import tokenizer as word_tokenizer
from tokenizers import normalizers
from transformers import AddedToken

from para_jax.data.examples import Example, stop_token_ids
from para_jax.data.records import Record
from para_jax.evaluation.metrics import LABEL_METRICS, METRICS
from para_jax.evaluation.questions import Likelihood, Scored, Written
from para_jax.evaluation.samples import logged_samples
from para_jax.evaluation.score import Measured, Score, score_answers, score_of
from para_jax.evaluation.tasks import EncodedTask, EvalTask, encode_task
from para_jax.inference.answer_text import text_of
from para_jax.inference.generate import before_stop


def test_a_score_is_frozen_and_compares_its_main_values_only():
    score = Score("t", "accuracy", 0.5, 0.25, 8, stderr=0.1, also=(Measured("f1", 0.3, None),))
    assert score == Score("t", "accuracy", 0.5, 0.25, 8) != Score("t", "accuracy", 0.5, 0.25, 9)
    with pytest.raises(AttributeError):
        score.loss = 0.0  # pyright: ignore
    assert list(score.record()) == ["name", "metric", "score", "loss", "count", "stderr", "also"]


#: Answers that an empty text equals, itself or after SQuAD's normalisation.
LIKE_NOTHING = ("", "A", "The", "an", "-", " . ", "#### ", "none")


@pytest.mark.parametrize("nothing", [np.nan, np.inf])
@pytest.mark.parametrize("metric", ["accuracy", *LABEL_METRICS])
def test_an_example_without_any_likelihood_is_wrong_whatever_its_answer_is(nothing, metric):
    rows = [Record("p", answer, (answer,), None, "here") for answer in ("a", "b", *LIKE_NOTHING)]
    nats = np.array([*[1.0] * len(rows), *[nothing] * 2 * len(rows)])
    task = EvalTask("t", rows, metric, ("a", "b"), also=(*METRICS, *LABEL_METRICS))
    found = score_of(task, nats, np.ones(len(nats)), [])
    assert found.score == 0 and [one.score for one in found.also] == [0] * len(task.also)


@pytest.mark.parametrize("metric", sorted({*METRICS, *LABEL_METRICS} - {"accuracy"}))
def test_an_answer_whose_logits_are_not_finite_is_wrong_whatever_its_references_are(metric):
    rows = [Record("p", answer, (answer, "none"), None, "here") for answer in LIKE_NOTHING]
    encoded = EncodedTask(EvalTask("own", rows, metric), [Example([3], [9])] * len(rows), [], [""] * len(rows))
    answers = [*[Scored(-1.0, False)] * len(rows), *[Written("", 0, finite=False)] * len(rows)]
    found = score_answers(encoded, answers)
    assert found.score == 0 and found.samples[0].given == ""
    for sample in logged_samples(encoded, answers):
        assert sample["given"] is None and sample[metric if metric in METRICS else "correct"] == 0


@pytest.mark.parametrize("kind", ["plain", "with_bos", "own_space", "thinking"])
def test_an_answer_as_it_was_learned_is_an_exact_match(kind):
    """Qwen3's chat template begins every answer with <think></think>, which the model learns to write."""
    tokenizer = getattr(tiny_tokenizers, kind)()
    chat, answer = [{"role": "user", "content": "where is my parcel?"}], "the movie"
    records = [Record(prompt, answer, (answer,), None, "") for prompt in (chat, "Answer:")]
    encoded = encode_task(EvalTask("test", records, "exact_match"), tokenizer)
    written = [tokenizer.decode(end, skip_special_tokens=True) for _, end in encoded.examples]
    assert ("<think>" in written[0]) == (kind == "thinking")
    texts = iter(written)
    answers = [
        Scored(-1.0, True) if isinstance(question, Likelihood) else Written(next(texts), 1)
        for question in encoded.questions()
    ]
    assert score_answers(encoded, answers).score == 1.0
    assert [sample["given"] for sample in logged_samples(encoded, answers)] == [answer] * 2
    wrong = [one if isinstance(one, Scored) else Written("<think> " + one.text, 1) for one in answers]
    assert score_answers(encoded, wrong).score == 0.0


# ------------------------------------------------------------------------------------------------ what counts as right


def normalising():
    """Normalises texts, as Qwen's tokenizers do: some letters of Bengali and Hindi become two characters."""
    tokenizer = deepcopy(tiny_tokenizers.plain())  # that one is shared by all tests
    tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
    return tokenizer


@pytest.mark.parametrize(
    ("tokenizer", "chat", "completion"),
    [
        (normalising, False, "হ\u09df"),
        (normalising, True, "Zoe\u0301"),
        (tiny_tokenizers.thinking, True, "<think>\n\n</think>\n\nRome"),
        (tiny_tokenizers.plain, True, "Rome<|im_end|>"),
        (tiny_tokenizers.plain, True, "Rome"),
        (tiny_tokenizers.plain, False, "Rome\n<|im_end|>"),
        (tiny_tokenizers.plain, False, "\nRome <|im_end|>"),
        (tiny_tokenizers.own_space, False, "Rome"),
    ],
)
def test_an_answer_that_is_what_was_learnt_is_right(tokenizer, chat, completion):
    tokenizer = tokenizer()
    prompt = [{"role": "user", "content": "where is my parcel?"}] if chat else "where is my"
    record = Record(prompt, completion, (completion, "home"), None, "x:1")
    encoded = encode_task(EvalTask("t", [record], "exact_match", also=("f1", "macro_f1")), tokenizer)
    ids = encoded.examples[0].completion_ids
    text = text_of(tokenizer, before_stop(ids, (*stop_token_ids(tokenizer), ids[-1])))
    for written, score in ((text, 1.0), ("home", 1.0), ("no", 0.0)):
        found = score_answers(encoded, [Scored(-1.0, True), Written(written, len(ids))])
        assert [found.score, *(one.score for one in found.also)] == [score] * 3
    assert encoded.task.records[0].completion == completion


@pytest.mark.parametrize("completion", ["<|call|>the movie", "the<|call|> movie", "the movie <|call|>"])
def test_a_special_token_that_no_answer_shows_makes_none_wrong(completion):
    tokenizer = deepcopy(tiny_tokenizers.plain())
    tokenizer.add_tokens([AddedToken("<|call|>", special=True)])
    encoded = encode_task(
        EvalTask("t", [Record("where", completion, (completion,), None, "x:1")], also=("f1",)), tokenizer
    )
    learnt = text_of(tokenizer, encoded.examples[0].completion_ids[:-1])
    for written, score in ((learnt, 1.0), ("the", 0.0)):
        assert score_answers(encoded, [Scored(-1.0, True), Written(written, 3)]).score == score


def test_answers_that_differ_in_special_tokens_alone_are_not_right_for_each_other():
    """The text that is written shows none, so nothing could tell which of them it was."""
    tokenizer = deepcopy(tiny_tokenizers.plain())
    tokenizer.add_tokens([AddedToken("<|yes|>", special=True), AddedToken("<|no|>", special=True)])
    completions = ("<|yes|> the movie", "<|no|> the movie", "<|yes|> where")
    records = [Record("where", one, (one,), None, "x:1") for one in completions]
    encoded = encode_task(EvalTask("t", records), tokenizer)
    written = [Written(text, 3) for text in ("the movie", "the movie", "where")]
    assert score_answers(encoded, [*[Scored(-1.0, True)] * 3, *written]).score == 1 / 3


def test_choices_that_the_tokenizer_lacks_are_different_answers():
    records = [Record("w7", answer, (answer,), None, "x:1") for answer in ("unheard", "foreign")]
    encoded = encode_task(EvalTask("t", records, "accuracy", ("unheard", "foreign")), word_tokenizer())
    assert score_answers(encoded, [Scored(-1.0, True)] * 6).score == 0.5


@pytest.mark.parametrize("metric", ["exact_match", "f1", "squad", "macro_f1"])
def test_any_reference_is_right_however_its_accents_are_written(metric):
    record = Record("where", "Rene\u0301", ("Zoe\u0301", "Rene\u0301"), None, "x:1")
    encoded = encode_task(EvalTask("t", [record], metric), normalising())
    for written, score in (("Zo\u00e9", 1.0), ("Ren\u00e9", 1.0), ("Zoe", 0.0)):
        assert score_answers(encoded, [Scored(-1.0, True), Written(written, 3)]).score == score


def test_an_answer_without_text_is_not_right_because_the_tokenizer_lacks_the_expected_one():
    record = Record("w7", "unheard of", ("unheard of",), None, "x:1")
    encoded = encode_task(EvalTask("t", [record], "exact_match"), word_tokenizer())
    assert text_of(word_tokenizer(), encoded.examples[0].completion_ids[:-1]) == ""
    for written, score in (("", 0.0), ("unheard of", 1.0)):
        assert score_answers(encoded, [Scored(-1.0, True), Written(written, 2)]).score == score


def test_nor_is_an_answer_with_only_the_part_that_the_tokenizer_has():
    record, words = Record("w7", "unheard w9", ("unheard w9",), None, "x:1"), deepcopy(word_tokenizer())
    words.unk_token = "<pad>"  # what it makes of unknown words
    encoded = encode_task(EvalTask("t", [record], "exact_match"), words)
    for written, score in (("w9", 0.0), ("unheard w9", 1.0)):
        assert score_answers(encoded, [Scored(-1.0, True), Written(written, 2)]).score == score
