import math
import random

import pytest

from para_jax.config import EvalSection, allowed_values
from para_jax.evaluation.metrics import (
    LABEL_METRICS,
    METRICS,
    error_of_mean,
    exact_match,
    f1,
    final_number,
    jackknife,
    measure,
    sql_match,
    squad,
    squad_exact,
)


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("yes", ["yes"], 1),
        (" yes\n", ["no", "yes"], 1),
        ("a  b", ["a b"], 1),
        ("Yes", ["yes"], 0),
        ("yes.", ["yes"], 0),
        ("", ["yes"], 0),
        ("ab", ["a b"], 0),
    ],
)
def test_exact_match_forgives_white_space_and_nothing_else(prediction, references, expected):
    assert exact_match(prediction, references) == expected


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("The Cat!", ["cat"], 1),  # case, articles and punctuation do not count
        ("a cat sat", ["the cat"], 2 * (1 / 2) * 1 / (1 / 2 + 1)),  # precision 1/2, recall 1
        ("red red car", ["red car red blue"], 2 * 1 * (3 / 4) / (1 + 3 / 4)),  # words count as often as they stand
        ("dog", ["cat", "big dog"], 2 / 3),  # the best reference counts
        ("theatre", ["atre"], 0),  # "the" is cut only as a word
        ("dog", ["cat"], 0),
        ("", ["cat"], 0),
        ("the", ["a"], 1),
    ],
)
def test_f1_is_squad_s(prediction, references, expected):
    assert f1(prediction, references) == pytest.approx(expected)


def test_squad_is_the_mean_of_normalised_exact_match_and_f1():
    assert squad("The cat.", ["cat"]) == 1
    assert squad("cat sat", ["cat"]) == pytest.approx((0 + 2 / 3) / 2)


@pytest.mark.parametrize(
    ("prediction", "expected"), [("The cat!", 1), ("a  CAT", 1), ("cats", 0), ("the", 0), ("cat sat", 0)]
)
def test_squad_s_exact_match_is_that_of_normalised_words(prediction, expected):
    assert squad_exact(prediction, ["dog", "cat"]) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("2 and 16 are 18. The answer is 18.", "#### 18", 1),
        ("18 apples, of which 2 are green", "The answer is 18.", 0),  # the last number counts
        ("so $1,234.50", "1234.5", 1),  # commas and dollar signs do not count, nor do trailing zeros
        ("#### 18\n", "18", 1),
        ("It is 5. #### 18", "18", 1),
        ("It is 18. #### unknown", "18", 0),  # what stands before the mark does not count
        ("#### 7 #### 18", "18", 1),
        ("a loss of -3", "-3", 1),
        ("a loss of -$3", "-3", 1),
        ("a loss of \N{MINUS SIGN}3", "-3", 1),
        ("a loss of \N{MINUS SIGN}3", "3", 0),
        ("10-3", "3", 1),  # a minus between two numbers is no sign
        ("(10)-3", "3", 1),
        ("it is .5", "0.5", 1),
        ("50%", "50", 1),
        ("none", "18", 0),
        ("", "18", 0),
        ("x = \\pi", "x =  \\pi", 1),  # a reference without a number is compared as a text
        ("7", "\\pi", 0),
    ],
)
def test_the_final_number_is_compared_as_a_number(prediction, reference, expected):
    assert final_number(prediction, [reference]) == expected
    assert final_number(prediction, ["99", reference]) == expected


QUERY = "SELECT COUNT(year) FROM table WHERE venue = 'old and new' AND year < '1911'"


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        (QUERY, 1),
        ("select  count(year) FROM table\nwhere venue = 'Old and New' and year < '1911'", 1),
        ("SELECT COUNT(year) FROM table WHERE year < '1911' AND venue = 'old and new'", 1),
        ("SELECT COUNT(year) FROM table WHERE year < '1911'", 0),
        ("SELECT COUNT(year) FROM table WHERE year > '1911' AND venue = 'old and new'", 0),
        ("SELECT MAX(year) FROM table WHERE venue = 'old and new' AND year < '1911'", 0),
        (QUERY + " AND year < '1911'", 0),
        ("SELECT COUNT(year) FROM table", 0),
        ("", 0),
    ],
)
def test_queries_are_equal_in_whatever_order_their_conditions_stand(prediction, expected):
    assert sql_match(prediction, [QUERY]) == expected


#: 6 yes and 4 no; of what is predicted as yes 4 of 5 are, of no 3 of 5.
EXPECTED = ["yes"] * 6 + ["no"] * 4
PREDICTED = ["yes"] * 4 + ["no"] * 2 + ["yes"] + ["no"] * 3


def labelled(metric, predicted, expected):
    return measure(metric, predicted, [[label] for label in expected])[0]


def test_macro_f1_is_the_mean_of_each_label_s_f1():
    of_yes, of_no = 2 * 4 / (5 + 6), 2 * 3 / (5 + 4)  # 2 hits / (predicted + expected)
    assert labelled("macro_f1", PREDICTED, EXPECTED) == pytest.approx((of_yes + of_no) / 2)
    assert labelled("macro_f1", ["yes"] * 10, EXPECTED) == pytest.approx((12 / 16 + 0) / 2)  # one never predicted
    assert labelled("macro_f1", ["oui", "yes"], ["yes", "yes"]) == pytest.approx(2 / 3)  # no label is expected nowhere
    assert labelled("macro_f1", ["a", "b", "a"], ["a", "b", "c"]) == pytest.approx((2 / 3 + 1 + 0) / 3)


def test_matthews_is_the_correlation_of_two_labels_and_of_more():
    true_yes, false_yes, true_no, false_no = 4, 1, 3, 2
    by_hand = (true_yes * true_no - false_yes * false_no) / math.sqrt(5 * 6 * 4 * 5)
    assert labelled("matthews", PREDICTED, EXPECTED) == pytest.approx(by_hand)
    turned = ["no" if label == "yes" else "yes" for label in EXPECTED]
    assert labelled("matthews", EXPECTED, EXPECTED) == 1 and labelled("matthews", turned, EXPECTED) == -1
    assert labelled("matthews", ["yes"] * 10, EXPECTED) == 0  # what never varies
    # 3 labels: 3 of 4 hit; predicted a 2, b 1, c 1, expected a 1, b 1, c 2: (3 * 4 - 5) / sqrt((16 - 6) (16 - 6))
    assert labelled("matthews", ["a", "a", "b", "c"], ["a", "c", "b", "c"]) == pytest.approx(7 / 10)


def test_a_label_metric_takes_any_accepted_answer_for_the_label():
    assert measure("matthews", ["no", "yes", " nope"], [["nope", "no"], ["yes"], ["nope"]])[0] == 1


def test_the_error_of_a_mean_is_its_deviation_over_the_root_of_the_count():
    right = [["x"], ["x"], ["x"], ["y"]]  # 3 of 4: s^2 = (3/16) * 4/3
    assert measure("accuracy", ["x"] * 4, right) == (0.75, pytest.approx(math.sqrt(3 / 16 * 4 / 3 / 4)))
    assert measure("f1", ["cat", "cat sat"], [["cat"], ["cat"]])[1] == pytest.approx((1 - 2 / 3) / 2)
    assert measure("f1", ["cat"], [["cat"]]) == (1, None)


def test_the_jackknife_of_a_mean_is_the_error_of_the_mean():
    hits = lambda predicted, expected: sum(p == e for p, e in zip(predicted, expected, strict=True)) / len(expected)  # noqa: E731
    found = measure("accuracy", PREDICTED, [[label] for label in EXPECTED])[1]
    rows = jackknife(hits, list(zip(PREDICTED, EXPECTED, strict=True)))
    assert error_of_mean(rows) == pytest.approx(found)
    assert rows == pytest.approx([float(p == e) for p, e in zip(PREDICTED, EXPECTED, strict=True)])
    assert measure("matthews", ["a"], [["a"]])[1] is None


@pytest.mark.parametrize("metric", LABEL_METRICS.values())
def test_the_jackknife_leaves_out_each_example_once_and_texts_that_are_no_labels_together(metric):
    draw, asked = random.Random(0), []
    expected = draw.choices("ab", k=60)
    predicted = [draw.choice([e, e, "a", "b", "x", "y", f"text {i}"]) for i, e in enumerate(expected)]

    def counted(*sides):
        asked.append(1)
        return metric(*sides)

    found = jackknife(counted, list(zip(predicted, expected, strict=True)))
    left = [metric(predicted[:i] + predicted[i + 1 :], expected[:i] + expected[i + 1 :]) for i in range(60)]
    mean = sum(left) / 60
    assert error_of_mean(found) == pytest.approx((59 / 60 * sum((one - mean) ** 2 for one in left)) ** 0.5, rel=1e-9)
    assert len(asked) <= 1 + 2 * (2 + 3), "all; a and b, x, y and the texts that come once, by the two expected labels"


@pytest.mark.parametrize("metric", LABEL_METRICS)
def test_the_error_of_a_label_metric_is_how_far_it_varies_between_draws(metric):
    import numpy as np

    draw = np.random.default_rng(0)
    expected = draw.choice(["yes", "no"], (300, 100), p=[0.3, 0.7])
    predicted = np.where(draw.random(expected.shape) < 0.8, expected, "no")
    found = [measure(metric, list(p), [[label] for label in e]) for p, e in zip(predicted, expected, strict=True)]
    values, errors = np.array(found).T
    assert np.mean(errors) == pytest.approx(np.std(values), rel=0.1)


def test_the_config_knows_the_metrics_that_there_are():
    assert set(allowed_values(EvalSection, "metric")) == {"loss", *METRICS, *LABEL_METRICS}


@pytest.mark.parametrize("metric", METRICS)
def test_a_score_is_the_mean_over_the_predictions(metric):
    assert measure(metric, ["yes", "no", "yes", "x"], [["yes"], ["no", "nope"], ["no"], ["y"]])[0] == 0.5
