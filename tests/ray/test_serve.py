"""serve_app: replicas on a Ray cluster answer as the engine alone does, also while one of them is killed."""

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count, product
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from local_ray import cluster
from quick_compiler import own_flags
from running_server import eventually, model_and_tenants, new_engine
from tiny_engine import prompt
from tiny_run import backbone_folder
from two_processes import address

import para_jax
from para_jax import save_adapter
from para_jax.ray.serve import Replica, built_app, serve_app, served_by
from para_jax.server.app import create_app
from para_jax.server.models import Models

ENGINE = {"slots": 3, "max_length": 120, "max_logprobs": 0}
TENANTS = ("A", "B", "C", "R")
APP, REPLICAS = f"tiny-{os.getpid()}", 3
#: Seconds in which a busy machine starts a replica.
LONG = 600
ROOT = Path(para_jax.__file__).parents[1]

#: The answers of one engine in a process of its own, which compiles for the replicas too: they share its cache.
ALONE = """
import json, sys
from pathlib import Path
from para_jax import AdapterBank, Engine, Request, load_adapter, load_backbone, load_tokenizer
folder, options, bodies = Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3])
model = load_backbone(folder / "backbone")
bank = AdapterBank(model.config, max_r=4, sites=("q_proj", "v_proj", "up_proj", "down_proj"))
for name in sys.argv[4:]:
    bank.add(name, load_adapter(folder / name, model.config, model=model))
engine = Engine(model, bank, load_tokenizer(folder / "backbone"), **options)
engine.warm_up()
for number, body in enumerate(bodies):
    tenant = None if body["model"] == "base" else body["model"]
    given = dict(temperature=body["temperature"], seed=body["seed"], ignore_eos=True, strip=False, id=number)
    engine.submit(Request(body["prompt"], tenant, body["max_tokens"], **given))
print(json.dumps({completion.id: completion.text for completion in engine.run()}))
"""


def body(number, **fields):
    """Greedy and drawn answers of all tenants; every second one is a stream."""
    drawn = {"temperature": number % 3 / 2, "seed": number, "max_tokens": 60, "ignore_eos": True}
    asked = {"model": (*TENANTS, "base")[number % 5], "prompt": prompt(number), "stream": number % 2 == 0}
    return asked | drawn | fields


BODIES = [body(number) for number in range(30)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    model, tenants = model_and_tenants()
    backbone_folder(folder / "backbone")
    for name in TENANTS:
        save_adapter(tenants[name], folder / name, model=model)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    command = [sys.executable, "-c", ALONE, folder, json.dumps(ENGINE), json.dumps(BODIES), *TENANTS]
    environment = os.environ | own_flags() | {"PYTHONPATH": str(ROOT)}
    found = subprocess.run([*map(str, command)], env=environment, stdout=subprocess.PIPE, check=True)
    texts = json.loads(found.stdout)
    assert len(set(texts.values())) > len(BODIES) * 0.9  # strong adapters: a wrong one would be seen
    return {int(number): text for number, text in texts.items()}


@pytest.fixture(scope="module")
def url(folder, expected):
    """Of the applications on a cluster of this machine, which ends with the module."""
    pytest.importorskip("ray.serve")
    from ray import serve

    host, port = address().split(":")
    with cluster(4):
        try:
            serve.start(http_options={"host": host, "port": int(port)})
            yield f"http://{host}:{port}"
        finally:
            serve.shutdown()


def application(folder, **options):
    adapters = [f"{name}={folder / name}" for name in TENANTS]
    given = {"replicas": REPLICAS, "allow_cpu": True, "deployment": {"health_check_period_s": 1}, **ENGINE}
    return serve_app(backbone=folder / "backbone", adapters=adapters, **given | options)


@pytest.fixture
def replicated(url, folder):
    """The URL of an application with three replicas."""
    from ray import serve

    if APP not in serve.status().applications:
        serve.run(application(folder), name=APP)
    return url


def running():
    """How many replicas Ray has."""
    from ray import serve

    states = serve.status().applications[APP].deployments["para-jax"].replica_states
    return {str(getattr(state, "value", state)): number for state, number in states.items()}


def pids():
    """The processes of the application's replicas."""
    found = set()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if f"ServeReplica:{APP}:" in file.read_text():
                found.add(int(file.parent.name))
        except OSError:  # it has ended meanwhile
            pass
    return found


class Asked(NamedTuple):
    number: int
    began: float
    ended: float
    text: str | None
    """of a complete answer"""
    error: object = None


def ask(url, number, **fields):
    """Sends a request and reads its answer."""
    began, sent = time.monotonic(), BODIES[number] | fields
    try:
        with httpx.stream("POST", f"{url}/v1/completions", json=sent, timeout=LONG) as response:
            read = streamed if sent["stream"] and response.status_code == 200 else whole
            text, error = read(response)
    except httpx.TransportError as broken:
        text, error = None, broken
    return Asked(number, began, time.monotonic(), text, error)


def whole(response):
    response.read()
    if response.status_code != 200:
        return None, (response.status_code, response.text)
    return response.json()["choices"][0]["text"], None


def streamed(response):
    """What comes after the last event is an error of the transport, or [DONE]."""
    text, done = "", False
    for line in response.iter_lines():
        if line == "data: [DONE]":
            done = True
        elif line:
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return None, event["error"]
            text += event["choices"][0]["text"]
    assert done, "a stream ended as if it were complete"
    return text, None


@contextmanager
def load(url, clients):
    """Clients that ask without a pause inside. Gives the list of what they asked, which is complete afterwards."""
    numbers, found, stop = count(), [], threading.Event()

    def client():
        while not stop.is_set():
            found.append(ask(url, next(numbers) % len(BODIES)))

    with ThreadPoolExecutor(clients) as pool:
        tasks = [pool.submit(client) for _ in range(clients)]
        try:
            yield found
        finally:
            stop.set()
        for one in tasks:
            one.result()


# --------------------------------------------------------------------------------------------------------- on a cluster


@pytest.mark.slow
def test_a_replica_that_is_killed_under_load_loses_only_what_it_was_answering(replicated, expected):
    before = pids()
    assert len(before) == REPLICAS
    with load(replicated, 10) as found:
        eventually(lambda: len(found) > 2 * len(BODIES), LONG)
        os.kill(min(before), signal.SIGKILL)
        killed = time.monotonic()
        enough = len(found) + 2 * len(BODIES)
        eventually(lambda: len(found) > enough, LONG)
    lost = [one for one in found if one.error is not None]
    print(f"{len(found)} requests, lost: {Counter(repr(one.error) for one in lost)}")
    assert lost and all(one.began <= killed <= one.ended for one in lost)
    assert all(one.text == expected[one.number] for one in found if one.error is None)

    eventually(lambda: running() == {"RUNNING": REPLICAS}, LONG)
    assert len(pids() - before) == 1
    with load(replicated, 10) as found:
        eventually(lambda: len(found) > 2 * len(BODIES), LONG)
    assert all(one.error is None and one.text == expected[one.number] for one in found)


@pytest.mark.slow
def test_an_update_under_load_loses_nothing(replicated, folder, expected):
    from ray import serve

    before = pids()
    with load(replicated, 3) as found:
        serve.run(application(folder, sticky=True), name=APP)
    assert not before & pids() and len(pids()) == REPLICAS
    assert all(one.error is None and one.text == expected[one.number] for one in found)


@pytest.mark.slow
def test_sticky_requests_find_their_prefix(url, folder):
    from ray import serve

    name = f"{APP}-sticky"  # a proxy keeps the router that it made for a name
    serve.delete(APP)
    serve.run(application(folder, replicas=2, sticky=True), name=name)

    def cold(first, sessions):
        """How many of 30 beginnings are not found when they come again at once. A busy replica may be passed over."""
        cached = []
        with httpx.Client(base_url=url, timeout=LONG) as client:
            for number, end in product(range(first, first + 30), (1, 2)):
                headers = {"x-session-id": str(number)} if sessions else {}
                sent = body(
                    0, model="base", prompt=f"{prompt(number, 40)} {prompt(end, 4)}", stream=False, max_tokens=1
                )
                answer = client.post("/v1/completions", json=sent, headers=headers).json()
                cached.append(answer["usage"]["prompt_tokens_details"]["cached_tokens"])
        return cached[1::2].count(0)

    try:
        assert 2 * cold(100, sessions=True) < cold(200, sessions=False)
    finally:
        serve.delete(name)


@pytest.mark.slow
def test_replicas_come_with_the_load_and_go_without_it(url, folder, expected):
    from ray import serve

    serve.delete(APP)
    scaling = {"min_replicas": 1, "max_replicas": 2, "upscale_delay_s": 1, "downscale_delay_s": 1}
    serve.run(application(folder, autoscaling=scaling), name=APP)
    assert len(pids()) == 1
    with load(url, 10) as found:
        eventually(lambda: running() == {"RUNNING": 2}, LONG)
    assert all(one.error is None and one.text == expected[one.number] for one in found)
    eventually(lambda: running() == {"RUNNING": 1}, LONG)


# ---------------------------------------------------------------------------------------------------- without a cluster


def test_ray_is_told_when_the_engine_fails():
    engine = new_engine(max_logprobs=0)
    engine.warm_up = lambda: None
    replica = Replica(None)
    app = create_app(engine, models=Models(engine.bank))
    replica.loop = app.state.loop

    async def run():
        first = asyncio.create_task(replica.check_health())
        await asyncio.sleep(0.1)
        assert not first.done()  # it waits until the engine is warm
        async with app.router.lifespan_context(app):
            await first
            await replica.check_health()
            replica.loop.fatal = MemoryError("no room")
            with pytest.raises(RuntimeError, match="no room"):
                await replica.check_health()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"slot": 3}, "para-jax serve has no option slot;"),
        ({"adapters": ["tiny=A"], "served_model_name": "tiny"}, "tiny is the base model's name"),
    ],
)
def test_a_mistake_is_refused_before_anything_is_started(given, said, folder, monkeypatch):
    monkeypatch.chdir(folder)
    with pytest.raises(ValueError, match=re.escape(said)):
        serve_app(**{"backbone": "./backbone"} | given)


def test_replicas_get_absolute_paths_and_the_names_of_the_command(folder, monkeypatch):
    """They work in another folder."""
    monkeypatch.chdir(folder)
    (folder / "keys.txt").write_text("sk\n")
    given = {"backbone": "./backbone", "adapters": ["A", "b=B", "C=user/name"], "api_key_file": "keys.txt"}
    served = served_by(given, any_host=False)
    assert served.sources == {"A": str(folder / "A"), "b": str(folder / "B"), "C": "user/name"}
    assert (served.options.backbone, served.config.served_model_name) == (str(folder / "backbone"), "backbone")
    assert served.config.api_key_file == str(folder / "keys.txt")


@pytest.mark.parametrize(("any_host", "status"), [(False, 403), (True, 200)])
def test_a_replica_without_keys_is_asked_by_the_name_of_this_machine_only(folder, any_host, status):
    app = built_app(served_by({"backbone": folder / "backbone", "allow_cpu": True, **ENGINE}, any_host))
    asked = httpx.ASGITransport(app=app)

    async def run():
        async with httpx.AsyncClient(transport=asked, base_url="http://evil.example") as client:
            return (await client.get("/v1/models")).status_code

    assert asyncio.run(run()) == status
