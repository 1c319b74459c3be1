"""Errors as OpenAI's API has them: a status, and {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import json
from collections.abc import Mapping

TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """Ends a request with this status and message, which the client sees."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        """
        Args:
            param: the field that is wrong.
            code: a short name of the error for programs.
        """
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> bytes:
        """The JSON that the client gets. Escapes keep it ASCII, whatever the message quotes."""
        kind = TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return json.dumps({"error": error}).encode()


def wrong_field(param: str | None, message: str, code: str | None = None) -> ApiError:
    """400: a field of the request is wrong."""
    return ApiError(400, message, param=param, code=code)


def retry_later(status: int, seconds: int, message: str, code: str) -> ApiError:
    """429 or 503, with the seconds after which to try again."""
    return ApiError(status, message, code=code, headers={"retry-after": str(seconds)})
