"""The page at /, which shows the tenants' traffic and sends a prompt to several of them, and what it asks this server.
Its Content-Security-Policy lets the browser ask this server alone, and run no script but page.js."""

from __future__ import annotations

import time
from functools import partial
from heapq import nsmallest
from pathlib import Path

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..serving.engine import Engine
from .api_keys import Access
from .models import Models
from .traffic import OTHER, Counts, Traffic

#: Tenants that the page shows at once.
ROWS = 50
STATIC = Path(__file__).parent / "static"
TYPES = {"page.html": "text/html", "page.css": "text/css", "page.js": "text/javascript"}
HEADERS = {
    "content-security-policy": "default-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-cache",
}


def routes(engine: Engine, models: Models, traffic: Traffic) -> list[Route]:
    """The page, and what it asks every two seconds."""
    files = {name: Response((STATIC / name).read_bytes(), 200, HEADERS, kind) for name, kind in TYPES.items()}
    at = {"/" if name == "page.html" else f"/{name}": file for name, file in files.items()}
    state = Route("/page/state", partial(show_state, engine, models, traffic))
    return [*(Route(path, file, methods=["GET"]) for path, file in at.items()), state]


def show_state(engine: Engine, models: Models, traffic: Traffic, request: Request) -> Response:
    """The state for a client's key: `?search=` narrows the tenants down. Runs in a thread of Starlette's."""
    search = request.query_params.get("search", "")[:200]
    return JSONResponse(state(engine, models, traffic, request.state.access, search))


def state(engine: Engine, models: Models, traffic: Traffic, access: Access, search: str = "") -> dict:
    """What the page shows: the base model, the most active tenants that the client may use, and the engine's totals.

    A key that is limited to some tenants gets no totals and no counts of the base model: they tell of the others.
    """
    running, waiting, counts = engine.running, engine.waiting, traffic.by_tenant()
    visible = [name for name in models.visible(access) if search.lower() in name.lower()]

    def row(name: str | None) -> dict:
        if name is None and access.tenants is not None:
            return {"name": None} | dict.fromkeys(("running", "waiting", "requests", "prompt_tokens", "new_tokens"))
        known = counts.get(name, None if OTHER in counts else Counts())  # None: it may be among the others
        return {
            "name": name,
            "running": running.get(name, 0),
            "waiting": waiting.get(name, 0),
            "requests": known and known.requests.total(),
            "prompt_tokens": known and known.prompt_tokens,
            "new_tokens": known and known.new_tokens,
        }

    def activity(name: str) -> tuple:
        return -running.get(name, 0) - waiting.get(name, 0), -new_tokens(name), name

    def new_tokens(name: str) -> int:
        return counts[name].new_tokens if name in counts else 0

    most_active = nsmallest(ROWS, visible, key=activity)
    most_active.sort(key=lambda name: (-new_tokens(name), name))  # an order that seldom changes
    rows = [row(None), *map(row, most_active)]
    found = {"time": time.monotonic(), "base": models.base, "found": len(visible), "rows": rows, "engine": None}
    if access.tenants is None:
        everything, cache = traffic.total, engine.prefix_cache
        found["engine"] = {
            "running": sum(running.values()),
            "waiting": sum(waiting.values()),
            "slots": engine.slots,
            "kv_usage": engine.kv_usage,
            "prefix_queries": cache.queries,
            "prefix_hits": cache.hits,
            "requests": everything.requests.total(),
            "prompt_tokens": everything.prompt_tokens,
            "new_tokens": everything.new_tokens,
        }
    return found
