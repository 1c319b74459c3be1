"""BoundedProtocol: uvicorn's HTTP protocol with limits on what a connection may hold and for how long. Without them a
client that sends a header byte by byte, or never reads, keeps a socket for ever.

    uvicorn.Config(app, http=BoundedProtocol, ws="none")

Other limits: `type("Protocol", (BoundedProtocol,), {"header_seconds": 5})`.
"""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from typing import cast

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from .errors import ApiError

#: Bytes that are given to the parser at once while it reads headers. It checks their size only between two pieces.
PIECE = 4096
#: A chunked body may have this many pieces, and one more for each LEAST_PIECE bytes. Parsing a piece takes as long as
#: parsing kilobytes, and no other connection is served meanwhile.
PIECES, LEAST_PIECE = 1000, 64


class Connection(h11.Connection):
    """Raises h11.RemoteProtocolError for a body in too many tiny pieces, or with two headers that say how it ends."""

    pieces, size = 0, 0

    def next_event(self):
        event = super().next_event()
        if isinstance(event, h11.Request):
            names = {name for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:  # a proxy may go by the other one (RFC 9112, 6.1)
                raise h11.RemoteProtocolError("the request has both Content-Length and Transfer-Encoding")
        if isinstance(event, h11.Data):
            self.pieces, self.size = self.pieces + 1, self.size + len(event.data)
            if self.pieces > PIECES + self.size // LEAST_PIECE:
                raise h11.RemoteProtocolError(f"a body in {self.pieces} pieces has {self.size} bytes")
        elif isinstance(event, h11.EndOfMessage):
            self.pieces = self.size = 0
        return event


class BoundedProtocol(H11Protocol):
    """A connection. Each limit is an attribute of the class."""

    max_connections = 800
    """open connections in all. Beyond that, a new connection replaces the one that has been silent longest. If all
    clients wait for answers, it gets a 503"""
    max_header_bytes = 32 * 1024
    """of a request line with its headers"""
    header_seconds = 10.0
    """from the first byte of a request, or from the connection, to the end of the headers"""
    body_seconds = 60.0
    """from the end of the headers to the end of the body"""
    write_seconds = 30.0
    """in this time a client must read WRITE_BYTES of what waits for it, or all"""
    WRITE_BYTES = 4096

    def __init__(self, config, server_state, app_state, _loop: asyncio.AbstractEventLoop | None = None):
        super().__init__(config, server_state, app_state, _loop)
        self.conn = Connection(h11.SERVER, self.max_header_bytes)
        self.silent_since: float | None = self.loop.time()
        """when the client began to owe a request, or the rest of one; None while it waits for an answer"""
        self._reading: tuple[object, asyncio.TimerHandle] | None = None
        """what is being read, and the timer that ends it"""
        self._writing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        transport = cast(asyncio.Transport, transport)
        if len(self.connections) >= self.max_connections and not self._close_longest_silent():
            self.transport = transport
            transport.write(error_bytes(503, f"the server has {self.max_connections} open connections; try again"))
            transport.close()
            return
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # pause_writing is then called as soon as the client falls behind
        self._watch_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_reading()
        self._end_writing()
        super().connection_lost(exc)

    def _close_longest_silent(self) -> bool:
        """Closes the connection that has been silent longest. Returns whether there was one."""
        open = cast("set[BoundedProtocol]", self.connections)
        silent = [one for one in open if one.silent_since is not None]
        if not silent:
            return False
        longest = min(silent, key=lambda one: one.silent_since or 0)
        open.discard(longest)
        longest.transport.abort()
        return True

    # ------------------------------------------------------------------------------------------------ the client sends

    def data_received(self, data: bytes) -> None:
        while data and not self.transport.is_closing():
            size = PIECE if self.conn.their_state is h11.IDLE else len(data)
            super().data_received(data[:size])
            data = data[size:]
            self._watch_reading()

    def on_response_complete(self) -> None:
        self.silent_since = self.loop.time()
        super().on_response_complete()  # may begin the next request, if the client sent it already
        if self.conn.their_state is not h11.IDLE or self.conn.trailing_data[0]:
            self._watch_reading()

    def _watch_reading(self) -> None:
        """Starts or stops the clock of what the client has to send next."""
        state = self.conn.their_state
        seconds = {h11.IDLE: self.header_seconds, h11.SEND_BODY: self.body_seconds}.get(state)
        if self._reading is not None and self._reading[0] is not state:
            self._end_reading()
        if seconds is None and self.cycle is not None and not self.cycle.response_complete:
            self.silent_since = None
        elif seconds is not None and self._reading is None and not self.transport.is_closing():
            self.silent_since = self.loop.time()
            self._reading = state, self.loop.call_later(seconds, self._late, state)

    def _late(self, state: object) -> None:
        self._reading = None
        if state is h11.IDLE and self.conn.trailing_data[0]:
            self._refuse(408, f"the headers were not complete after {self.header_seconds:g} s; send them at once")
        self.transport.abort() if state is h11.SEND_BODY else self.transport.close()

    def _end_reading(self) -> None:
        if self._reading is not None:
            self._reading[1].cancel()
            self._reading = None

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls for a request that it cannot parse."""
        if len(self.conn.trailing_data[0]) > self.max_header_bytes:
            self._refuse(431, f"the headers are more than {self.max_header_bytes} bytes; send less")
        else:
            self._refuse(400, "the request is not valid HTTP/1.1")

    def _refuse(self, status: int, message: str) -> None:
        """Answers with an error, if no answer has begun, and closes."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.write(error_bytes(status, message))
        self.transport.close()

    # ------------------------------------------------------------------------------------------------ the client reads

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._end_writing()

    def _watch_writing(self) -> None:
        left = self.transport.get_write_buffer_size()
        self._writing = self.loop.call_later(self.write_seconds, self._check_writing, left)

    def _check_writing(self, left: int) -> None:
        """Ends the connection if the client read too little since `left` bytes waited for it."""
        if left - self.transport.get_write_buffer_size() < self.WRITE_BYTES:
            self.transport.abort()
        else:
            self._watch_writing()

    def _end_writing(self) -> None:
        if self._writing is not None:
            self._writing.cancel()
            self._writing = None


def error_bytes(status: int, message: str) -> bytes:
    """A whole response with an error in OpenAI's shape."""
    body = ApiError(status, message).body
    head = f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\nconnection: close\r\n\r\n".encode() + body


def allow_open_files(count: int) -> int:
    """Lets this process have that many open files, or as many as it may. The default of many machines is 1024. Returns
    how many it may have now, at most `count`."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return count
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
