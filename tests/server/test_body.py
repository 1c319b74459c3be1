"""Bodies are bounded in size and time, and are JSON."""

import asyncio

import pytest

from para_jax.server.body import ClientLeft, read_body
from para_jax.server.errors import ApiError

JSON = [(b"content-type", b"application/json; charset=utf-8")]


def read(chunks, headers=JSON, most=10, seconds=5.0):
    """What read_body gives for a body in these chunks. None waits for ever; an exception is the client's leaving."""
    messages = iter(chunks)

    async def receive():
        chunk = next(messages, b"")
        if chunk is None:
            await asyncio.sleep(60)
        if chunk is ClientLeft:
            return {"type": "http.disconnect"}
        return {"type": "http.request", "body": chunk, "more_body": chunk != b""}

    return asyncio.run(read_body({"headers": headers}, receive, most=most, seconds=seconds))


def status(function, *arguments, **options):
    with pytest.raises(ApiError) as raised:
        function(*arguments, **options)
    return raised.value.status


def test_a_body_comes_in_any_number_of_chunks():
    assert read([b"abc", b"de"]) == b"abcde"
    assert read([b"0123456789"]) == b"0123456789"


def test_a_body_that_is_too_large_is_refused_before_it_is_held():
    assert status(read, [b"01234567890"]) == 413
    assert status(read, [b"01234", b"56789", b"0", None]) == 413
    assert status(read, [None], [*JSON, (b"content-length", b"11")]) == 413
    assert status(read, [None], [*JSON, (b"content-length", b"9" * 5000)]) == 413


def test_a_body_that_does_not_come_is_refused():
    assert status(read, [b"a", None], seconds=0.05) == 408


def test_a_client_that_leaves_ends_the_reading():
    with pytest.raises(ClientLeft):
        read([b"a", ClientLeft])


@pytest.mark.parametrize("kind", [b"text/plain", b"application/x-www-form-urlencoded", b"", b"application/json2"])
def test_other_content_types_are_refused(kind):
    """A web page of another site can send these without the browser asking the server first."""
    assert status(read, [b"{}"], [(b"content-type", kind)]) == 415
    assert status(read, [b"{}"], []) == 415
    assert status(read, [b"{}"], [*JSON, (b"content-encoding", b"gzip")]) == 415
