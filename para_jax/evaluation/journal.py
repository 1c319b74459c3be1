"""Answers, kept on disk as they come: a run that is killed loses none of them, and the same questions are not asked
again. A line has the answer's key (asked.py), which knows the adapter that answered by its content."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from .asked import Answer, Scored, Written


class Journal:
    """Answers by key, in memory and in a JSON-lines file, which one process at a time may write."""

    def __init__(self, file: Path | None = None):
        """
        Args:
            file: made where it is not there; None: in memory alone.

        Raises ValueError for a file that holds something else. What was being written in a kill is cut off.
        """
        self.file = file
        self._answers: dict[str, Answer] = dict(answers_of(file)) if file is not None and file.exists() else {}
        self._stream = None
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            self._stream = file.open("a")

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def __getitem__(self, key: str) -> Answer:
        return self._answers[key]

    def __len__(self) -> int:
        return len(self._answers)

    def add(self, key: str, answer: Answer) -> None:
        """Keeps an answer; it outlives a kill when this returns."""
        self._answers[key] = answer
        if self._stream is not None:
            self._stream.write(json.dumps({"key": key, **answer._asdict()}, ensure_ascii=False) + "\n")
            self._stream.flush()


def answers_of(file: Path) -> Iterator[tuple[str, Answer]]:
    """The answers of a file, after which what follows its last whole line is cut off."""
    whole = 0
    with file.open("rb") as lines:
        for line in lines:
            if not line.endswith(b"\n"):
                break
            try:
                found = json.loads(line)
                key = found.pop("key")
                yield key, (Scored if "logprob" in found else Written)(**found)
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{file}: holds something else than answers; choose another folder") from None
            whole += len(line)
    os.truncate(file, whole)
