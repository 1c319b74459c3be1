"""serve_app: the server of ../server as an application of Ray Serve, with an engine of its own in each replica.

Ray's proxies take the connections and choose a replica for each request. The replica answers with the same Starlette
application as `para-jax serve`.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ..cli import serve as command
from ..config import BASE
from ..io.checks import expanded
from ..server.config import ServerConfig
from .jobs import command_options

#: What chooses a replica by the header x-session-id.
STICKY = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


class Served(NamedTuple):
    """What each replica loads and serves."""

    options: Namespace
    """those of `para-jax serve`"""
    sources: dict[str, str]
    """the tenants: {name: folder or hub id}"""
    config: ServerConfig
    any_host: bool


def serve_app(
    *,
    replicas: int = 1,
    autoscaling: Mapping[str, Any] | None = None,
    num_cpus: float = 1,
    num_gpus: float = 0,
    resources: Mapping[str, float] | None = None,
    sticky: bool = False,
    any_host: bool = False,
    deployment: Mapping[str, Any] | None = None,
    **options: Any,
):
    """A bound application of Ray Serve, for `ray.serve.run`, at the route prefix "/".

    Args:
        replicas: how many engines.
        autoscaling: fields of ray.serve.config.AutoscalingConfig, in place of `replicas`. target_ongoing_requests is
            the number of slots if it is left out.
        num_cpus, num_gpus, resources: what Ray reserves for a replica, such as resources={"TPU": 4}.
        sticky: requests with the same header x-session-id go to the same replica, and find its prefix cache. Those
            without it go to any. By default, each goes to one with few open requests. To change it, run the
            application under another name: Ray's proxies keep the router of a name.
        any_host: without API keys, also answer requests that name another host than localhost. Everyone who reaches
            Ray's proxies may then use every tenant.
        deployment: further options of `ray.serve.deployment`, such as name or health_check_period_s.
        options: those of `para-jax serve`, by their names: backbone="smollm2-135m", adapters=["acme=runs/a/adapter"],
            slots=32. Paths must mean the same on every host. drain_seconds is what open requests may take when a
            replica is stopped.

    Raises ValueError for wrong options, and for a backbone or adapters that are not there.
    """
    served = served_by(options, any_host)
    slots = served.options.slots
    how: dict[str, Any] = {
        "name": "para-jax",
        "max_ongoing_requests": 2 * slots,  # the next ones are there when a slot is free
        "max_queued_requests": served.options.queue_limit,
        "graceful_shutdown_timeout_s": served.options.drain_seconds,
        "ray_actor_options": {"num_cpus": num_cpus, "num_gpus": num_gpus, "resources": dict(resources or {})},
    }
    if autoscaling is None:
        how["num_replicas"] = replicas
    else:
        how["autoscaling_config"] = {"target_ongoing_requests": slots, **autoscaling}
    if sticky:
        how["request_router_config"] = {"request_router_class": STICKY}
    try:
        from ray import serve
    except ImportError as error:
        raise ImportError(f"serve_app: {error.name} is not installed: pip install 'para_jax[ray]'") from None
    return serve.deployment(serve.ingress()(Replica)).options(**how | dict(deployment or {})).bind(served)


def served_by(options: Mapping[str, Any], any_host: bool) -> Served:
    """What replicas serve with these options. Paths become absolute, because replicas work in another folder."""
    given = command_options("serve", options)
    given.backbone = given.backbone and str(given.backbone)
    sources, config = command.checked(given)
    given.backbone = absolute(given.backbone)
    config = replace(config, api_key_file=config.api_key_file and absolute(config.api_key_file))
    return Served(given, {name: absolute(source) for name, source in sources.items()}, config, any_host)


def absolute(source: str) -> str:
    """A path of this host as an absolute one; a hub id and a bucket as they are."""
    path = expanded(source)
    return str(path.resolve()) if isinstance(path, Path) and path.exists() else source


class Replica:
    """An engine, and our Starlette application around it. Ray calls the methods."""

    def __init__(self, served: Served):
        self.served = served

    async def __serve_build_asgi_app__(self):
        """The application, which Ray starts then. Its lifespan starts the engine's thread."""
        app = await asyncio.to_thread(built_app, self.served)
        self.loop = app.state.loop
        return app

    async def check_health(self) -> None:
        """Raises for an engine that fails, and Ray replaces the replica. The first call waits for the compilation,
        so that no request comes before."""
        while not (self.loop.warm or self.loop.fatal):
            await asyncio.sleep(0.05)
        if not self.loop.healthy:
            raise RuntimeError(f"the engine fails or hangs: {self.loop.fatal or 'see the log'}")


def built_app(served: Served):
    """The Starlette application around an engine with everything loaded."""
    from ..io.messages import log_to_stderr
    from ..server.api_keys import read_keys
    from ..server.app import create_app
    from ..server.models import Models

    log_to_stderr()
    config = served.config
    keys = read_keys(config.api_key_file) if config.api_key_file else None
    engine = command.engine_of(served.options, served.sources)
    models = Models(engine.bank, config.served_model_name or BASE, served.sources)
    return create_app(engine, models=models, keys=keys, config=config, local=keys is None and not served.any_host)
