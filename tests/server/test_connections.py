"""A connection holds little, and not for long: raw sockets against a real uvicorn."""

import asyncio
import resource
import socket
import threading
import time
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import uvicorn

from para_jax.server import concurrency, serve
from para_jax.server.answering import Limits
from para_jax.server.connections import PIECE, BoundedProtocol, allow_open_files

GET = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
SECONDS = 0.5


async def app(scope, receive, send):
    """Answers with the length of the body. /early does so before it reads, /wait never, /big with 64 MB in
    pieces, and /whole with 64 MB at once."""
    start = {"type": "http.response.start", "status": 200, "headers": []}
    if scope["path"] == "/wait":
        await asyncio.sleep(60)
    if pieces := {"/big": 64, "/whole": 1}.get(scope["path"]):
        await send(start)
        for _ in range(pieces):
            await send({"type": "http.response.body", "body": bytes(2**26 // pieces), "more_body": True})
        return await send({"type": "http.response.body"})
    length, more = 0, scope["path"] != "/early"
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            return
        length, more = length + len(message["body"]), message["more_body"]
    await send(start)
    await send({"type": "http.response.body", "body": b"length %d" % length})


@contextmanager
def server(loop="asyncio", **limits):
    """The address of a running server."""
    protocol = type("Protocol", (BoundedProtocol,), limits)
    config = uvicorn.Config(app, port=0, http=protocol, ws="none", loop=loop, lifespan="off", log_level="critical")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run, daemon=True)
    thread.start()
    while not running.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    try:
        yield running.servers[0].sockets[0].getsockname()
    finally:
        running.should_exit = running.force_exit = True
        thread.join(60)


def connect(address):
    return socket.create_connection(address, timeout=5)


def read_all(client) -> bytes:
    """What comes until the server closes; the error text of the socket if it resets."""
    found = b""
    try:
        while part := client.recv(2**16):
            found += part
    except ConnectionResetError:
        found += b"(reset)"
    return found


def read_some(client, most=2**16) -> bytes:
    """What has come. A closed connection gives nothing for ever, and so is an error."""
    part = client.recv(most)
    assert part, "the server closed the connection"
    return part


def answer(address, request=GET) -> bytes:
    with connect(address) as client:
        client.sendall(request)
        return client.recv(2**16)


def status(response: bytes) -> int:
    return int(response.split()[1])


#: uvicorn takes uvloop where it is installed.
LOOPS = ["asyncio", *(pytest.param(name, marks=pytest.mark.long) for name in ["uvloop"] if find_spec(name))]


@pytest.fixture(scope="module", params=LOOPS)
def quick(request):
    limits = {"header_seconds": SECONDS, "body_seconds": 2 * SECONDS, "write_seconds": SECONDS}
    with server(request.param, **limits, max_header_bytes=8192) as address:
        yield address


@pytest.fixture(scope="module", params=LOOPS)
def patient(request):
    """A server with the usual limits of time."""
    with server(request.param, max_header_bytes=8192) as address:
        yield address


def test_requests_are_answered_one_after_the_other_and_pipelined(quick):
    with connect(quick) as client:
        post = b"POST /%s HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n" + bytes(100_000)
        client.sendall(GET + post % b"early" + post % b"" + GET)
        found = b""
        while found.count(b"0\r\n\r\n") < 4:
            found += read_some(client)
        assert [found.count(b"length %d\r\n" % size) for size in (0, 100_000)] == [3, 1]
        time.sleep(2.5 * SECONDS)  # no clock of an earlier request runs on
        client.sendall(GET)
        assert status(client.recv(2**16)) == 200


def test_headers_that_come_byte_by_byte_end_with_408(quick):
    with connect(quick) as client:
        began = time.monotonic()
        client.settimeout(0.02)
        for byte in GET[:-1] * 100:
            try:
                client.sendall(bytes([byte]))
                found = client.recv(2**16)
                break
            except TimeoutError:
                continue
        assert status(found) == 408 and b"header" in found
        assert SECONDS * 0.9 < time.monotonic() - began


def test_a_connection_that_sends_nothing_is_closed_without_an_answer(quick):
    with connect(quick) as client:
        assert read_all(client) == b""


def test_a_second_request_on_a_connection_has_the_same_limit(quick):
    with connect(quick) as client:
        client.sendall(GET + b"GET / HT")
        assert status(read_all(client).partition(b"0\r\n\r\n")[2]) == 408


@pytest.mark.parametrize("path", [b"/", b"/early"])
def test_a_body_that_does_not_end_is_cut_off(quick, path):
    with connect(quick) as client:
        client.sendall(b"POST %s HTTP/1.1\r\nhost: x\r\ncontent-length: 1000000\r\n\r\n" % path)
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() - began < 30:
                client.sendall(b"x")
                time.sleep(0.02)


@pytest.mark.parametrize("size", [8192 + 2 * PIECE, 10**6])
def test_large_headers_get_431_also_if_they_come_at_once(patient, size):
    with connect(patient) as client:
        try:
            client.sendall(GET[:-2] + b"a: " + b"b" * size + b"\r\n\r\n")
        except OSError:  # closed while we sent
            pass
        found = read_all(client)
        assert found == b"(reset)" or status(found) == 431
    assert status(answer(patient, GET[:-2] + b"a: " + b"b" * 8000 + b"\r\n\r\n")) == 200


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: -1\r\n\r\n",
        b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0",
    ],
)
def test_what_is_not_http_gets_400(patient, garbage):
    found = answer(patient, garbage + b"\r\n\r\n")
    assert status(found) == 400 and b'"type": "invalid_request_error"' in found


def test_a_bad_chunk_of_a_body_gets_400(patient):
    assert status(answer(patient, b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n")) == 400


def test_a_body_in_tiny_chunks_gets_400(patient):
    """Its parsing would keep asyncio from all other connections."""
    head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    assert status(answer(patient, head + b"1\r\na\r\n" * 1200 + b"0\r\n\r\n")) == 400
    small = head + (b"1\r\na\r\n" + b"200\r\n" + b"a" * 512 + b"\r\n") * 1200 + b"0\r\n\r\n"
    assert status(answer(patient, small)) == 200


def test_a_client_that_does_not_read_is_closed(quick):
    with connect(quick) as client:
        client.sendall(GET.replace(b"/ ", b"/big ", 1))
        time.sleep(4 * SECONDS)
        assert 0 < len(read_all(client)) < 64 * 2**20


@pytest.mark.long
@pytest.mark.parametrize("path", [b"/big ", b"/whole "])
@pytest.mark.parametrize("loop", LOOPS)
def test_a_client_that_reads_slowly_gets_all(loop, path):
    seconds = 1.0  # on a busy machine both sides may stand still for a while
    with server(loop, write_seconds=seconds) as address, connect(address) as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**18)
        client.sendall(GET.replace(b"/ ", path, 1))
        found, began = 0, time.monotonic()
        while found < 64 * 2**20:
            found += len(read_some(client, 2**22))
            if time.monotonic() - began < 2.5 * seconds:
                time.sleep(0.05)
    assert time.monotonic() - began > 2 * seconds


@pytest.mark.parametrize("loop", LOOPS)
def test_silent_connections_make_room_and_those_that_wait_for_answers_do_not(loop):
    with server(loop, max_connections=4) as address:
        silent = [connect(address) for _ in range(20)]
        for begun in (b"GET / HT", b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 9\r\n\r\n"):
            assert status(answer(address)) == 200
            silent += [connect(address) for _ in range(4)]
            for one in silent[-4:]:
                one.sendall(begun)
            time.sleep(0.2)
        assert status(answer(address)) == 200
        assert silent[0].recv(1) == b""
        busy = [connect(address) for _ in range(4)]
        for one in busy:
            one.sendall(GET.replace(b"/ ", b"/wait ", 1))
        time.sleep(0.5)
        with connect(address) as client:
            assert status(read_all(client)) == 503
        busy[0].close()
        time.sleep(0.5)
        assert status(answer(address)) == 200
        for one in silent + busy:
            one.close()


@pytest.mark.long
@pytest.mark.parametrize("loop", LOOPS)
def test_two_thousand_sockets_that_send_nothing_stop_no_one(loop):
    allow_open_files(8000)
    with server(loop, header_seconds=60) as address:
        silent = [connect(address) for _ in range(2000)]
        for _ in range(20):
            assert status(answer(address)) == 200
        for one in silent:
            one.close()


def test_a_process_may_open_as_many_files_as_asked_or_allowed():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(900, before[0]), before[1]))
        allow_open_files(50)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 900
        allow_open_files(1000)
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == 1000
        if before[1] != resource.RLIM_INFINITY:
            allow_open_files(before[1] + 1)
            assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] == before[1]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
    ("queue", "files", "expected"),
    [
        (1024, 10**6, (1160, 1416)),
        (None, 10**6, (1160, 1416)),
        (12, 10**6, (148, 800)),
        (5000, 10**6, (5136, 5392)),
        (5000, 1024, (512, 768)),
        (12, 100, (1, 75)),
    ],
)
def test_connections_suffice_for_a_full_queue_and_for_probes(monkeypatch, queue, files, expected):
    monkeypatch.setattr(concurrency, "allow_open_files", lambda count: min(count, files))
    assert concurrency.concurrency_for(8, queue) == expected


def test_the_usual_limits_are_those_of_the_documentation():
    limits = BoundedProtocol
    found = limits.max_connections, limits.max_header_bytes, limits.header_seconds, Limits().body_seconds
    assert found == (800, 32 * 1024, 10, 30)
    assert (limits.write_seconds, limits.WRITE_BYTES, serve.KEEP_ALIVE_SECONDS) == (30, 4096, 620)
