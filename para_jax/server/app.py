"""create_app: the routes of the server, as a Starlette application. It drives the engine while it runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .. import __version__
from ..serving.engine import Engine
from . import adapter_updates, page
from .answering import Answering
from .api_keys import ApiKeys, require_unlimited
from .config import ServerConfig
from .engine_loop import EngineLoop
from .errors import ApiError
from .gate import Gate
from .metrics import Metrics
from .models import Models
from .protocol import ChatBody, CompletionBody
from .responses import CHAT, TEXT


def create_app(
    engine: Engine,
    *,
    models: Models,
    config: ServerConfig | None = None,
    keys: ApiKeys | None = None,
    local: bool = False,
) -> Starlette:
    """The application. Its lifespan starts the thread that warms the engine up and drives it.

    Args:
        local: whether only requests to a name of this machine are taken.

    `app.state.loop` is its EngineLoop.
    """
    keys, config = keys or ApiKeys([]), config or ServerConfig()
    metrics = Metrics(engine, models)
    loop = EngineLoop(engine, metrics.engine_failures.inc, config.timeout)
    loading = ThreadPoolExecutor(1, "para-jax-loading")
    shared = (loop, models, config, metrics, {}, loading)

    @asynccontextmanager
    async def lifespan(app):
        loop.start()
        yield
        await loop.stop()
        loading.shutdown(wait=False, cancel_futures=True)

    routes = [
        Route("/v1/chat/completions", Answering(ChatBody, CHAT, *shared), methods=["POST"]),
        Route("/v1/completions", Answering(CompletionBody, TEXT, *shared), methods=["POST"]),
        Route("/v1/models", partial(list_models, models)),
        Route("/v1/models/{name:path}", partial(show_model, models)),
        Route("/health", partial(health, loop)),
        Route("/ready", partial(ready, loop)),
        Route("/version", version),
        Route("/metrics", partial(show_metrics, metrics)),
        *page.routes(engine, models, metrics.traffic),
    ]
    if config.adapter_root:
        routes += adapter_updates.routes(models, config.adapter_root, allow_hub=config.allow_hub)
    app = Starlette(
        routes=routes,
        middleware=[Middleware(Gate, keys=keys, metrics=metrics, local=local)],
        exception_handlers={HTTPException: http_error},  # pyright: ignore[reportArgumentType]
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.loop = loop
    return app


# Those without `async` run in threads of Starlette's, because they take long where there are many tenants.


def list_models(models: Models, request: Request) -> Response:
    return JSONResponse({"object": "list", "data": models.listed(request.state.access)})


def show_model(models: Models, request: Request) -> Response:
    return JSONResponse(models.card(models.tenant(request.path_params["name"], request.state.access)))


async def health(loop: EngineLoop, request: Request) -> Response:
    """Whether the engine works: 503 once it has failed, and in a round that does not end."""
    if loop.hangs:
        raise ApiError(503, "a round of the engine does not end; its device may hang", code="engine_hangs")
    if not loop.healthy:
        raise ApiError(503, "the engine fails; see the log", code="engine_failed")
    return JSONResponse({"status": "ok"})


async def ready(loop: EngineLoop, request: Request) -> Response:
    """Whether requests are taken: 503 also before the engine is warm."""
    loop.require_ready()
    return await health(loop, request)


async def version(request: Request) -> Response:
    return JSONResponse({"version": __version__})


def show_metrics(metrics: Metrics, request: Request) -> Response:
    require_unlimited(request.state.access)
    body, content_type = metrics.render()
    return Response(body, media_type=None, headers={"content-type": content_type})


async def http_error(request: Request, error: HTTPException) -> Response:
    """Starlette's own errors, such as 404 for an unknown path, in OpenAI's shape."""
    body = ApiError(error.status_code, f"{error.detail}: {request.method} {request.url.path}").body
    return Response(body, error.status_code, {**(error.headers or {}), "content-type": "application/json"})
