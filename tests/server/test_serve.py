"""The server starts before it is ready, ends when it is told to, and loses no answer that it has begun."""

import asyncio
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from quick_compiler import own_flags
from running_server import QUEUE, SLOTS, chat_tokenizer, eventually, model_and_tenants, new_engine, pass_time, running
from tiny_engine import prompt
from tiny_run import backbone_folder

import para_jax
from para_jax import Engine, Request, load_adapter, save_adapter, serve
from para_jax.adapters.loading_bank import bank_of
from para_jax.adapters.preview import previews
from para_jax.cli.serve import served
from para_jax.server import answering, engine_loop
from para_jax.server import serve as server_module
from para_jax.server.address import bound, is_loopback, url_of
from para_jax.server.app import create_app
from para_jax.server.config import ServerConfig
from para_jax.server.engine_loop import EngineLoop
from para_jax.server.models import Models

ROOT = Path(__file__).parents[2]
ANY_PORT = ServerConfig(port=0)
LONG = {"model": "base", "prompt": prompt(1), "max_tokens": 30, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def engine():
    """Its programs are compiled as they are used, because few are."""
    made = new_engine(max_logprobs=0)
    made.warm_up = lambda: None
    return made


def stream_in_thread(server, body):
    """Sends a request with a stream, and returns when the answer has begun: the thread, and the list that will have its
    text."""
    texts, begun = [], threading.Event()

    def run():
        whole = body | {"stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=whole, timeout=60) as response:
            begun.set()
            texts.append(response.read().decode())

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    assert begun.wait(60)
    return thread, texts


@contextmanager
def set_later(seconds=60):
    """An event that is set after a while, for a server that should have ended before."""
    event = threading.Event()
    timer = threading.Timer(seconds, event.set)
    timer.daemon = True
    timer.start()
    yield event
    timer.cancel()


# --------------------------------------------------------------------------------------------------- start and end


def test_the_server_is_there_before_it_is_ready(engine):
    warm_up, may_warm_up, stop, ready = engine.warm_up, threading.Event(), threading.Event(), threading.Event()
    engine.warm_up = lambda: (may_warm_up.wait(60), warm_up())
    with bound("127.0.0.1", 0) as taken:
        url = url_of(taken)
        options = {"taken": taken, "stop": stop, "on_ready": lambda url: ready.set()}
        thread = threading.Thread(target=lambda: serve(engine, **options), daemon=True)
        thread.start()
        eventually(lambda: answers(url))
        assert httpx.get(f"{url}/health").status_code == 200
        for response in (httpx.get(f"{url}/ready"), httpx.post(f"{url}/v1/completions", json=LONG)):
            assert response.status_code == 503 and int(response.headers["retry-after"]) > 0
        assert not ready.is_set()
        may_warm_up.set()
        assert ready.wait(60) and httpx.get(f"{url}/ready").status_code == 200
        stop.set()
        thread.join(60)
    assert not answers(url)


def answers(url):
    try:
        return httpx.get(f"{url}/version").status_code == 200
    except httpx.TransportError:
        return False


def test_open_requests_are_finished_and_new_ones_refused(engine):
    with running(engine) as server:
        expected = httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=60).json()["choices"][0]["text"]
        with server.held():
            thread, texts = stream_in_thread(server, LONG)
            server.stop.set()
            eventually(lambda: not answers(server.url))
        thread.join(60)
        server.thread.join(60)
        assert not server.thread.is_alive()
    lines = [line for line in texts[0].split("\n\n") if line.startswith("data: {")]
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines) == expected


def test_requests_that_take_too_long_end_with_an_error_when_the_server_stops(engine):
    with running(engine, drain_seconds=0.1) as server:
        with server.held():
            thread, texts = stream_in_thread(server, LONG)
            server.stop.set()
            thread.join(60)
    assert '"shutting_down"' in texts[0] and texts[0].endswith("data: [DONE]\n\n") and engine.open == 0


def test_a_round_that_does_not_end_is_noticed_and_does_not_keep_the_server_from_stopping(engine, monkeypatch, capfd):
    monkeypatch.setattr(engine_loop, "LONG_ROUND_SECONDS", 0.3)
    monkeypatch.setattr(engine_loop, "LAST_ROUND_SECONDS", 0.1)
    with running(engine, drain_seconds=0, timeout=0.2) as server:

        def statuses():
            return [httpx.get(f"{server.url}/{path}").status_code for path in ("health", "ready")]

        def hangs():
            asked = httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=60)
            return asked.status_code == 504 and statuses() == [503, 503]

        with server.held():
            eventually(hangs)
        eventually(lambda: statuses() == [200, 200])
        with server.held():
            eventually(hangs)
            server.stop.set()
            server.thread.join(20)
            assert not server.thread.is_alive()
    assert "has not ended" in capfd.readouterr().err


def test_a_long_compilation_does_not_look_like_a_device_that_hangs(engine):
    assert engine_loop.LONG_ROUND_SECONDS >= 900
    for timeout, after, hangs in [(10, 890, False), (10, 910, True), (2000, 1990, False), (2000, 2010, True)]:
        loop = EngineLoop(engine, timeout=timeout)
        assert loop.healthy
        loop._round_began = time.monotonic() - after
        assert loop.hangs == hangs != loop.healthy


def test_what_warming_up_raises_ends_the_server(engine):
    def fail():
        raise MemoryError("no room for the slots")

    engine.warm_up = fail
    before = signal.getsignal(signal.SIGTERM)
    with set_later() as stop, pytest.raises(MemoryError, match="no room"):
        serve(engine, ANY_PORT, stop=stop)
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_error_outside_the_rounds_ends_the_server_and_its_requests(engine, monkeypatch):
    deliver, found = EngineLoop._deliver, []

    def fail(loop, answers):
        if threading.current_thread() is loop._thread:
            raise ZeroDivisionError
        deliver(loop, answers)

    def ask(url):
        post = lambda: found.append(httpx.post(f"{url}/v1/completions", json=LONG, timeout=60))  # noqa: E731
        threading.Thread(target=post).start()

    monkeypatch.setattr(EngineLoop, "_deliver", fail)
    with set_later() as stop, pytest.raises(ZeroDivisionError):
        serve(engine, ANY_PORT, on_ready=ask, stop=stop)
    eventually(lambda: found)
    assert found[0].status_code == 500 and found[0].json()["error"]["code"] == "engine_failed"


def test_a_client_that_never_reads_is_given_up_at_its_deadline(engine):
    app, forever = create_app(engine, models=Models(engine.bank)), []

    async def run():
        body = json.dumps(LONG | {"stream": True, "timeout": 50}).encode()
        messages, never = [{"type": "http.request", "body": body, "more_body": False}], asyncio.Event()

        async def receive():
            return messages.pop() if messages else await never.wait()

        async def send(message):
            if message["type"] == "http.response.body":
                if not forever:
                    pass_time(60)
                forever.append(message)
                await never.wait()

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "raw_path": b"/v1/completions"}
        scope |= {"headers": headers, "query_string": b""}
        async with app.router.lifespan_context(app):
            async with asyncio.timeout(60):
                while not app.state.loop.warm:
                    await asyncio.sleep(0.01)
            await asyncio.wait_for(app(scope, receive, send), 100)
            assert forever and engine.open == 0

    asyncio.run(run())


# ----------------------------------------------------------------------------------------------------------- settings


def key_file(folder, *lines):
    file = folder / "keys"
    file.write_text("\n".join(lines))
    return str(file)


@pytest.mark.parametrize("keyed", [False, True])
def test_without_keys_a_server_of_this_machine_is_asked_by_its_own_names_only(engine, tmp_path, keyed):
    """A web page could have its name point at this machine, and browsers would let it read everything."""
    with running(engine, api_key_file=key_file(tmp_path, "sk") if keyed else None) as server:
        for host in ("localhost:1", "a.localhost", "127.0.0.2:80", "[::1]:8000", "LOCALHOST."):
            assert httpx.get(f"{server.url}/ready", headers={"host": host}).status_code == 200
        for host in (
            "evil.example:8000",
            "127.0.0.1.evil.example",
            "localhost.evil.example",
            "10.0.0.1",
            "[::1%25evil]",
            "",
        ):
            for path in ("/", "/ready", "/v1/models"):
                status = 403 if not keyed else 401 if path == "/v1/models" else 200
                assert httpx.get(server.url + path, headers={"host": host}).status_code == status


@pytest.mark.long
def test_tenants_that_do_not_fit_the_memory_are_loaded_when_they_are_asked_for(tmp_path, capfd):
    """With the answers of an engine that holds all of them."""
    model, tenants = model_and_tenants()
    for name, adapter in tenants.items():
        save_adapter(adapter, tmp_path / name, model=model)
    found = dict(zip(tenants, previews([str(tmp_path / name) for name in tenants], model.config), strict=True))
    load = lambda name: load_adapter(found[name].place, model.config)  # noqa: E731
    whole, little = (bank_of(found, model.config, load, memory) for memory in (10**9, 1))
    sizes = {"slots": 2, "max_length": 40, "prefill_chunk": 8, "block_size": 4}
    alone, engine = (Engine(model, bank, chat_tokenizer(), **sizes) for bank in (whole, little))
    expected = {}
    for name in tenants:
        alone.submit(Request(prompt(1), name, max_new_tokens=8, strip=False, id=name))
    for completion in alone.run():
        expected[completion.id] = completion.text
    assert len(set(expected.values())) == len(tenants) and len(little) == 0
    engine.warm_up = lambda: None

    def asked(name):
        body = {"model": name, "prompt": prompt(1), "max_tokens": 8, "temperature": 0}
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=60)

    with running(engine) as server, ThreadPoolExecutor(4) as threads:
        names = [*tenants, *reversed(tenants), *tenants]
        answers = list(threads.map(asked, names))
        assert [answer.json()["choices"][0]["text"] for answer in answers] == [expected[name] for name in names]
        listed = httpx.get(f"{server.url}/v1/models").json()["data"]
        assert {one["id"] for one in listed} == {"base", *tenants} and len(little) == 1
        first, *_, last = tenants
        assert asked(last).status_code == 200
        shutil.rmtree(tmp_path / first)
        assert asked(first).status_code == 500 and asked(last).status_code == 200
        assert asked(first).json()["error"]["code"] == "adapter_failed"
    assert str(tmp_path / first) in capfd.readouterr().err


def test_keys_open_their_tenants_only(engine, tmp_path):
    with running(engine, api_key_file=key_file(tmp_path, "sk-all", "sk-ä A")) as server:
        every, some = ({"authorization": f"Bearer {key}".encode()} for key in ("sk-all", "sk-ä"))

        def ask(model, headers):
            body = {"model": model, "prompt": "w30 w31", "max_tokens": 1}
            return httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60)

        assert [ask(name, every).status_code for name in ("A", "B", "base")] == [200, 200, 200]
        assert [ask(name, some).status_code for name in ("A", "B", "Z", "base")] == [200, 404, 404, 200]
        assert "B" not in ask("Z", some).json()["error"]["message"]
        assert ask("A", {}).status_code == ask("Z", {"authorization": "Bearer sk-b"}).status_code == 401
        models = httpx.get(f"{server.url}/v1/models", headers=some).json()["data"]
        assert [one["id"] for one in models] == ["base", "A"]
        statuses = {
            path: [httpx.get(server.url + path, headers=headers).status_code for headers in (every, some, {})]
            for path in ("/metrics", "/v1/models/B", "/v1/models", "/health", "/ready", "/version", "/nothing")
        }
        assert statuses == {
            "/metrics": [200, 403, 401], "/v1/models/B": [200, 404, 401], "/v1/models": [200, 200, 401],
            "/health": [200] * 3, "/ready": [200] * 3, "/version": [200] * 3, "/nothing": [404, 404, 401],
        }  # fmt: skip


def test_a_limited_key_does_not_learn_what_others_have_asked(engine, tmp_path):
    with running(engine, api_key_file=key_file(tmp_path, "sk-all", "sk-a A", "sk-b A")) as server:

        def cached(key):
            body, headers = {"model": "base", "prompt": prompt(9), "max_tokens": 1}, {"authorization": f"Bearer {key}"}
            found = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60).json()
            return found["usage"]["prompt_tokens_details"]["cached_tokens"]

        assert [cached(key) for key in ("sk-a", "sk-b", "sk-all")] == [0, 0, 0] and cached("sk-a") > 0


def test_the_servers_limits_hold(engine, monkeypatch, capfd):
    monkeypatch.setattr(answering, "BODY_SECONDS", 0.2)
    with running(engine, max_body=200, timeout=0.3, log_prompts=True, served_model_name="tiny") as server:
        url = f"{server.url}/v1/completions"
        eventually(lambda: httpx.post(url, json=LONG | {"model": "tiny"}).json().get("model") == "tiny")
        assert httpx.post(url, json=LONG | {"user": "x" * 200}).status_code == 413
        with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=60) as slow:
            head = ["POST /v1/completions HTTP/1.1", "host: localhost", "content-type: application/json"]
            slow.sendall("\r\n".join([*head, "content-length: 9", "", "{"]).encode())
            assert slow.recv(1000).startswith(b"HTTP/1.1 408")
        with server.held():
            assert httpx.post(url, json=LONG | {"timeout": 60}, timeout=60).status_code == 504
    assert prompt(1) in capfd.readouterr().err


def test_connections_above_the_limit_get_503(engine, monkeypatch):
    monkeypatch.setattr(server_module, "SPARE_CONNECTIONS", 2 - SLOTS - QUEUE)
    with running(engine) as server:
        port = int(server.url.rpartition(":")[2])
        assert httpx.get(f"{server.url}/ready").status_code == 200
        with socket.create_connection(("127.0.0.1", port)), socket.create_connection(("127.0.0.1", port)):
            eventually(lambda: httpx.get(f"{server.url}/ready").status_code == 503)
        eventually(lambda: httpx.get(f"{server.url}/ready").status_code == 200)


HOSTILE = {
    "pieces": (b"transfer-encoding: chunked", b"1\r\n[\r\n" * 2**23),
    "lists": (b"content-length: %d" % 2**23, b"[" * 2**23),
    "texts": (b"content-length: %d" % 2**23, b'{"prompt":[' + b'"",' * (2**23 // 3 - 4) + b" "),
    "one text": (b"content-length: %d" % 2**23, b'{"model":"base","prompt":"' + b"w1 " * (2**23 // 3 - 10) + b'"}  '),
}


#: Sends what it reads to a port, again and again.
SEND = """
import socket, sys
request, address = sys.stdin.buffer.read(), ("127.0.0.1", int(sys.argv[1]))
while True:
    try:
        with socket.create_connection(address) as client:
            client.sendall(request)
            client.recv(1000)
    except OSError:
        pass
"""


@pytest.mark.long
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_body_delays_others_by_at_most_a_tenth_of_a_second(engine, kind):
    """The most that a body may have is 8 MiB. One after the other is sent, while another client asks for a token."""
    header, body = HOSTILE[kind]
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    with running(engine) as server, httpx.Client(base_url=server.url, timeout=60) as client:

        def seconds(count):
            taken = []
            for _ in range(count):
                began = time.monotonic()
                assert client.post("/v1/completions", json=LONG | {"max_tokens": 1}).status_code == 200
                taken.append(time.monotonic() - began)
            return sorted(taken)[count // 2]

        seconds(3)
        alone = seconds(30)
        sent = subprocess.Popen([sys.executable, "-c", SEND, server.url.rpartition(":")[2]], stdin=subprocess.PIPE)
        try:
            sent.stdin.write(head + header + b"\r\n\r\n" + body)
            sent.stdin.close()
            time.sleep(1)
            assert seconds(30) < alone + 0.1 and sent.poll() is None
        finally:
            sent.kill()
            sent.wait()


def test_metrics_count_what_was_served(engine):
    with running(engine) as server:
        httpx.post(f"{server.url}/v1/completions", json=LONG, timeout=60)
        text = httpx.get(f"{server.url}/metrics").text
    assert re.search(r"^vllm:generation_tokens_total\{.*\} 30\.0$", text, re.M)


# ------------------------------------------------------------------------------------------------------------ addresses


def test_only_this_machine_is_let_in_unless_another_address_is_given():
    for host in (ServerConfig().host, served().parse_args([]).host):
        with bound(host, 0) as taken:
            assert is_loopback(taken)


def test_a_free_port_is_taken_and_a_port_in_use_is_refused_by_name():
    with bound("localhost", 0) as first:
        port = first.getsockname()[1]
        assert url_of(first) == f"http://127.0.0.1:{port}" and is_loopback(first)
        with pytest.raises(ValueError, match=f"--port {port}"):
            bound("127.0.0.1", port)
    with bound("0.0.0.0", 0) as everywhere:
        assert not is_loopback(everywhere) and url_of(everywhere).startswith("http://127.0.0.1:")


def test_a_wrong_address_is_refused_by_name():
    with pytest.raises(ValueError, match="--host no"):
        bound("no.such.host.", 0)
    with pytest.raises(ValueError, match="port must be .* 65535; got 70000"):
        ServerConfig(port=70000)


# ------------------------------------------------------------------------------------------------------------- signals

#: Serves in the main thread. Its engine never ends a round, and with an argument never gets warm.
SERVE = """
import sys, threading
from running_server import new_engine
from para_jax import serve
from para_jax.server.address import bound, url_of
from para_jax.server.config import ServerConfig
engine, forever = new_engine(), threading.Event()
engine.step, engine.warm_up = forever.wait, forever.wait if sys.argv[1:] else lambda: None
taken = bound("127.0.0.1", 0)
print(url_of(taken), flush=True)
serve(engine, ServerConfig(drain_seconds=100), taken=taken)
"""


@contextmanager
def started(command):
    """A process, and the last word of the first line that it prints: the URL. It ends with the block."""
    paths = os.pathsep.join([str(Path(__file__).parents[1] / "helpers"), str(Path(para_jax.__file__).parents[1])])
    environment = os.environ | own_flags() | {"PYTHONPATH": paths}
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    try:
        yield process, process.stdout.readline().split()[-1]
    finally:
        process.kill()
        process.communicate(timeout=60)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(number):
    with ThreadPoolExecutor() as pool, started([sys.executable, "-c", SERVE]) as (process, url):
        eventually(lambda: answers(url) and httpx.get(f"{url}/ready").status_code == 200)
        asked = pool.submit(httpx.post, f"{url}/v1/completions", json=LONG, timeout=60)
        eventually(lambda: 'num_requests_waiting{model_name="base"} 1.0' in httpx.get(f"{url}/metrics").text)
        process.send_signal(number)
        eventually(lambda: not answers(url))
        assert process.poll() is None and not asked.done()
        process.send_signal(number)
        assert process.wait(5) == -number
        assert isinstance(asked.exception(), httpx.TransportError)


@pytest.mark.long
def test_a_signal_before_the_server_is_ready_ends_the_process_at_once():
    with started([sys.executable, "-c", SERVE, "never warm"]) as (process, url):
        eventually(lambda: answers(url))
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == -signal.SIGTERM


@pytest.mark.long
def test_the_command_serves_and_sigterm_lets_it_finish(tmp_path):
    model, tenants = model_and_tenants()
    backbone = backbone_folder(tmp_path / "backbone")
    save_adapter(tenants["A"], tmp_path / "A", model=model)
    command = [sys.executable, "-m", "para_jax.cli", "serve", "--backbone", backbone, "--adapters", tmp_path / "A"]
    options = ["--port", "0", "--slots", "2", "--max-length", "120", "--allow-cpu", "--no-compilation-cache"]
    with started([*command, *options]) as (process, url):
        assert process.stdout is not None and "curl" in process.stdout.readline()
        assert [one["id"] for one in httpx.get(f"{url}/v1/models").json()["data"]] == ["backbone", "A"]
        long = LONG | {"max_tokens": 100, "stream": True}
        with httpx.stream("POST", f"{url}/v1/completions", json=long, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert [line for line in lines if line][-1] == "data: [DONE]"
        assert process.wait(30) == 0


# ------------------------------------------------------------------------------------------------------- documentation


@pytest.mark.skipif(shutil.which("curl") is None, reason="this machine has no curl")
def test_the_requests_of_the_documentation_are_answered(engine):
    """docs/server.md: each curl of "Start it", with the port replaced."""
    section = (ROOT / "docs" / "server.md").read_text().split("\n## Start it\n")[1].split("\n## ")[0]
    blocks = re.findall(r"^```\n(curl .*?)^```", section, re.M | re.S)
    commands = [shlex.split(text) for block in blocks for text in block.replace("\\\n", " ").strip().split("\n\n")]
    assert len(commands) == 4
    _, tenants = model_and_tenants()
    engine.bank.add("acme", tenants["A"])
    engine.bank.add("globex", tenants["R"])
    with running(engine, served_model_name="smollm2-135m") as server:
        for _, *words in commands:
            at = [word.replace("localhost:8000", server.url) for word in words]
            found = subprocess.run(["curl", "-sS", "--fail", *at], capture_output=True, text=True, timeout=60)
            assert found.returncode == 0, found.stderr + found.stdout
            assert ("-N" in words) == found.stdout.endswith("data: [DONE]\n\n")
            assert "-N" in words or json.loads(found.stdout)["object"] in ("list", "chat.completion", "text_completion")
