"""Speculation by prompt lookup: an answer often repeats its prompt or its own beginning. If its last tokens occurred
before, those that came after them then are drafted, and one pass verifies the drafts of all rows.

A pass takes longer than a decode step, so a round makes one only if it is likely to give more tokens in that time. Each
row has an estimate of how many drafted tokens will be right. Rounds without a pass also compare their tokens with the
drafts, so learning the estimate costs no pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

#: How many of the last tokens must have occurred before. The longest match counts.
NGRAMS = 3, 2
#: The weight of the latest draft in a row's estimate.
WEIGHT = 0.3
#: In place of a drafted token: no token, and not draw.NO_TOKEN.
NOTHING = -2
#: What a pass over drafts costs, in decode steps, until warm_up has measured it.
UNMEASURED = 2.0


class SpeculationStats(NamedTuple):
    """What passes over drafts did since the engine was made. Accepted divided by drafted is the share of drafted tokens
    that were right."""

    drafts: int
    """how many were verified, one per row and pass"""
    drafted: int
    """tokens of these drafts"""
    accepted: int
    """drafted tokens that the model chose too"""


class Lookup:
    """A prompt and its answer so far, with the place of each n-gram."""

    def __init__(self, ids: Sequence[int], most: int):
        """
        Args:
            most: tokens of a draft.
        """
        self.most, self.expected = most, 0.0
        """expected: how many tokens of the next draft are likely to be right"""
        self._prompt, self._tokens = len(ids), []
        self._after: dict[tuple[int, ...], int] = {}
        """the position after the last occurrence of each n-gram"""
        self._add(ids)

    def _add(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            for count in NGRAMS:  # n-grams that this token follows
                if len(self._tokens) >= count:
                    self._after[tuple(self._tokens[-count:])] = len(self._tokens)
            self._tokens.append(token)

    def draft(self, answer: Sequence[int]) -> list[int]:
        """A guess at the tokens that come next. Empty if the last tokens have not occurred before.

        Args:
            answer: all its tokens so far.

        >>> Lookup([5, 6, 7, 8, 5], most=3).draft([6])
        [7, 8, 5]
        """
        self._add(answer[len(self._tokens) - self._prompt :])
        found = (self._after.get(tuple(self._tokens[-count:])) for count in NGRAMS)
        start = next((start for start in found if start is not None), None)
        if start is None:
            return []
        tokens = self._tokens[start : start + self.most]
        while len(tokens) < self.most:  # a match near the end: what lies between repeats
            tokens.append(tokens[len(tokens) - (len(self._tokens) - start)])
        return tokens

    def compare(self, draft: Sequence[int], tokens: Sequence[int]) -> int:
        """How many tokens of a draft are right, from the tokens that the model wrote instead. Updates the estimate."""
        seen = min(len(draft), len(tokens))
        right = next((i for i in range(seen) if draft[i] != tokens[i]), seen)
        self.expected += WEIGHT * (right - self.expected)
        return right


def draft_array(drafts: Mapping[int, Sequence[int]], slots: int, most: int) -> np.ndarray:
    """int32 [slots, most]: the drafts by slot, filled up with NOTHING."""
    array = np.full((slots, most), NOTHING, np.int32)
    for slot, draft in drafts.items():
        array[slot, : len(draft)] = draft
    return array
