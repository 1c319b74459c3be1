"""A bucket on loopback: the emulator gcp-storage-emulator, with the preconditions of writes that it lacks.

`start()` runs it in this process; processes that are started here find it by `environment(port)`.
"""

import http.server
import io
import logging
import sys
import threading
import time
from http import HTTPStatus
from types import SimpleNamespace

BUCKET = "para-jax"


def start():
    """(server, port) of an emulator with an empty bucket."""
    from gcp_storage_emulator import server

    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    server.Router.handle = with_preconditions(server.Router.handle)
    read = server._read_data
    server._read_data = lambda handler, query: b"" if (data := read(handler, query)) is None else data  # empty objects
    server.server = SimpleNamespace(HTTPServer=Threads, BaseHTTPRequestHandler=http.server.BaseHTTPRequestHandler)
    running = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    running.start()
    until = time.monotonic() + 60
    while running._api._httpd is None:
        assert time.monotonic() < until, "the emulator did not start"
        time.sleep(0.001)
    return running, running._api._httpd.server_address[1]


class Threads(http.server.ThreadingHTTPServer):
    """A thread a connection: the emulator's own server waits for a silent one, and all others wait for it."""

    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # of a client that was killed
            super().handle_error(request, client_address)


def environment(port: int) -> dict[str, str]:
    """What gcsfs and tensorstore read to find it."""
    place = f"http://127.0.0.1:{port}"
    return {
        "STORAGE_EMULATOR_HOST": place,
        "TENSORSTORE_GCS_HTTP_URL": place,
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks another service about the bucket, which is not emulated
        "NO_GCE_CHECK": "true",
    }


def with_preconditions(handle):
    """The service's ifGenerationMatch, for writes and deletes, and `generation` of reads. One request at a time, so
    that nothing comes between."""
    from gcp_storage_emulator import server

    alone, read_raw = threading.RLock(), server._read_raw_data
    server._read_raw_data = lambda handler: handler.body

    def handling(router, method):
        from gcp_storage_emulator.server import Request, Response

        request = Request(router._request_handler, method)
        if method == "GET" and request.query.get("alt") == ["media"]:
            tell_generation(router._request_handler, request)
        wanted = request.query.get("ifGenerationMatch", request.query.get("generation"))
        if wanted and generation(router._request_handler.storage, request) != wanted[0]:
            response = Response(router._request_handler)
            exact = "ifGenerationMatch" in request.query
            response.status = HTTPStatus.PRECONDITION_FAILED if exact else HTTPStatus.NOT_FOUND
            response.json({"error": {"code": response.status.value, "message": "generation"}})
            return response.close()
        return handle(router, method)

    def one_at_a_time(router, method):
        """Reads from the client and writes to it without the lock, so a silent client blocks no other."""
        handler = router._request_handler
        handler.body = read_raw(handler)
        client, handler.wfile = handler.wfile, io.BytesIO()
        try:
            with alone:
                handling(router, method)
        finally:
            answer, handler.wfile = handler.wfile.getvalue(), client
        client.write(answer)

    return one_at_a_time


def tell_generation(handler, request) -> None:
    """Adds x-goog-generation to the response of a read. tensorstore sends it back with its next write."""
    found = generation(handler.storage, request)

    def end_headers():
        del handler.end_headers
        if found != "0":
            handler.send_header("x-goog-generation", found)
        handler.end_headers()

    handler.end_headers = end_headers


def generation(storage, request) -> str:
    """Of the object that a request is about; "0" where none is."""
    from urllib.parse import unquote

    parts = request.path.split("/b/", 1)[1].split("/o", 1)
    name = request.query.get("name", [None])[0] or unquote(parts[1].lstrip("/").removesuffix("/compose"))
    try:
        return str(storage.get_file_obj(unquote(parts[0]), name)["generation"])
    except Exception:
        return "0"
