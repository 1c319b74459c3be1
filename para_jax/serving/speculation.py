"""Speculation by prompt lookup: an answer often repeats what its prompt or its own beginning says. Tokens that followed
the last tokens before are drafted, and one pass verifies them.

A round speculates only if that pays: if the rows' drafts held so far would bring more tokens than the longer pass
costs. Rounds that do not speculate compare their tokens with the drafts as well, so trying costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

#: Tokens that must have occurred before, the longest first. Pairs and triples of tokens say what follows far better
#: than one token does.
NGRAMS = 3, 2
#: What the last draft counts in a row's estimate.
WEIGHT = 0.3
#: In place of a drafted token: no token, and not draw.NO_TOKEN.
NOTHING = -2
#: What a pass over drafts costs, in decode steps, until warm_up has measured it.
UNMEASURED = 2.0


class SpeculationStats(NamedTuple):
    """What an engine has speculated since it was made. Accepted divided by drafted is the share of drafted tokens that
    the model would have written too."""

    drafts: int
    """that were verified"""
    drafted: int
    """tokens of them"""
    accepted: int
    """tokens that the model wrote too"""


class Lookup:
    """A prompt and its answer so far, and what followed each of its n-grams the last time."""

    def __init__(self, ids: Sequence[int], most: int):
        """
        Args:
            most: tokens of a draft.
        """
        self.most, self.expected = most, 0.0
        """expected: drafted tokens that the next draft is likely to have right"""
        self._prompt, self._tokens = len(ids), []
        self._after: dict[tuple[int, ...], int] = {}
        """the position after the last occurrence of each n-gram"""
        self._add(ids)

    def _add(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            for count in NGRAMS:  # known from now on: something follows it
                if len(self._tokens) >= count:
                    self._after[tuple(self._tokens[-count:])] = len(self._tokens)
            self._tokens.append(token)

    def draft(self, answer: Sequence[int]) -> list[int]:
        """The tokens that are likely to follow the answer so far; none if its last ones have not occurred before.

        >>> Lookup([5, 6, 7, 8, 5], most=3).draft([6])
        [7, 8, 5]
        """
        self._add(answer[len(self._tokens) - self._prompt :])
        found = (self._after.get(tuple(self._tokens[-count:])) for count in NGRAMS)
        start = next((start for start in found if start is not None), None)
        if start is None:
            return []
        tokens = self._tokens[start : start + self.most]
        while len(tokens) < self.most:  # the draft itself goes on where the text ends
            tokens.append(tokens[len(tokens) - (len(self._tokens) - start)])
        return tokens

    def compare(self, draft: Sequence[int], tokens: Sequence[int]) -> int:
        """How many drafted tokens the model wrote; the estimate learns from it.

        Args:
            tokens: what the model wrote after the draft was made.
        """
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
