"""Which scores on the same examples are told apart."""

from itertools import product
from math import comb

import numpy as np
import pytest

from para_jax.evaluation.paired import randomization_p, within_noise


def test_the_p_value_is_the_share_of_all_signs_that_give_as_large_a_sum():
    for seed in range(4):
        found = np.random.default_rng(seed).normal(0.4, 1, 9).round(2)
        sums = abs(np.array(list(product((-1, 1), repeat=9))) @ found)
        exact = (sums >= abs(found.sum()) - 1e-9).mean()
        assert randomization_p(found) == pytest.approx(exact, abs=0.015)


def test_of_right_and_wrong_answers_it_is_mcnemars_exact_test():
    for won, lost in (6, 0), (9, 2), (3, 3), (14, 5):
        tail = sum(comb(won + lost, k) for k in range(max(won, lost), won + lost + 1)) / 2 ** (won + lost)
        found = np.repeat([1.0, -1.0, 0.0], [won, lost, 30])
        assert randomization_p(found) == pytest.approx(min(1, 2 * tail), abs=0.015)
    assert randomization_p(np.zeros(8)) == 1
    assert randomization_p(np.ones(200)) < 1e-40, "smaller than one of the draws"


def test_equal_methods_are_told_apart_at_most_as_often_as_the_level_says():
    """Also though the best one is picked after the fact, which a plain test of two would not allow for."""
    draw, wrong = np.random.default_rng(0), 0
    for _ in range(150):
        easy = draw.random(40)
        rows = {name: (draw.random(40) < easy).astype(float) for name in "abcd"}
        best = max(rows, key=lambda name: rows[name].sum())
        wrong += len(within_noise(rows, best)) < 3
    assert wrong / 150 <= 0.07


def test_a_clear_difference_is_told_apart_and_a_slight_one_is_not():
    right = np.ones(60)
    slightly, clearly = right.copy(), right.copy()
    slightly[:3], clearly[:20] = 0, 0
    assert within_noise({"best": right, "near": slightly, "far": clearly}, "best") == ["near"]
    assert within_noise({"alone": right}, "alone") == []
