"""Beam search, on the host: which beams go on, and which answers are the best.

It is transformers' (`_beam_search` with early_stopping=False): an answer's score is the sum of its tokens'
log-probabilities, its end token's too, divided by their number to the power of length_penalty.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import numpy as np

from .draw import NO_TOKEN_MESSAGE
from .sampling import Sampling


class Beam(NamedTuple):
    """An answer, or the beginning of one."""

    score: float
    """the sum of the log-probabilities; of an answer, with the length penalty"""
    tokens: list[int]
    row: int
    """the row that its last token continues"""


class BeamSearch:
    """The beams of one prompt.

    Args:
        ends: ids of the tokens that end an answer.
    """

    def __init__(self, sampling: Sampling, ends: Collection[int]):
        self.sampling, self.ends = sampling, frozenset(ends)
        self.running = [Beam(0.0, [], 0)]
        """the best first; `num_beams` of them after the first tokens"""
        self.answers: list[Beam] = []
        """the best first, at most `num_beams`"""
        self.over = False

    @property
    def most(self) -> int:
        """How many of each row's likeliest tokens the search looks at: some of them may be end tokens."""
        return self.sampling.num_beams + len(self.ends)

    def advance(self, ids: np.ndarray, logprobs: np.ndarray) -> None:
        """Extends the beams by a token. Raises ValueError where the logits are not finite.

        Args:
            ids, logprobs: of the likeliest next tokens of each running beam, at least `most` or the whole vocabulary,
                [rows, tokens]; further rows are ignored.
        """
        beams, penalty = self.sampling.num_beams, self.sampling.length_penalty
        if not np.isfinite(logprobs[: len(self.running)]).all():
            raise ValueError(NO_TOKEN_MESSAGE)
        longer = [
            Beam(beam.score + logprob, [*beam.tokens, token], row)
            for row, beam in enumerate(self.running)
            for token, logprob in zip(ids[row].tolist(), logprobs[row].tolist(), strict=True)
        ]
        longer.sort(key=lambda beam: -beam.score)
        length = len(longer[0].tokens)
        full = length == self.sampling.max_new_tokens
        # an end token counts only among the best num_beams, so a search ends late rather than with a poor answer
        ended = [beam for beam in longer[:beams] if full or beam.tokens[-1] in self.ends]
        self.answers += [beam._replace(score=beam.score / length**penalty) for beam in ended]
        self.answers = sorted(self.answers, key=lambda beam: -beam.score)[:beams]
        self.running = [beam for beam in longer if beam.tokens[-1] not in self.ends][:beams]
        best = self.running[0].score / length**penalty
        self.over = full or (len(self.answers) == beams and best <= self.answers[-1].score)
