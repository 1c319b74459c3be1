"""Outcome: what is known of one HTTP request when it has ended. The log line and the metrics are made from it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from ..config import BASE
from ..io.checks import printable


@dataclass
class Outcome:
    """Times are seconds of time.monotonic(), and None for what has not happened."""

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
    _last: dict[int, float] = field(default_factory=dict)
    """when the last piece of each choice came"""

    def note_piece(self, choice: int, at: float, tokens: int, finish_reason: str | None) -> None:
        """Notes a piece of an answer that came at a time."""
        self.new_tokens += tokens
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
