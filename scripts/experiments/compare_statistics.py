"""Which method is better, and could it be chance? Pure functions over the scores of test rows.

Chance is in the test rows and in the seeds of training. Paired: both methods answered the same rows, so only their
differences count. Unpaired: only scores and their standard errors are known. The few seeds make it Student's t
distribution, with the degrees of freedom of Welch (1947) and Satterthwaite (1946).
"""

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.05
#: With fewer rows than this nothing is claimed.
FEWEST_ROWS = 20


class Difference(NamedTuple):
    """One method's score less another's."""

    value: float
    low: float
    """the ends of the 95 % interval, without a correction for the number of comparisons"""
    high: float
    p: float
    """the probability of a difference as large by chance, both signs"""
    paired: bool = True


def paired_difference(one: np.ndarray, other: np.ndarray, *, same_seeds: bool = False) -> Difference:
    """Scores [seeds, rows] of the same rows. If one has more rows, those that both have, from the start, count.

    Args:
        same_seeds: both are the same adapters, such as with other prompts, so their seeds are paired too.
    """
    count = min(one.shape[1], other.shape[1])
    one, other = one[:, :count], other[:, :count]
    assert np.isfinite(one).all() and np.isfinite(other).all(), "a row without a score"
    rows = one.mean(axis=0) - other.mean(axis=0)
    of_rows = float(rows.var(ddof=1)) / count if count > 1 else 0.0
    return with_interval(float(rows.mean()), of_rows, [one - other] if same_seeds else [one, other])


def unpaired_difference(one: tuple[float, float], other: tuple[float, float], seeds: Sequence[Sequence[float]] = ()):
    """From (score, standard error over rows) of each, and the scores of each method's seeds. A pair's own rows would
    narrow it."""
    of_seeds = [np.array(scores, float)[:, None] for scores in seeds]
    return with_interval(one[0] - other[0], one[1] ** 2 + other[1] ** 2, of_seeds)._replace(paired=False)


def with_interval(value: float, of_rows: float, seeds: Sequence[np.ndarray]) -> Difference:
    """A difference with its interval.

    Args:
        of_rows: the variance that comes from the rows.
        seeds: the scores [seeds, rows] of each method.
    """
    parts = [(variance_of_seeds(scores) / len(scores), len(scores) - 1) for scores in seeds]
    total = of_rows + sum(part for part, _ in parts)
    if total == 0:
        return Difference(value, value, value, float(value == 0))
    from_seeds = sum(part**2 / degrees for part, degrees in parts if degrees)
    degrees = total**2 / from_seeds if from_seeds else math.inf
    error = math.sqrt(total)
    half = float(stats.t.ppf(1 - LEVEL / 2, degrees)) * error
    return Difference(value, value - half, value + half, float(2 * stats.t.sf(abs(value) / error, degrees)))


def variance_of_seeds(scores: np.ndarray) -> float:
    """The variance of a method's scores over its seeds, from [seeds, rows]; 0 for one seed. A part of what tells seeds
    apart is chance in the rows, which counts already: variance components of a two-way layout (Searle, Casella and
    McCulloch 1992)."""
    seeds, rows = scores.shape
    if seeds == 1:
        return 0.0
    means = scores.mean(axis=1)
    left = scores - means[:, None] - scores.mean(axis=0) + scores.mean()
    of_rows = (left**2).sum() / ((seeds - 1) * max(rows - 1, 1)) / rows
    return max(0.0, float(means.var(ddof=1) - of_rows))


def reverse(apart: Difference) -> Difference:
    """The second method's score less the first's."""
    return apart._replace(value=0.0 - apart.value, low=0.0 - apart.high, high=0.0 - apart.low)


def holm(values: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm 1979), in the order given."""
    order = sorted(range(len(values)), key=lambda i: values[i])
    corrected, largest = [0.0] * len(values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - place) * values[i]))
        corrected[i] = largest
    return corrected


def verdict(difference: Difference, corrected: float, rows: int) -> str:
    """ "better", "worse" or "within noise", of the first method."""
    if corrected > LEVEL or rows < FEWEST_ROWS:
        return "within noise"
    return "better" if difference.value > 0 else "worse"


def p_text(p: float) -> str:
    return f"p = {p:.3f}" if p >= 0.001 else "p < 0.001"


# ------------------------------------------------------------------------------------------------- over several tasks


class Ranking(NamedTuple):
    """Methods by their mean rank over tasks; 1 is best."""

    ranks: dict[str, float]
    """the best first"""
    p: float
    """Friedman's: the probability of ranks that differ as much by chance"""
    critical: float
    """Nemenyi's critical difference: methods whose mean ranks differ by less are not told apart"""
    tasks: int

    def groups(self) -> list[tuple[str, ...]]:
        """The largest sets of methods that are not told apart; all of them if Friedman's test finds nothing."""
        names = list(self.ranks)
        if self.p > LEVEL:
            return [tuple(names)]
        found: list[tuple[str, ...]] = []
        for i, name in enumerate(names):
            near = tuple(n for n in names[i:] if self.ranks[n] - self.ranks[name] < self.critical)
            if len(near) > 1 and not any(set(near) <= set(other) for other in found):
                found.append(near)
        return found


def ranking(scores: dict[str, Sequence[float]]) -> Ranking:
    """Friedman's test and Nemenyi's critical difference (Demsar 2006), from each method's score on each task. Raises
    ValueError for fewer than 3 tasks or methods."""
    table = np.array(list(scores.values()), float)  # [methods, tasks]
    methods, tasks = table.shape if table.ndim == 2 else (len(scores), 0)
    if tasks < 3 or methods < 3:
        raise ValueError(f"{methods} methods on {tasks} tasks; ranks are compared for at least 3 on at least 3")
    ranks = np.apply_along_axis(lambda column: stats.rankdata(-column), 0, table)
    ordered = len(set(map(tuple, ranks.tolist()))) > 1
    p = float(stats.friedmanchisquare(*table).pvalue) if ordered else 1.0
    studentized = stats.studentized_range.ppf(1 - LEVEL, methods, np.inf)
    critical = studentized / math.sqrt(2) * math.sqrt(methods * (methods + 1) / (6 * tasks))
    means = dict(zip(scores, map(float, ranks.mean(axis=1)), strict=True))
    return Ranking(dict(sorted(means.items(), key=lambda one: one[1])), p, float(critical), tasks)


def complete_block(scores: dict[str, dict[str, float]]) -> tuple[list[str], list[str]]:
    """The (tasks, methods) that have every score, from scores[task][method]: the most tasks that share at least 3
    methods, and of these the most methods. Empty where no 3 tasks do."""
    best: tuple[list[str], list[str]] = ([], [])
    for count in range(3, len(scores) + 1):
        for tasks in combinations(scores, count):
            methods = [name for name in scores[tasks[0]] if all(name in scores[task] for task in tasks)]
            if len(methods) >= 3 and (len(tasks), len(methods)) > (len(best[0]), len(best[1])):
                best = list(tasks), methods
    return best
