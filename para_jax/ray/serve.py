"""serve_app: the server of ../server as an application of Ray Serve, with an engine of its own in each replica.

Ray's proxies take the connections and choose a replica for each request. The replica answers with the same Starlette
application as `para-jax serve`.
"""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..server.answering import Limits
from ..server.models import BASE

#: What chooses a replica by the header x-session-id.
STICKY = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"
#: Slots and tokens per row of an engine, as of `para-jax serve`.
SLOTS, LENGTH = 8, 1024
#: Requests that wait in each of Ray's proxies, and samples that wait in each engine, at most.
QUEUE = 1024


class Served(NamedTuple):
    """What each replica loads and serves."""

    backbone: str
    adapters: dict[str, str]
    load: dict[str, Any]
    """arguments of load_backbone"""
    engine: dict[str, Any]
    """arguments of Engine"""
    model_name: str
    api_key_file: str | None
    any_host: bool
    limits: Limits
    allow_cpu: bool


def serve_app(
    backbone: str | Path,
    adapters: Mapping[str, str | Path] | None = None,
    *,
    replicas: int = 1,
    autoscaling: Mapping[str, Any] | None = None,
    resources: Mapping[str, Any] | None = None,
    sticky: bool = False,
    load: Mapping[str, Any] | None = None,
    engine: Mapping[str, Any] | None = None,
    model_name: str = BASE,
    api_key_file: str | Path | None = None,
    any_host: bool = False,
    limits: Limits | None = None,
    drain_seconds: float = 30,
    allow_cpu: bool = False,
    **deployment: Any,
):
    """A bound application of Ray Serve, for `ray.serve.run`, at the route prefix "/".

    Args:
        backbone: a folder, a hub id or a .gguf file. Each replica loads it, so folders must be on every host, or in a
            bucket.
        adapters: the tenants: {name: folder or hub id}.
        replicas: how many engines.
        autoscaling: fields of ray.serve.config.AutoscalingConfig, in place of `replicas`. target_ongoing_requests is
            the number of slots if it is left out.
        resources: what Ray reserves for a replica: num_cpus, num_gpus, resources={"TPU": 4} (ray_actor_options).
        sticky: requests with the same header x-session-id go to the same replica, and find its prefix cache. The others
            go to one with few open requests, as all do by default.
        load: options of `load_backbone`: dtype, quantize, attention.
        engine: options of `Engine`: slots (default 8), max_length (default 1024), prefix_cache_bytes and so on.
        api_key_file: the keys, in a file on every host. None: every client may use everything.
        any_host: without keys, take requests whose Host is not this machine's too. Everyone who reaches Ray's proxies
            may then use every tenant.
        drain_seconds: what open requests may take when a replica is stopped.
        allow_cpu: run on the CPU although the machine has an accelerator.
        deployment: further options of `ray.serve.deployment`, such as name or health_check_period_s.

    Raises ValueError for options that do not exist, and for wrong numbers and names.
    """
    from ..backbone.load import load_backbone
    from ..serving.engine import Engine

    options = {"slots": SLOTS, "max_length": LENGTH, "queue_limit": QUEUE, "max_logprobs": 20, **(engine or {})}
    check_options("engine", options, Engine, ("model", "bank", "tokenizer"))
    check_options("load", load or {}, load_backbone, ("source", "mesh", "layout"))
    sources = {name: str(source) for name, source in (adapters or {}).items()}
    check_numbers(replicas=replicas, slots=options["slots"], drain_seconds=drain_seconds)
    if taken := {model_name, BASE} & set(sources):
        raise ValueError(f"adapters: {taken.pop()!r} is the base model's name; give the tenant another")
    keys = None if api_key_file is None else str(api_key_file)
    limits = limits or Limits()
    served = Served(str(backbone), sources, dict(load or {}), options, model_name, keys, any_host, limits, allow_cpu)
    how: dict[str, Any] = {
        "name": "para-jax",
        "max_ongoing_requests": 2 * options["slots"],  # the next ones are there when a slot is free
        "max_queued_requests": QUEUE,
        "graceful_shutdown_timeout_s": drain_seconds,
        "ray_actor_options": dict(resources or {}),
    }
    if autoscaling is None:
        how["num_replicas"] = replicas
    else:
        how["autoscaling_config"] = {"target_ongoing_requests": options["slots"], **autoscaling}
    if sticky:
        how["request_router_config"] = {"request_router_class": STICKY}
    serve = imported_serve()
    return serve.deployment(serve.ingress()(Replica)).options(**how | deployment).bind(served)


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
            raise RuntimeError(f"the engine fails: {self.loop.fatal or 'see the log'}")


def built_app(served: Served):
    """The Starlette application around an engine with everything loaded."""
    from .. import devices
    from ..backbone.load import load_backbone
    from ..config import RuntimeSection
    from ..data.tokenizer import load_tokenizer
    from ..messages import log_to_stderr
    from ..server.api_keys import read_keys
    from ..server.app import create_app
    from ..server.models import Models
    from ..serving.engine import Engine

    log_to_stderr()
    devices.start(RuntimeSection(allow_cpu=served.allow_cpu))
    keys = read_keys(served.api_key_file) if served.api_key_file else None
    model = load_backbone(served.backbone, **served.load)
    bank = bank_of(served.adapters, model)
    engine = Engine(model, bank, load_tokenizer(served.backbone), **served.engine)
    models = Models(bank, served.model_name, served.adapters)
    local = keys is None and not served.any_host
    return create_app(engine, models=models, keys=keys, limits=served.limits, local=local)


def bank_of(sources: dict[str, str], model):
    """The bank of the tenants, loaded one by one; None for the base model alone."""
    from ..adapters.bank import AdapterBank
    from ..adapters.files import load_adapter
    from ..adapters.preview import previews

    if not sources:
        return None
    found = previews(sources.values(), model.config)
    bank = AdapterBank.fitting([one.config for one in found], model.config, capacity=len(found))
    for name, one in zip(sources, found, strict=True):
        bank.add(name, load_adapter(one.place, model.config, model=model))
    return bank


def check_options(what: str, given: Mapping[str, Any], function, own: tuple[str, ...]) -> None:
    """Raises ValueError for an option that a function lacks, or that is not the caller's to give."""
    known = [name for name in inspect.signature(function).parameters if name not in own]
    for name in given:
        if name not in known:
            raise ValueError(f"{what} has no option {name!r}; give some of {', '.join(known)}")


def check_numbers(**numbers: float) -> None:
    for name, value in numbers.items():
        least = 0 if name == "drain_seconds" else 1
        if not least <= value < 1e9:
            raise ValueError(f"{name} is {value}; give a number of at least {least}")


def imported_serve():
    try:
        from ray import serve
    except ImportError as error:
        raise ImportError(f"serve_app: {error.name} is not installed: pip install 'para_jax[ray]'") from None
    return serve
