import pytest

from para_jax.evaluation.metrics import METRICS, exact_match, f1, score, squad


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


@pytest.mark.parametrize("metric", METRICS)
def test_a_score_is_the_mean_over_the_predictions(metric):
    assert score(metric, ["yes", "no", "yes", "x"], [["yes"], ["no", "nope"], ["no"], ["y"]]) == 0.5


def test_what_can_not_be_scored_is_an_error():
    with pytest.raises(ValueError, match="metric: 'bleu' is not possible; expected one of exact_match"):
        score("bleu", ["a"], [["a"]])
    with pytest.raises(ValueError, match="no predictions"):
        score("f1", [], [])
    with pytest.raises(ValueError):
        score("f1", ["a", "b"], [["a"]])
