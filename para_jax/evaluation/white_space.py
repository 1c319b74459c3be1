"""A warning for scores that compare answers with the white space at their ends, as lm-eval's exact match does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..io.messages import warn

#: The fewest answers that are worth a warning, unless it is all of them.
FEW = 3


class Stripped(NamedTuple):
    """A task's exact match as it is scored, and without the white space at the ends of answers."""

    scored: float
    stripped: float

    @classmethod
    def of(cls, scored: float, gained: float, count: int) -> Stripped | None:
        """None unless white space costs more than a few answers.

        Args:
            gained: how many of `count` answers are right only without it.
        """
        return cls(scored, scored + gained / count) if count and gained >= min(FEW, count) else None


def warn_of_white_space(found: Mapping[str, Sequence[Stripped]]) -> None:
    """One line for each task, about the adapter that loses most."""
    for task, adapters in found.items():
        most = max(adapters, key=lambda one: one.stripped - one.scored)
        warn(
            f"{task}: exact_match is {most.scored:.4f}, and {most.stripped:.4f} if white space at the ends of answers "
            "is ignored; add remove_whitespace to the task's filter_list (docs/lm_eval.md)"
        )
