"""serve: the application on a port of this machine, from warm-up to the end of the last answer."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import uvicorn

from ..config import BASE
from ..io.messages import say, warn
from ..serving.engine import Engine
from . import adapter_updates, page
from .address import bound, is_loopback, url_of
from .answering import Limits
from .api_keys import ApiKeys, read_keys, warn_of_missing
from .app import create_app
from .engine_loop import EngineLoop
from .metrics import Metrics
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
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    model_name: str = BASE,
    sources: dict[str, str] | None = None,
    api_keys: ApiKeys | str | Path | None = None,
    adapter_root: str | Path | None = None,
    allow_hub: bool = False,
    limits: Limits | None = None,
    drain_seconds: float = 30,
    stop: threading.Event | None = None,
    on_ready: Callable[[str], None] | None = None,
    taken: socket.socket | None = None,
) -> None:
    """Serves an engine's models over HTTP, with OpenAI's API, until it is stopped. Nothing else may drive the engine
    meanwhile.

    SIGTERM, Ctrl-C or `stop` end it: it takes no more requests, finishes those that are open, and returns. A second
    signal, or one before it is ready, ends the process at once. Outside the main thread, only `stop` does.

    Args:
        port: 0: a free one.
        model_name: the base model's name; "base" works too.
        sources: the folder or hub id of each tenant, as /v1/models shows them.
        api_keys: the keys, or their file. None: every client may use everything.
        adapter_root: the folder from which clients may load adapters while the server runs. None: they may not.
        allow_hub: whether they may load them from the hub too.
        limits: of each request, such as its bytes and seconds.
        drain_seconds: what open requests may take when it stops.
        stop: set it from any thread to stop the server.
        on_ready: called with the URL when requests are taken.
        taken: a socket that is bound, in place of host and port.

    Raises ValueError in a thread that runs an event loop, for an address that is in use, and for wrong keys and
    folders, and what warming up the engine raised.
    """
    with suppress(RuntimeError):  # there is none
        asyncio.get_running_loop()
        raise ValueError(
            "serve: this thread runs an event loop, as a notebook does; start it in a thread: "
            "threading.Thread(target=serve, args=(engine,), kwargs={'stop': stop}, daemon=True).start(), where stop is "
            "a threading.Event that ends it"
        )
    stop = stop or threading.Event()
    models = Models(engine.bank, model_name, sources)
    api_keys = read_keys(api_keys) if isinstance(api_keys, (str, Path)) else api_keys
    routes = [] if adapter_root is None else adapter_updates.routes(models, adapter_root, allow_hub=allow_hub)
    if api_keys and adapter_root is None:
        warn_of_missing(api_keys, models.all_names)
    own = taken or bound(host, port)
    if not api_keys and not is_loopback(own):
        warn("the server has no API keys, and other machines can reach it; give --api-key-file, or a loopback --host")
    metrics = Metrics(engine, models)
    routes += page.routes(engine, models, metrics.traffic)
    local = not api_keys and is_loopback(own)
    app = create_app(engine, models=models, keys=api_keys, limits=limits, metrics=metrics, routes=routes, local=local)
    loop: EngineLoop = app.state.loop
    config = uvicorn.Config(
        app,
        http="httptools",  # h11 needs a second for a body in a million pieces, and serves no one else meanwhile
        limit_concurrency=most_connections(engine),
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        ws="none",
        lifespan="on",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=LAST_BYTES_SECONDS,
    )
    with own, signals(stop, lambda: loop.warm), asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
        runner.run(run(Server(config), own, loop, stop, drain_seconds, on_ready or (lambda url: None)))
    if loop.fatal is not None:
        raise loop.fatal


def most_connections(engine: Engine) -> int:
    """The connections above which uvicorn answers 503."""
    return engine.slots + (LONG_QUEUE if engine.queue_limit is None else engine.queue_limit) + SPARE_CONNECTIONS


class Server(uvicorn.Server):
    """uvicorn's server, which leaves signals to us."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def run(
    server: Server,
    own: socket.socket,
    loop: EngineLoop,
    stop: threading.Event,
    drain_seconds: float,
    on_ready: Callable[[str], None],
) -> None:
    """Runs the server, and ends it once `stop` is set and the open requests have ended."""
    serving = asyncio.create_task(server.serve(sockets=[own]))
    told = False
    while not (stop.is_set() or serving.done() or loop.fatal):
        await asyncio.sleep(LOOK_SECONDS)
        if loop.warm and server.started and not told:
            told = True
            on_ready(url_of(own))
    if not serving.done():
        left = f"; {loop.open_answers} open requests have {drain_seconds:g} s to end" if loop.open_answers else ""
        say(f"the server stops{left}")
        await loop.drain(drain_seconds)
        server.should_exit = True
    try:
        await serving
    finally:
        await loop.stop()  # its lifespan has done so, unless the server did not start


@contextmanager
def signals(stop: threading.Event, ready: Callable[[], bool]) -> Iterator[None]:
    """Lets SIGTERM and Ctrl-C set `stop`. A second one, or one before the server is ready, ends the process as if no
    one had handled it. Does nothing outside the main thread, where Python allows no handlers."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number, frame):
        if stop.is_set() or not ready():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
