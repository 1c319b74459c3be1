"""Answers, kept on disk as they come. A killed evaluation loses none of them, and asks none of their questions again.

Each line has the answer's key (questions.py), which identifies the adapter by its content.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from ..io.journal import Journal, kept_lines
from ..io.storage.bucket import Place
from .questions import Answer, Scored, Written

HEAD = '{"key": '


class AnswerJournal:
    """Answers by key, in memory and in a journal."""

    def __init__(self, file: Place | None = None):
        """
        Args:
            file: created if it is missing; None: answers stay in memory.
        """
        self.file = file
        self._answers: dict[Hashable, Answer] = {}
        self._lines = None if file is None else Journal(file, HEAD, lambda row: self._answers.update([answer_of(row)]))

    def __contains__(self, key: Hashable) -> bool:
        return key in self._answers

    def __getitem__(self, key: Hashable) -> Answer:
        return self._answers[key]

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, key: Hashable, answer: Answer) -> None:
        """Keeps an answer, on disk as `Journal.add` does."""
        if self._lines is not None:
            self._lines.add({"key": key, **answer._asdict()})
        self._answers[key] = answer

    def sync(self) -> None:
        if self._lines is not None:
            self._lines.sync()

    def close(self) -> None:
        if self._lines is not None:
            self._lines.close()


def journal_lines(file: Place) -> Iterator[tuple[bytes, str, Answer]]:
    """The complete lines of a file, each with its key and answer; none if there is no file. Raises ValueError for one
    that is not an answer."""
    answers: list[tuple[str, Answer]] = []
    for line in kept_lines(file, HEAD, lambda row: answers.append(answer_of(row))):
        yield line, *answers.pop()


def answer_of(row: dict) -> tuple[str, Answer]:
    """A line's key and answer. Raises KeyError or TypeError for a line that is none."""
    key = row.pop("key")
    return key, (Scored if "logprob" in row else Written)(**row)
