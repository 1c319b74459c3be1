"""Gate: what every HTTP request passes: its id, its key, errors as JSON, the log line and the metrics."""

from __future__ import annotations

import asyncio
import re
import time
import traceback
import uuid

from ..io.checks import printable, shorten
from ..io.error_frames import forget_frames
from ..io.messages import say, warn
from .address import names_this_machine
from .api_keys import ApiKeys
from .errors import ApiError
from .metrics import Metrics
from .traffic import Outcome

#: Paths that need no key.
OPEN_PATHS = ("/", "/page.css", "/page.js", "/health", "/ready", "/version")
#: Paths that are asked all the time; the log has no line for them while all is well.
QUIET_PATHS = ("/health", "/ready", "/metrics", "/page/state")
REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=-]{1,128}")


class Gate:
    """An ASGI app around another one. scope["state"] gets `access` (what the client may use) and `outcome`."""

    def __init__(self, app, keys: ApiKeys, metrics: Metrics, local: bool = False):
        """
        Args:
            local: whether only requests to a name of this machine are taken. Without keys, a web page could otherwise
                have its own name point at this machine, and a browser would let it read everything (DNS rebinding).
        """
        self.app, self.keys, self.metrics, self.local = app, keys, metrics, local

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":  # the lifespan of the application
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        path = printable(scope["raw_path"].decode("latin-1"), 200)  # as it was sent: a decoded one may have spaces
        outcome = Outcome(scope["method"], path, request_id(headers))

        async def answer(message) -> None:
            if message["type"] == "http.response.start":
                outcome.status = message["status"]
                own = (b"x-request-id", outcome.request_id.encode())
                message = {**message, "headers": [*message.get("headers", ()), own]}
            await send(message)

        state = scope.setdefault("state", {})
        try:
            state["outcome"] = outcome
            host = headers.get(b"host", b"localhost").decode("latin-1")
            if self.local and not names_this_machine(host):
                advice = "ask localhost, or start the server with --api-key-file"
                raise ApiError(403, f"the host {shorten(host)} is not localhost; {advice}", code="wrong_host")
            if scope["path"] not in OPEN_PATHS:
                state["access"] = self.keys.access(
                    headers.get(b"authorization", b"").decode("utf-8", "surrogateescape")
                )
            await self.app(scope, receive, answer)
        except ApiError as error:
            outcome.error = error.code or "invalid_request"
            await send_error(answer, outcome, error)
            forget_frames(error)  # which refer to the error: the circle would keep the request's adapter in memory
        except asyncio.CancelledError:
            outcome.error = "shutting_down"
            raise
        except Exception as error:
            outcome.error = type(error).__name__
            warn(f"server: {''.join(traceback.format_exception(error))}")
            await send_error(answer, outcome, ApiError(500, "the server failed on this request", code="internal_error"))
            forget_frames(error)
        finally:
            outcome.ended = time.monotonic()
            if outcome.error or outcome.path not in QUIET_PATHS:
                say(outcome.line())
            self.metrics.observe(outcome)  # also of those that were refused


async def send_error(send, outcome: Outcome, error: ApiError) -> None:
    """Sends the error, unless a response has begun."""
    if outcome.status is not None:
        return
    body = error.body
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    encoded = [(name.encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": encoded})
    await send({"type": "http.response.body", "body": body})


def request_id(headers: dict[bytes, bytes]) -> str:
    """The client's x-request-id if it is harmless, else a new one."""
    given = headers.get(b"x-request-id", b"")
    return given.decode() if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
