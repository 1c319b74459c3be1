"""The endpoints of /v1/chat/completions and /v1/completions."""

from __future__ import annotations

from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import Response

from .engine_loop import EngineLoop
from .errors import ApiError
from .models import Models


class Limits(NamedTuple):
    """Bounds of a request."""

    max_body: int = 8 * 2**20
    """bytes"""
    body_seconds: float = 30
    """within which the body must have come"""
    timeout: float = 600
    """seconds until the whole answer must have been sent"""
    log_prompts: bool = False


class Answering:
    def __init__(self, loop: EngineLoop, models: Models, limits: Limits):
        self.loop, self.models, self.limits = loop, models, limits

    async def chat(self, request: Request) -> Response:
        raise ApiError(500, "not yet")

    async def completions(self, request: Request) -> Response:
        raise ApiError(500, "not yet")

    def close(self) -> None:
        pass
