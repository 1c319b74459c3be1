"""An adapter that is being loaded delays no request but those that need one that is not held."""

import asyncio
import time
from contextlib import asynccontextmanager
from threading import Event
from types import SimpleNamespace

import httpx
import pytest
from running_server import chat_tokenizer, pass_time

from para_jax.server.app import create_app
from para_jax.server.models import Models
from para_jax.serving.request import Piece
from para_jax.serving.ticket import Times


class Bank:
    """Holds "held", and loads "cold" as soon as it may."""

    names = ("held", "cold")

    def __init__(self):
        self.loads, self.may_load = 0, Event()

    def __contains__(self, name):
        return name in self.names

    def holds(self, name):
        return name == "held"

    def entry(self, name):
        if not self.holds(name):
            self.loads += 1
            assert self.may_load.wait(20)
        return name


class Stream:
    """An answer of one token, which is there at once."""

    def __init__(self):
        self.prompt_ids, self.cached_tokens, self.times = [1], 0, Times(time.monotonic())
        self.ended = self.closed = False

    def take(self):
        pieces = [] if self.ended else [Piece(0, "w5", [5], "stop")]
        self.ended = True
        return pieces

    def close(self):
        self.closed = True


def stub_engine():
    """An engine without a model, which keeps its streams. `may_open` holds those that are being opened, and `opening`
    says that there is one."""
    may_open, opening, streams = Event(), Event(), []
    may_open.set()

    def open_stream(request, entry):
        opening.set()
        assert may_open.wait(20)
        streams.append(Stream())
        return streams[-1]

    limits = {"max_length": 40, "queue_limit": None, "queue_limit_per_tenant": None, "stop_ids": ()}
    calls = {"warm_up": lambda: None, "wait": lambda seconds: time.sleep(0.01), "open_stream": open_stream}
    return SimpleNamespace(
        tokenizer=chat_tokenizer(), may_open=may_open, opening=opening, streams=streams, **limits, **calls
    )


@asynccontextmanager
async def client_of(engine, bank):
    """A client with its server's EngineLoop as `loop`."""
    app = create_app(engine, models=Models(bank))
    async with app.router.lifespan_context(app), asyncio.timeout(20):
        while not app.state.loop.warm:
            await asyncio.sleep(0.001)
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            client.loop = app.state.loop
            yield client


def ask(client, model, **fields):
    return client.post("/v1/completions", json={"model": model, "prompt": "w1", "max_tokens": 1} | fields)


def test_requests_that_need_nothing_loaded_do_not_wait_for_those_that_do():
    async def run():
        engine, bank = stub_engine(), Bank()
        async with client_of(engine, bank) as client:
            cold = [asyncio.create_task(ask(client, "cold")) for _ in range(40)]
            while not bank.loads:
                await asyncio.sleep(0.001)
            for name in ("base", "held"):
                assert (await ask(client, name)).json()["choices"][0]["text"] == "w5"
            assert (await client.get("/v1/models/cold")).json()["id"] == "cold"
            assert (await ask(client, "cold", timeout=0.01)).status_code == 504
            assert bank.loads == 1 and not any(one.done() for one in cold)
            bank.may_load.set()
            assert [(await one).status_code for one in cold] == [200] * len(cold)
            assert all(stream.closed for stream in engine.streams)

    asyncio.run(run())


@pytest.mark.parametrize("name", ["held", "cold"])
def test_a_request_that_passes_its_own_deadline_while_it_is_opened_is_closed(name):
    async def run():
        engine, bank = stub_engine(), Bank()
        bank.may_load.set()
        engine.may_open.clear()
        async with client_of(engine, bank) as client:
            asked = asyncio.create_task(ask(client, name, timeout=5))
            while not engine.opening.is_set():
                await asyncio.sleep(0.001)
            pass_time(6)
            assert (await asked).status_code == 504
            assert not engine.streams
            engine.may_open.set()
            while not (engine.streams and engine.streams[0].closed):
                await asyncio.sleep(0.001)

    asyncio.run(run())


def test_a_request_that_is_opened_when_the_server_has_stopped_is_refused():
    async def run():
        engine = stub_engine()
        engine.may_open.clear()
        async with client_of(engine, Bank()) as client:
            asked = asyncio.create_task(ask(client, "held"))
            while not engine.opening.is_set():
                await asyncio.sleep(0.001)
            await client.loop.stop()
            engine.may_open.set()
            assert (await asked).json()["error"]["code"] == "shutting_down"
            assert all(stream.closed for stream in engine.streams)
            assert (await ask(client, "held")).json()["error"]["code"] == "shutting_down"

    asyncio.run(run())
