"""serve: the application on a port of this machine, from warm-up to the end of the last answer."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Mapping

import uvicorn

from ..config import BASE
from ..io.messages import say, warn
from ..serving.engine import Engine
from .address import bound, is_loopback, url_of
from .api_keys import read_keys
from .app import create_app
from .config import ServerConfig
from .engine_loop import EngineLoop, shutting_down
from .models import Models

#: Seconds between two looks at whether the server should stop.
LOOK_SECONDS = 0.05
#: Seconds in which clients must have taken the last bytes of answers that have ended.
LAST_BYTES_SECONDS = 5
#: Seconds that a connection without a request stays open. Proxies reuse theirs for up to 600 (Google's load balancer),
#: and an end that closes first makes the other one lose a request.
KEEP_ALIVE_SECONDS = 620
#: Open connections in addition to those that fill the slots and the queue: probes, and those that a proxy keeps ready.
SPARE_CONNECTIONS = 384
#: The length of a queue without a limit, as far as connections are concerned.
LONG_QUEUE = 1024


def serve(
    engine: Engine,
    config: ServerConfig | None = None,
    *,
    sources: Mapping[str, str] | None = None,
    stop: threading.Event | None = None,
    on_ready: Callable[[str], None] | None = None,
    taken: socket.socket | None = None,
) -> None:
    """Serves an engine's models over HTTP, with OpenAI's API, until it is stopped. Nothing else may drive the engine
    meanwhile.

    SIGTERM, Ctrl-C or `stop` end it: it takes no more requests, finishes those that are open, and returns. A second
    signal, or one before it is ready, ends the process at once. Outside the main thread, only `stop` does.

    Args:
        sources: the folder or hub id of each tenant, as /v1/models shows them.
        stop: set it from any thread to stop the server.
        on_ready: called with the URL when requests are taken.
        taken: a socket that is bound, in place of the config's host and port.

    Raises ValueError for an address that is in use, and for wrong keys and folders, RuntimeError in a thread that runs
    an event loop, as a notebook does (call it in a thread of its own), and what warming up the engine raised.

    >>> import threading
    >>> from para_jax.server.config import ServerConfig
    >>> engine, stop = Engine(model, bank, tokenizer, slots=2, max_length=64), threading.Event()
    >>> serve(engine, ServerConfig(port=0), stop=stop, on_ready=lambda url: stop.set())
    """
    config = config or ServerConfig()
    keys = read_keys(config.api_key_file) if config.api_key_file else None
    models = Models(engine.bank, config.served_model_name or BASE, sources)
    own = taken or bound(config.host, config.port)  # before the engine warms up
    local = not keys and is_loopback(own)
    if not keys and not local:
        warn("the server has no API keys, and other machines can reach it; give --api-key-file, or a loopback --host")
    app = create_app(engine, models=models, keys=keys, config=config, local=local)
    loop: EngineLoop = app.state.loop
    waiting = LONG_QUEUE if engine.queue_limit is None else engine.queue_limit
    options = uvicorn.Config(
        app,
        http="httptools",  # h11 needs a second for a body in a million pieces, and serves no one else meanwhile
        limit_concurrency=engine.slots + waiting + SPARE_CONNECTIONS,  # above these, uvicorn answers 503
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        ws="none",
        lifespan="on",
        log_config=None,  # Gate writes the log
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(config.drain_seconds) + LAST_BYTES_SECONDS,
    )
    server = Server(options, loop)
    with own, asyncio.Runner(loop_factory=options.get_loop_factory()) as runner:
        runner.run(run(server, own, config.drain_seconds, stop or threading.Event(), on_ready or (lambda url: None)))
    if loop.fatal is not None:
        raise loop.fatal


class Server(uvicorn.Server):
    """uvicorn's server. A signal that has ended it is not raised again, as uvicorn does."""

    def __init__(self, options: uvicorn.Config, loop: EngineLoop):
        super().__init__(options)
        self.loop = loop

    def handle_exit(self, sig, frame) -> None:
        if self.should_exit or not self.loop.warm:  # as if no one had handled it
            signal.signal(sig, signal.SIG_DFL)
            signal.raise_signal(sig)
        self.should_exit = True


async def run(
    server: Server,
    own: socket.socket,
    drain_seconds: float,
    stop: threading.Event,
    on_ready: Callable[[str], None],
) -> None:
    """Runs the server. Once it should end, open requests have `drain_seconds`."""
    serving, loop, told, until = asyncio.create_task(server.serve(sockets=[own])), server.loop, False, 0.0
    while not serving.done():
        await asyncio.sleep(LOOK_SECONDS)
        if loop.warm and server.started and not told:
            told = True
            on_ready(url_of(own))
        server.should_exit |= stop.is_set() or loop.fatal is not None  # a failed engine ends the server too
        if server.should_exit and not until:
            say(f"the server stops; open requests have {drain_seconds:g} s to end")
            until = time.monotonic() + drain_seconds
        if until and time.monotonic() > until:
            loop.fail_all(shutting_down)  # uvicorn waits for their last bytes
    await serving
