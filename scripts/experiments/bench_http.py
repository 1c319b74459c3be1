"""What the OpenAI protocol costs. The same work goes to an engine in this process and, from a
process of its own, over HTTP to a server with an engine of the same model."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
from http_client import Streamed, stream_all
from measure import main

from para_jax.backbone.load import load_backbone
from para_jax.bench.decode import METHODS, bank_of
from para_jax.bench.rounds import measurement, paired, single
from para_jax.bench.serve import LONGEST, Workload, ragged, serve
from para_jax.data.tokenizer import load_tokenizer
from para_jax.server.config import require_packages
from para_jax.serving.engine import Engine
from para_jax.serving.request import Request

CLIENTS, TENANTS = 64, 32
LIGHT = 16  # requests that come one after the other, for the time to the first token


def bench_http(backbone: str, *, rows: tuple[int, ...] = (8,), requests: int = 96, rounds: int = 3) -> dict:
    """Tokens per second of 64 streaming clients against those of the engine in process, and milliseconds to the first
    token of one client at a time. All tenants have PARA adapters of scope `response`.

    Args:
        rows: the engines' slots; one number.
    """
    slots = single(rows)
    require_packages("bench_http.py")
    model, tokenizer = load_backbone(backbone), load_tokenizer(backbone)
    bank = bank_of(model, replace(METHODS["PARA"], scope="response"), TENANTS)
    engines = [Engine(model, bank, tokenizer, slots=slots, max_length=LONGEST) for _ in range(2)]
    own, served = engines
    own.warm_up()
    work = ragged(requests, model.config.vocab_size)
    streamed: list[Streamed] = []
    found: list[dict[str, float]] = []
    first: list[dict[str, float]] = []
    with serving(served) as url, client() as send:
        bodies = bodies_of(work, bank.names)
        send(url, bodies[:slots], CLIENTS)  # both sides have run once
        in_process(own, work, slots)
        for round in range(rounds):
            answers = send(url, bodies, CLIENTS)
            streamed += answers
            found.append({
                "engine in process": in_process(own, work, requests),
                f"HTTP, {CLIENTS} clients": rate(answers),
            })  # fmt: skip
            first.append(first_tokens(own, send, url, work, bank.names, round))
    http = f"HTTP, {CLIENTS} clients"
    light = measurement("ms", first)
    light["difference"] = float(np.median([one["HTTP"] - one["engine in process"] for one in first]))
    return measurement("tokens/s", found) | {
        "ratios": {"HTTP / engine in process": paired(found, http, "engine in process")},
        "latencies_ms": {http: latencies(streamed)},
        "parts": {"first token, one request at a time": light},
        "slots": slots,
        "requests": requests,
    }


@contextmanager
def serving(engine: Engine) -> Iterator[str]:
    """A server on a free port of this machine, and its URL."""
    from para_jax.server.config import ServerConfig
    from para_jax.server.serve import serve as serve_http  # needs the extra [serve]

    stop, ready, urls = threading.Event(), threading.Event(), []

    def is_ready(url: str) -> None:
        urls.append(url)
        ready.set()

    config, notices = ServerConfig(port=0), dict(stop=stop, on_ready=is_ready)
    thread = threading.Thread(target=serve_http, args=(engine, config), kwargs=notices)
    thread.start()
    try:
        while not ready.wait(0.1):
            if not thread.is_alive():
                raise RuntimeError("the server did not start; see its message above")
        yield urls[0]
    finally:
        stop.set()
        thread.join()


@contextmanager
def client() -> Iterator:
    """A process that runs `stream_all`, so that it does not share this one's interpreter."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        yield lambda *arguments: pool.submit(stream_all, *arguments).result()


def bodies_of(work: Workload, names: Sequence[str]) -> list[dict]:
    """The requests for HTTP, each for the next tenant. They decode past end tokens, up to their lengths."""
    return [
        {"model": names[i % len(names)], "prompt": ids, "max_tokens": new, "ignore_eos": True, "temperature": 0}
        for i, (ids, new) in enumerate(zip(work.prompts, work.new_tokens, strict=True))
    ]


def in_process(engine: Engine, work: Workload, requests: int) -> float:
    """Tokens per second of the first requests, submitted at once."""
    return serve(engine, Workload(work.prompts[:requests], work.new_tokens[:requests])).tokens_per_second


def rate(answers: list[Streamed]) -> float:
    """Tokens per second of answers that were asked for together."""
    return sum(one.tokens for one in answers) / (max(one.ended for one in answers) - min(one.sent for one in answers))


def latencies(answers: list[Streamed]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    values = {"first token": [one.first_token for one in answers]}
    values["a token"] = [one.per_token for one in answers if one.tokens > 8]
    return {f"{name} p{q}": 1e3 * float(np.percentile(each, q)) for name, each in values.items() for q in (50, 90, 99)}


def first_tokens(engine: Engine, send, url: str, work: Workload, names: Sequence[str], round: int) -> dict[str, float]:
    """Milliseconds to the first token, the median of requests that come one after the other, with new prompts."""
    count = min(LIGHT, len(work.prompts))
    draw, own, http = np.random.default_rng(round + 1), [], []
    again = Workload([draw.permutation(ids).tolist() for ids in work.prompts[:count]], [8] * count)
    for ids, name, body in zip(again.prompts, names, bodies_of(again, names), strict=False):
        http += [one.first_token for one in send(url, [body], 1)]
        begun = time.perf_counter()
        stream = engine.open_stream(Request(tuple(ids), name, 8, ignore_eos=True, strip=False))
        next(piece for piece in stream if piece.text)
        own.append(time.perf_counter() - begun)
        stream.close()
    return {"engine in process": 1e3 * float(np.median(own)), "HTTP": 1e3 * float(np.median(http))}


if __name__ == "__main__":
    main(bench_http)
