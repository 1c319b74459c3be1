"""The metric, the choices and the answer length that follow from a run's training data."""

from dataclasses import replace
from itertools import chain, repeat

import pytest
import tiny_tokenizers
from tiny_run import backbone_folder, run_config, tokenizer, words, write_rows

from para_jax import load_model_config
from para_jax.data.examples import encode_completion
from para_jax.data.records import Record
from para_jax.evaluation import defaults
from para_jax.evaluation.defaults import (
    FEWEST_NEW_TOKENS,
    FREE_WORDS,
    MOST_NEW_TOKENS,
    NEW_TOKENS,
    REPEATED,
    answer_length,
    longest_completion,
    scoring_rule,
)
from para_jax.evaluation.tasks import file_task, task_of_run

OPEN = "eval.metric=null", "eval.max_new_tokens=null"


@pytest.fixture
def rule(tmp_path):
    """Writes splits of completions, and gives the rule for them."""
    backbone_folder(tmp_path / "backbone")

    def of(train, *overrides, **splits):
        for split, completions in {"train": train, **splits}.items():
            rows = [{"prompt": words([20 + i % 200, 30]), "completion": text} for i, text in enumerate(completions)]
            write_rows(tmp_path / "data" / f"{split}.jsonl", rows)
        of.config = run_config(tmp_path, *OPEN, *overrides)
        return scoring_rule(of.config, tokenizer())

    return of


def test_few_repeated_completions_are_ranked_and_others_written(rule):
    found = rule(["w9", "w10", "w11 w12"] * REPEATED)
    assert (found.metric, found.also, found.choices) == ("accuracy", (), ("w10", "w11 w12", "w9"))
    assert found.describe() == "accuracy over the 3 different completions of the training data (eval.metric)"
    seldom = rule(["w9", "w10", "w11 w12"] * (REPEATED - 1))
    assert (seldom.metric, seldom.also, seldom.choices) == ("exact_match", ("f1",), ())
    assert rule(["w9"] * 40).metric == "exact_match"  # nothing to choose from
    assert rule([f"w{i}" for i in range(9, 29)] * REPEATED).metric == "accuracy"
    assert rule([f"w{i}" for i in range(9, 30)] * REPEATED).metric == "exact_match"  # 21


def test_long_completions_that_are_nearly_all_different_are_chosen_by_loss_and_reported_with_f1(rule):
    """No answer matches them exactly, so exact match is 0 for every step, method and rate."""
    texts = [words(range(i, i + FREE_WORDS + 1)) for i in range(9, 29)]
    found = rule(texts)
    assert (found.metric, found.also, found.choices, found.from_data) == ("loss", ("f1",), (), True)
    assert "loss, because" in found.describe() and "f1 of written" in found.describe()
    assert found.max_new_tokens == 24  # the 11 words, their end, and half as many again
    assert rule([text.rpartition(" ")[0] for text in texts]).metric == "exact_match", "10 words"
    assert rule([*texts[:17], *texts[:3]]).metric == "exact_match", "three of 20 are repeated"
    assert rule([*texts[:18], *texts[:2]]).metric == "loss"
    assert rule(texts[:2] * REPEATED).metric == "accuracy", "labels may be long"
    for given in ("eval.metric=exact_match", "eval.metric=f1", "eval.metric=squad"):
        assert rule(texts, given).metric == given.partition("=")[2] and not rule(texts, given).also
    assert rule(texts, "eval.also=[squad]").also == ("squad",)


def test_a_loss_with_further_metrics_has_the_length_of_the_answers(rule):
    long = ["w9", words(range(9, 39))]
    assert rule(long, "eval.metric=loss", "eval.also=[f1]").max_new_tokens == 48
    assert rule(long, "eval.metric=loss").max_new_tokens == NEW_TOKENS, "it writes none"


def test_a_file_of_free_text_is_scored_as_a_run_scores_it(rule, tmp_path):
    texts = [words(range(i, i + FREE_WORDS + 1)) for i in range(9, 29)]
    rule(texts, test=texts)
    model = load_model_config(tmp_path / "backbone")
    own, of_file = task_of_run(rule.config, "test", tokenizer()), []
    for metric in ("", ":exact_match"):
        task = file_task(f"{tmp_path / 'data' / 'test.jsonl'}{metric}", tokenizer(), model, split="test", limit=None)
        of_file.append(task and (task.metric, task.also))
    assert of_file == [("loss", ("f1",)), ("exact_match", ())] and own and (own.metric, own.also) == of_file[0]


def test_what_the_config_says_wins(rule):
    labels = ["w9", "w10"] * 10
    assert rule(labels, "eval.metric=exact_match")[:3] == ("exact_match", (), ())
    assert rule(labels, "eval.metric=loss").metric == "loss"
    assert rule(labels, "eval.choices=[w9,w3]").choices == ("w9", "w3")
    assert rule(labels, "eval.choices=[w9,w3]").metric == "accuracy"
    assert rule(labels, "eval.also=[macro_f1]").also == ("macro_f1",)
    assert rule(labels, "data.task=gsm8k").metric == "final_number"
    assert not rule(labels, "eval.metric=accuracy").from_data and rule(labels).from_data


def test_an_answer_that_only_the_test_data_has_counts_as_wrong_and_is_named(rule, capsys):
    rule(["w9", "w10"] * 10, test=["w9", "w10"] * 9 + [" w9", "w77"])
    task = task_of_run(rule.config, "test", tokenizer())
    assert (task.metric, task.choices) == ("accuracy", ("w10", "w9"))
    assert "test: 1 of 20 answers are not among the choices (w10, w9)" in capsys.readouterr().err


def test_answers_that_differ_only_in_white_space_are_one_answer(rule):
    assert rule(["w9", "w10", "w9 ", "w9"] * 5).choices == ("w10", "w9")
    assert rule(["w9", " w9", " w9"] * 5).metric == "exact_match"  # nothing to choose from


def test_the_length_of_an_answer_follows_from_the_longest_completion(rule):
    long = words(range(9, 39))  # 30 tokens and the end
    found = rule(["w9 w10", *["w11"] * 3, long])
    assert found.max_new_tokens == 48
    assert found.describe() == (
        "exact_match and f1 of written answers of up to 48 tokens (eval.metric, eval.max_new_tokens)"
    )
    assert rule(["w9", "w10"]).max_new_tokens == FEWEST_NEW_TOKENS
    assert rule(["w9", long], "eval.metric=f1").max_new_tokens == 48  # also of a metric that is given
    assert rule(["w9", long], "eval.max_new_tokens=7").max_new_tokens == 7


def test_labels_and_lengths_follow_from_every_row_of_sorted_data(rule, monkeypatch):
    texts = "w9", words(range(9, 39))
    first, last = (Record("w20", text, (text,), None, "") for text in texts)
    rule(["w9"], validation=texts)
    monkeypatch.setattr(defaults, "split_records", lambda *_: chain(repeat(first, 50_000), repeat(last, 100)))
    assert scoring_rule(rule.config, tokenizer()).choices == tuple(sorted(texts))
    written = replace(rule.config, eval=replace(rule.config.eval, metric="f1"))
    assert scoring_rule(written, tokenizer()).max_new_tokens == 48


def test_the_longest_completion_is_found_in_any_script(monkeypatch):
    """A tokenizer of bytes has more tokens for 30 letters of Bengali than for 40 of English."""
    monkeypatch.setattr(defaults, "COUNTED", 1)
    records = [Record("p", text, (text,), None, "x:1") for text in ("yes no " * 6, "\u09b9" * 30)]
    plain = tiny_tokenizers.plain()
    expected = len(encode_completion(plain, "p", records[1].completion))
    assert longest_completion(records, plain) == expected > len(encode_completion(plain, "p", records[0].completion))


def test_an_answer_has_half_as_many_tokens_again_as_the_longest_completion(tmp_path):
    model = load_model_config(backbone_folder(tmp_path / "backbone"))
    lengths = [answer_length(longest, replace(model, max_positions=2048)) for longest in (2, 11, 30, 1000)]
    assert lengths == [FEWEST_NEW_TOKENS, 16, 48, MOST_NEW_TOKENS]
    assert answer_length(1000, replace(model, max_positions=100)) == 50
    many = [Record("w20", words([9] * count), (), None, "") for count in (1, 20, 3) * 30]
    assert longest_completion(many, tokenizer()) == 21


def test_a_chosen_length_fits_the_models_positions(rule, tmp_path):
    rule(["w9", words([9] * 120)], test=["w9"])
    rows = [{"prompt": words([20] * 120), "completion": "w9"}]
    write_rows(tmp_path / "data" / "test.jsonl", rows)
    task = task_of_run(rule.config, "test", tokenizer())
    assert 120 + task.max_new_tokens <= load_model_config(tmp_path / "backbone").max_positions


def test_without_training_data_answers_are_written(tmp_path):
    backbone_folder(tmp_path / "backbone")
    write_rows(tmp_path / "test.jsonl", [{"prompt": "w20", "completion": "w9"}])
    for train in ("null", str(tmp_path / "nowhere")):
        config = run_config(tmp_path, f"data.train={train}", f"data.test={tmp_path / 'test.jsonl'}", *OPEN)
        task = task_of_run(config, "test", tokenizer())
        assert (task.metric, task.max_new_tokens) == ("exact_match", NEW_TOKENS)
