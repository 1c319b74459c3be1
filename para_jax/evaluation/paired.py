"""Which scores on the same examples differ by more than noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

#: Chance alone gives a difference that counts as more than noise this rarely.
SIGNIFICANCE = 0.05
#: Draws of the randomization test, in parts.
PARTS, AT_ONCE = 100, 100


def within_noise(rows: Mapping[str, Sequence[float]], best: str) -> list[str]:
    """The names whose scores are not told apart from that of `best`. The level is divided by the number of all pairs
    (Bonferroni), because the best one was picked after looking at the scores.

    Args:
        rows: what each of the same examples contributes to a score (metrics.measure_rows), by name.
    """
    level = SIGNIFICANCE / max(1, math.comb(len(rows), 2))
    own = np.asarray(rows[best])
    return [name for name, other in rows.items() if name != best and randomization_p(own - other) > level]


def randomization_p(differences: np.ndarray) -> float:
    """The two-sided p-value of Fisher's randomization test for paired scores (The Design of Experiments, 1935, section
    21; in NLP: Yeh 2000, aclanthology.org/C00-2137): how often the differences have at least this sum, up to its sign,
    if a coin chooses the sign of each. For answers that are right or wrong this is McNemar's exact test.

    The coin's choices are drawn with a fixed seed, and the observed one counts as a draw. A p-value that is too small
    for the number of draws is given by Hoeffding's bound (1963).
    """
    found = differences[differences != 0]
    if not len(found):
        return 1.0
    draw, least = np.random.default_rng(0), abs(found.sum()) * (1 - 1e-9)
    signs = (draw.choice((-1.0, 1.0), (AT_ONCE, len(found))) for _ in range(PARTS))
    hits = sum(int((abs(one @ found) >= least).sum()) for one in signs)
    return min((1 + hits) / (1 + PARTS * AT_ONCE), 2 * math.exp(-(least**2) / (found**2).sum() / 2))
