"""create_app: the routes of the server, as a Starlette application. It drives the engine while it runs."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from .. import __version__
from ..data.examples import turn_stop_ids
from ..serving.engine import Engine
from .answering import Answering, Limits
from .api_keys import ApiKeys, require_unlimited
from .engine_loop import EngineLoop
from .errors import ApiError
from .gate import Gate
from .metrics import Metrics
from .models import Models
from .protocol import read_chat, read_completion
from .responses import CHAT, TEXT

#: Threads that parse bodies and turn prompts into tokens. Chats have as many of their own: their template may take
#: seconds, and renders one at a time.
THREADS = 4


def create_app(
    engine: Engine,
    *,
    models: Models,
    keys: ApiKeys | None = None,
    limits: Limits | None = None,
    metrics: Metrics | None = None,
    routes: Sequence[BaseRoute] = (),
    local: bool = False,
) -> Starlette:
    """The application. Its lifespan starts the thread that warms the engine up and drives it.

    Args:
        metrics: what /metrics shows.
        routes: further ones. In their endpoints, `request.state.access` says what the client may use.
        local: whether only requests to a name of this machine are taken.

    `app.state.loop` is its EngineLoop.
    """
    keys, limits = keys or ApiKeys([]), limits or Limits()
    metrics = metrics or Metrics(engine, models)
    loop = EngineLoop(engine, metrics.count_engine_failure, limits.timeout)
    chats, texts = (ThreadPoolExecutor(THREADS, f"para-jax-{name}") for name in ("chats", "server"))
    loading = ThreadPoolExecutor(1, "para-jax-loading")
    given = (loop, models, limits, metrics, {}, loading)

    @asynccontextmanager
    async def lifespan(app):
        loop.start()
        chats.submit(render_a_chat, engine.tokenizer)
        yield
        await loop.stop()
        for pool in (chats, texts, loading):
            pool.shutdown(wait=False, cancel_futures=True)

    own = [
        Route("/v1/chat/completions", Answering(read_chat, CHAT, *given, chats), methods=["POST"]),
        Route("/v1/completions", Answering(read_completion, TEXT, *given, texts), methods=["POST"]),
        Route("/v1/models", partial(list_models, models)),
        Route("/v1/models/{name:path}", partial(show_model, models)),
        Route("/health", partial(health, loop)),
        Route("/ready", partial(ready, loop)),
        Route("/version", version),
        Route("/metrics", partial(show_metrics, metrics)),
    ]
    app = Starlette(
        routes=[*own, *routes],
        middleware=[Middleware(Gate, keys=keys, metrics=metrics, local=local)],
        exception_handlers={HTTPException: http_error},  # pyright: ignore[reportArgumentType]
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.loop = loop
    return app


def render_a_chat(tokenizer) -> None:
    """Starts the process that renders chats, which takes seconds, so that the first chat need not wait for it."""
    if getattr(tokenizer, "chat_template", None) is not None:
        with suppress(ValueError, OSError):  # a chat will have this error
            turn_stop_ids(tokenizer, [{"role": "user", "content": "a"}])


# Those without `async` run in threads of Starlette's, because they take long where there are many tenants.


def list_models(models: Models, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": models.listed(request.state.access)})


def show_model(models: Models, request: Request) -> Response:
    return JSONResponse(models.card(models.tenant(request.path_params["name"], request.state.access)))


async def health(loop: EngineLoop, request: Request) -> Response:
    """Whether the engine works: 503 after several rounds that failed, and in a round that does not end."""
    require_healthy(loop)
    return JSONResponse({"status": "ok"})


async def ready(loop: EngineLoop, request: Request) -> Response:
    """Whether requests are taken: 503 before the engine is warm, and while the server stops."""
    loop.require_ready()
    require_healthy(loop)
    return JSONResponse({"status": "ready"})


def require_healthy(loop: EngineLoop) -> None:
    if loop.hangs:
        raise ApiError(503, "a round of the engine does not end; its device may hang", code="engine_hangs")
    if not loop.healthy:
        raise ApiError(503, "the engine fails; see the log", code="engine_failed")


async def version(request: Request) -> Response:
    return JSONResponse({"version": __version__})


def show_metrics(metrics: Metrics, request: Request) -> Response:
    """Runs in a thread of Starlette's: with a thousand tenants it takes 10 ms."""
    require_unlimited(request.state.access)
    body, content_type = metrics.render()
    return Response(body, media_type=None, headers={"content-type": content_type})


async def http_error(request: Request, error: HTTPException) -> Response:
    """Starlette's own errors, such as 404 for an unknown path, in OpenAI's shape."""
    headers = error.headers or {}
    message = {
        404: "there is nothing at this path; models are at /v1/models, /v1/completions and /v1/chat/completions",
        405: f"this path takes another method: {headers.get('Allow', 'see the documentation')}",
    }
    given = ApiError(error.status_code, message.get(error.status_code, str(error.detail)))
    return Response(given.body, error.status_code, {**headers, "content-type": "application/json"})
