"""A server in a thread of this process, on a free port, over a tiny engine whose rounds a test can hold."""

import asyncio
import threading
import time
from contextlib import contextmanager
from copy import deepcopy
from functools import cache

from golden_models import backbone
from tiny_engine import bank_of, tenants_of
from tiny_run import tokenizer

from para_jax import Engine, serve
from para_jax.server.config import ServerConfig

#: Each turn is its words, and the answer's turn begins with w7, or `mood`. </s> ends it.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] + (' </s> ' if message['role'] == 'assistant' else ' ') }}"
    "{% endfor %}{% if add_generation_prompt %}{{ mood | default('w7') + ' ' }}{% endif %}"
)
SLOTS, LENGTH, QUEUE, QUEUE_PER_TENANT = 3, 40, 12, 8


@cache
def chat_tokenizer():
    made = deepcopy(tokenizer())
    made.chat_template = CHAT_TEMPLATE
    return made


@cache
def model_and_tenants():
    model = backbone("llama")
    return model, tenants_of(model)


def new_engine(**options):
    model, tenants = model_and_tenants()
    sizes = {"slots": SLOTS, "max_length": LENGTH, "prefill_chunk": 8, "block_size": 4, "max_logprobs": 3}
    sizes |= {"queue_limit": QUEUE, "queue_limit_per_tenant": QUEUE_PER_TENANT}
    return Engine(model, bank_of(model, tenants), chat_tokenizer(), **sizes | options)


class Running:
    """A server that runs."""

    def __init__(self, engine, url, stop, thread):
        self.engine, self.url, self.stop, self.thread = engine, url, stop, thread
        self._step, self._may_step = engine.step, threading.Event()
        self._may_step.set()
        self.rounds = 0
        """how many rounds are made although they are held"""
        engine.step = self.step

    def step(self):
        while not self._may_step.wait(0.002):
            if self.rounds:
                self.rounds -= 1
                break
        return self._step()

    @contextmanager
    def held(self):
        """No round is made inside but one that has begun, and as many as `rounds` says."""
        self._may_step.clear()
        try:
            yield
        finally:
            self._may_step.set()

    def idle(self):
        """Waits until no request is open."""
        eventually(lambda: self.engine.open == 0)


@contextmanager
def running(engine, *, sources=None, **options):
    """The engine's server. It is told to stop at the end, and its end is waited for."""
    stop, ready, urls, errors = threading.Event(), threading.Event(), [], []
    config = ServerConfig(port=0, **options)

    def run():
        try:
            serve(engine, config, sources=sources, stop=stop, on_ready=lambda url: (urls.append(url), ready.set()))
        except BaseException as error:
            errors.append(error)
            ready.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert ready.wait(300)
    if errors:
        raise errors[0]
    server = Running(engine, urls[0], stop, thread)
    try:
        yield server
    finally:
        server._may_step.set()
        stop.set()
        thread.join(60)
    assert not thread.is_alive() and not errors


def pass_time(seconds):
    """Lets time pass for the loop of asyncio that runs this."""
    loop = asyncio.get_running_loop()
    now = loop.time
    loop.time = lambda: now() + seconds


def eventually(holds, seconds=20.0):
    """Waits until a condition holds."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it never held"
        time.sleep(0.005)
