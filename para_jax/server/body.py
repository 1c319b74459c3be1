"""The body of a request: read within bounds, and parsed as one JSON object."""

from __future__ import annotations

import asyncio
import json
import sys

from ..data.rows import json_problem
from ..io.checks import shorten, without_repeats
from ..io.untrusted import MAX_DEPTH, bounded_int, require_flat
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


def json_object(body: bytes) -> dict:
    """The object in a body. Raises ApiError 400 for anything else, for more than MAX_DEPTH levels, for a repeated name,
    because readers differ in which of its values they use, and for NaN and Infinity, which JSON lacks."""
    try:
        found = json.loads(
            str(body, "utf-8"),
            object_pairs_hook=without_repeats,
            parse_int=None if digits_are_limited() else bounded_int,
            parse_constant=refuse_constant,
        )
        require_flat(found)
    except RecursionError:
        raise ApiError(400, f"the body nests deeper than {MAX_DEPTH} levels", code="invalid_json") from None
    except UnicodeDecodeError:
        raise ApiError(400, "the body is not UTF-8", code="invalid_json") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {json_problem(error)}", code="invalid_json") from None
    except ValueError as error:
        problem = str(error).partition("; use sys.")[0]  # Python's advice on too many digits is none for a client
        raise ApiError(400, f"the body: {problem}", code="invalid_json") from None
    if not isinstance(found, dict):
        raise ApiError(400, f"the body is {shorten(found)}; send a JSON object", code="invalid_json")
    return found


def digits_are_limited() -> bool:
    """Whether Python itself refuses numbers of more than 4300 digits, as it does unless it was told otherwise. A
    function of our own takes a second where a body has millions of numbers."""
    return 0 < sys.get_int_max_str_digits() <= sys.int_info.default_max_str_digits


def refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a number of JSON")
