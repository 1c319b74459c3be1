"""Traffic: what each tenant has asked for and got, for the log, the metrics and the page."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..config import BASE
from ..io.checks import printable
from ..serving.stream import Stream
from .models import Models


@dataclass
class Counts:
    """Of one tenant, or of all."""

    requests: Counter[str] = field(default_factory=Counter)
    """requests that have ended, by how: completed, or the code of an error"""
    prompt_tokens: int = 0
    new_tokens: int = 0


@dataclass
class Outcome:
    """What is known of one HTTP request. Times are seconds of time.monotonic(), and None for what has not happened."""

    method: str
    path: str
    request_id: str
    received: float = field(default_factory=time.monotonic)
    """when its headers were there"""
    status: int | None = None
    """None: the client left before there was an answer"""
    error: str | None = None
    """the code of what ended it early, which a stream that has begun cannot say by its status: client_left, timeout,
    shutting_down, engine_failed, ..."""
    ended: float | None = None

    # ------------------------------------------------------------------ of a request that the engine has taken
    served: bool = False
    """whether the engine has taken it; the fields below are only then of use"""
    tenant: str | None = None
    """None: the base model"""
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    choices: int = 1
    """how many it asks for"""
    finish_reasons: list[str] = field(default_factory=list)
    """one per choice that has ended: stop | length | error"""
    queued: float | None = None
    """when the engine took it"""
    started: float | None = None
    """when its first prompt left the queue"""
    first_token: float | None = None
    gaps: list[tuple[float, int]] = field(default_factory=list)
    """for each piece of an answer but its choice's first: the seconds since the piece before, and its tokens"""
    prompt: str | None = None
    """the beginning of the prompt, only if prompts are logged"""
    counts: tuple[Counts, ...] = ()
    """its tenant's and those of all, to which its tokens are added as they come"""
    _last: dict[int, float] = field(default_factory=dict)
    """when the last piece of each choice came"""

    def note_times(self, streams: Sequence[Stream]) -> None:
        """Notes the earliest times of a request's streams."""
        waited = self.started is None
        for name in ("queued", "started", "first_token"):
            times = [time for stream in streams if (time := getattr(stream.times, name)) is not None]
            setattr(self, name, min(times, default=None))
        for counts in self.counts if waited and self.started is not None else ():  # once, when it starts
            counts.prompt_tokens += self.prompt_tokens

    def note_piece(self, choice: int, at: float, tokens: int, finish_reason: str | None) -> None:
        """Notes a piece of an answer that came at a time."""
        self.new_tokens += tokens
        for counts in self.counts:
            counts.new_tokens += tokens
        if tokens:
            if choice in self._last:
                self.gaps.append((at - self._last[choice], tokens))
            self._last[choice] = at
        if finish_reason is not None:
            self.finish_reasons.append(finish_reason)

    def line(self) -> str:
        """The log line."""
        ended = time.monotonic() if self.ended is None else self.ended
        parts = [self.method, self.path, "-" if self.status is None else str(self.status)]
        if self.served:
            name = BASE if self.tenant is None else printable(self.tenant, 100)
            parts += ["model=" + name.replace(" ", "\\x20")]  # else a name could write fields
            parts += [f"prompt={self.prompt_tokens}", f"cached={self.cached_tokens}", f"new={self.new_tokens}"]
            if self.first_token is not None:
                parts.append(f"ttft={1000 * (self.first_token - self.received):.0f}ms")
        parts.append(f"total={1000 * (ended - self.received):.0f}ms")
        parts += [f"error={self.error}"] if self.error else []
        parts.append(f"id={self.request_id}")
        return " ".join(parts) + (f" text={self.prompt}" if self.prompt is not None else "")


class Traffic:
    """Counts by tenant. asyncio's thread writes them, and any thread may read them.

    A tenant that has left the bank is not shown.
    """

    def __init__(self, models: Models):
        self._models = models
        self._counts: dict[str | None, Counts] = {None: Counts()}
        """None: the base model"""
        self.total = Counts()

    def begin(self, outcome: Outcome) -> None:
        """Lets a request that the engine has taken count its tokens as they come."""
        outcome.counts = self._counts.setdefault(outcome.tenant, Counts()), self.total

    def end(self, outcome: Outcome) -> None:
        """Counts a request that has ended."""
        for counts in outcome.counts:
            counts.requests[outcome.error or "completed"] += 1

    def by_tenant(self) -> dict[str | None, Counts]:
        """Of the base model (None), and of each tenant that has sent a request."""
        counts = list(self._counts.items())  # at once: asyncio adds to them meanwhile
        return {name: counts for name, counts in counts if name is None or self._models.has(name)}
