"""The body of a request, read within bounds."""

from __future__ import annotations

import asyncio

from ..io.checks import shorten
from .errors import ApiError


class ClientLeft(Exception):
    """The client closed the connection before its request was complete."""


async def read_body(scope, receive, *, most: int, seconds: float) -> bytes:
    """The body of a POST of JSON. Raises ApiError 413 as soon as it has more than `most` bytes, 408 if it takes longer
    than `seconds`, and 415 for another content type.

    The content type is required because a web page of another site can make a browser send anything else without
    asking.
    """
    headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
    kind = headers.get(b"content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type is {shorten(kind)}; send `content-type: application/json`")
    if headers.get(b"content-encoding", "identity") != "identity":
        raise ApiError(415, "the body is compressed; send it as it is")
    length = headers.get(b"content-length", "")
    too_large = ApiError(413, f"the body has more than {most} bytes; send less", code="body_too_large")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large
    body, more = bytearray(), True
    try:
        async with asyncio.timeout(seconds):
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > most:
                    raise too_large
    except TimeoutError:
        close = {"connection": "close"}
        raise ApiError(408, f"the body was not there after {seconds:g} s", code="body_late", headers=close) from None
    return bytes(body)
