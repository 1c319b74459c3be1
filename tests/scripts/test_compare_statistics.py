"""scripts/experiments/compare_statistics.py: verdicts on cases whose answer is known."""

import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "experiments"))

import compare_statistics as statistics  # noqa: E402

DRAW = np.random.default_rng(0)
HALF = DRAW.integers(0, 2, (3, 400)).astype(float)


def said(one, other) -> str:
    found = statistics.paired_difference(one, other)
    return statistics.verdict(found, found.p, one.shape[1])


def test_equal_methods_are_never_better():
    found = statistics.paired_difference(HALF, HALF)
    assert (found.value, found.low, found.high, found.p) == (0, 0, 0, 1) and said(HALF, HALF) == "within noise"
    assert statistics.unpaired_difference((0.5, 0.01), (0.5, 0.01)).p == 1
    assert statistics.unpaired_difference((0.5, 0.0), (0.5, 0.0)).p == 1


def test_a_method_that_wins_every_row_is_better_and_the_other_worse():
    ones, zeros = np.ones((2, 40)), np.zeros((3, 40))
    assert (said(ones, zeros), said(zeros, ones)) == ("better", "worse")
    assert statistics.paired_difference(ones, zeros)[:3] == (1, 1, 1)


def test_nothing_is_claimed_of_few_rows():
    few = statistics.FEWEST_ROWS - 1
    assert said(np.ones((2, few)), np.zeros((2, few))) == "within noise"


def test_rows_are_compared_with_their_own():
    """The same scores in another order tell two methods apart, where their means alone would not."""
    hard = (np.arange(600) % 2)[None].astype(float)
    lucky = hard.copy()
    lucky[0, :60:2] = 1  # wins 30 rows and loses none: 0.05
    found, apart = statistics.paired_difference(lucky, hard), statistics.unpaired_difference((0.55, 0.02), (0.5, 0.02))
    assert said(lucky, hard) == "better" and apart.p > 0.05
    assert found.high - found.low < (apart.high - apart.low) / 2


@pytest.mark.long
def test_the_interval_covers_the_true_difference_as_often_as_it_says():
    """200 draws of 300 rows, with a true difference of 0.1: about 190 intervals hold it, and those that don't are on
    both sides."""
    draw, low, high = np.random.default_rng(1), 0, 0
    for _ in range(200):
        rows = draw.choice([-1.0, 0.0, 1.0], size=(1, 300), p=[0.15, 0.6, 0.25])
        found = statistics.paired_difference(rows, np.zeros((1, 300)))
        low, high = low + (found.high < 0.1), high + (found.low > 0.1)
    assert 2 <= low + high <= 20 and min(low, high) >= 1


@pytest.mark.long
def test_equal_methods_are_told_apart_as_rarely_as_the_level_says():
    draw = np.random.default_rng(2)
    p = [statistics.paired_difference(*draw.integers(0, 2, (2, 1, 200)).astype(float)).p for _ in range(300)]
    assert 0.01 < np.mean(np.array(p) <= 0.05) < 0.1 and 0.4 < np.mean(np.array(p) <= 0.5) < 0.6


@pytest.mark.long
@pytest.mark.parametrize("spreads", [(0.0, 0.0), (0.02, 0.02), (0.1, 0.1), (0.1, 0.0)])
def test_equal_methods_whose_seeds_differ_are_rarely_told_apart(spreads):
    """Three seeds of each method. Their true scores vary by its spread, around the same mean."""
    draw, told = np.random.default_rng(6), 0
    for _ in range(150):
        hard = draw.uniform(size=800)  # rows that are hard are hard for all
        rates = 0.4 + np.array(spreads)[:, None] * draw.normal(size=(2, 3))
        one, other = (hard + 0.15 * draw.normal(size=(2, 3, 800)) < rates[:, :, None]).astype(float)
        told += statistics.paired_difference(one, other).p <= 0.05
    assert told <= 0.12 * 150


def test_seeds_that_differ_widen_the_interval_and_one_seed_cannot():
    rows = DRAW.uniform(size=500)
    near, far = ((rows < np.array(rates)[:, None]).astype(float) for rates in ([0.4, 0.41, 0.42], [0.3, 0.41, 0.52]))
    other = (rows < 0.3)[None].astype(float)
    widths = [one.high - one.low for one in (statistics.paired_difference(seeds, other) for seeds in (near, far))]
    assert widths[1] > 2 * widths[0]
    assert statistics.variance_of_seeds(other) == 0 and statistics.variance_of_seeds(np.ones((3, 9))) == 0


def test_with_nothing_but_seeds_it_is_welchs_test():
    one, other = [0.3, 0.4, 0.53], [0.2, 0.22, 0.21]
    found = statistics.unpaired_difference((np.mean(one), 0.0), (np.mean(other), 0.0), (one, other))
    expected = scipy.stats.ttest_ind(one, other, equal_var=False)
    low, high = expected.confidence_interval()
    np.testing.assert_allclose(found[:4], (np.mean(one) - np.mean(other), low, high, expected.pvalue))


def test_one_seed_of_each_is_the_paired_test_of_rows():
    one, other = DRAW.integers(0, 2, (2, 1, 4000)).astype(float)
    expected = scipy.stats.ttest_rel(one[0], other[0])
    assert statistics.paired_difference(one, other).p == pytest.approx(expected.pvalue, rel=1e-2)


def test_the_same_seeds_are_drawn_together():
    """With other prompts each seed loses as much: the seeds differ, and their loss does not."""
    rows = DRAW.uniform(size=500)
    own = (rows < np.array([0.3, 0.4, 0.5])[:, None]).astype(float)
    less = (rows < np.array([0.25, 0.35, 0.45])[:, None]).astype(float)
    apart, paired = (statistics.paired_difference(less, own, same_seeds=same) for same in (False, True))
    assert paired.high < 0 < apart.high and paired.value == apart.value


@pytest.mark.parametrize("values, corrected", [
    ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
    ([0.5], [0.5]),
    ([0.9, 0.8], [1.0, 1.0]),
    ([], []),
])  # fmt: skip
def test_holm(values, corrected):
    np.testing.assert_allclose(statistics.holm(values), corrected)


# ---------------------------------------------------------------------------------------------------------- over tasks


def test_ranks_are_means_over_tasks_and_ties_share_theirs():
    found = statistics.ranking({"b": [0.5, 0.3, 0.1], "a": [0.9, 0.8, 0.7], "c": [0.5, 0.4, 0.3]})
    assert list(found.ranks) == ["a", "c", "b"]
    assert found.ranks == pytest.approx({"a": 1, "b": (2.5 + 3 + 3) / 3, "c": (2.5 + 2 + 2) / 3})


def test_the_critical_difference_is_that_of_the_paper():
    """Demsar 2006: q = 2.569 for four methods, so 2.569 * sqrt(4 * 5 / (6 * 14)) = 1.25 on 14 tasks."""
    draw = np.random.default_rng(4)
    assert statistics.ranking({name: draw.uniform(size=14) for name in "abcd"}).critical == pytest.approx(
        1.25, abs=5e-3
    )


def test_methods_whose_order_never_changes_are_told_apart_and_equal_ones_are_not():
    tasks = np.linspace(0.1, 0.5, 20)
    found = statistics.ranking({name: tasks + shift for name, shift in (("a", 0.3), ("b", 0.2), ("c", 0.0))})
    assert found.p < 0.001 and found.critical < 1 and found.groups() == []
    same = statistics.ranking({name: tasks for name in "abc"})
    assert (same.p, same.groups()) == (1.0, [("a", "b", "c")])


def test_groups_are_the_largest_sets_within_the_critical_difference():
    ranks = {"a": 1.0, "b": 1.5, "c": 2.2, "d": 4.0, "e": 4.2}
    found = statistics.Ranking(ranks, 0.001, 1.0, 10)
    assert found.groups() == [("a", "b"), ("b", "c"), ("d", "e")]
    assert found._replace(p=0.2).groups() == [tuple("abcde")]
