"""A long day over HTTP: tenants come, go and are replaced, while clients ask, leave, read slowly and send nonsense."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter, defaultdict
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from golden_models import backbone, strong
from quick_compiler import own_flags
from running_server import chat_tokenizer, eventually
from tiny_engine import SITES, answers, prompt
from tiny_run import backbone_folder

from para_jax import AdapterBank, Engine, Ia3Config, LoraConfig, ParaConfig, Request, init_adapter, save_adapter

TENANTS, NAMES, ADAPTERS, CLIENTS, SLOTS, LENGTH = 60, 90, 20, 12, 8, 40
METHODS, CONFIGS = (
    ("para", "ia3", "lora"),
    (
        ParaConfig(r=4),
        Ia3Config(target_modules=("v_proj", "down_proj")),
        LoraConfig(r=2, target_modules=("q_proj",)),
        ParaConfig(r=4, scope="response"),
    ),
)
#: How an answer is drawn.
SAMPLINGS = ({"temperature": 0}, {"temperature": 1.0, "seed": 3}, {"temperature": 0.7, "seed": 5, "top_p": 0.9, "n": 2})
#: Answers that are not the wanted one: a full queue, a tenant that is gone, a deadline.
BUSY, GONE, LATE = 429, 404, 504


@pytest.mark.slow
def test_a_long_day_over_http_gives_every_client_its_own_answer_and_loses_nothing(tmp_path, request):
    seconds = request.config.getoption("--soak-seconds")
    made = adapters(tmp_path / "root")
    with server(tmp_path) as (process, url):
        tenants = Tenants(url)
        for i in range(TENANTS):
            tenants.load(f"t{i}", i % ADAPTERS)
        fill_slots(url)
        at_rest = usage(process.pid)
        day = Day(url, tenants, until=time.monotonic() + seconds)
        measured = watch(process.pid, day)
        eventually(lambda: running(url) == 0)
        fill_slots(url)
        eventually(lambda: usage(process.pid)["files"] <= at_rest["files"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log and " 500 " not in log
    assert day.failures == []
    wrong = day.wrong_answers(made)
    assert not wrong, wrong[:3]
    print(f"\n{seconds:.0f} s, {dict(day.counts)}, {day.slow} read slowly, {tenants.changes} changes of tenants")
    print(report(measured, sum(day.counts.values())))
    assert day.counts["answers"] > 3 * seconds and day.counts["left"] and day.counts["refused"] and day.slow
    first, later = measured[: len(measured) // 3], measured[len(measured) // 3 :]
    assert max(one["threads"] for one in later) <= max(one["threads"] for one in first) + 2
    if seconds > 300:
        slope = np.polyfit([one["requests"] for one in later], [one["memory"] for one in later], 1)[0]
        print(f"memory grows by {slope:.0f} bytes per request")
        assert slope < 1000


# ---------------------------------------------------------------------------------------------------------- the server


def adapters(root: Path) -> list:
    """Strong adapters of all methods, saved in a folder each."""
    config = backbone("llama").config
    made = [strong(init_adapter(CONFIGS[i % 4], config), i, 0.3) for i in range(ADAPTERS)]
    for i, adapter in enumerate(made):
        save_adapter(adapter, root / str(i))
    return made


@contextmanager
def server(folder: Path):
    """`para-jax serve` in a process of its own, and its URL."""
    chat_tokenizer().save_pretrained(backbone_folder(folder / "backbone"))
    options = {
        "--backbone": folder / "backbone", "--port": 0, "--slots": SLOTS, "--max-length": LENGTH, "--queue-limit": 24,
        "--queue-limit-per-tenant": 8, "--adapter-root": folder / "root", "--capacity": NAMES, "--max-r": 4,
        "--methods": ",".join(METHODS), "--sites": ",".join(sorted({*SITES, "down_proj"})),
    }  # fmt: skip
    command = [sys.executable, "-m", "para_jax.cli", "serve", "--allow-cpu"]
    command += [str(part) for option in options.items() for part in option]
    command += ["--adapters", *(f"kind{i}={folder / 'root' / str(i)}" for i in range(len(CONFIGS)))]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | own_flags())
    try:
        line = process.stdout.readline()
        assert line.startswith("serving at http://"), (folder / "log").read_text()
        yield process, line.split()[-1]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def usage(pid: int) -> dict:
    """What a process holds: bytes, threads and open files."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = {name: int(status.split(f"{name}:")[1].split()[0]) for name in ("RssAnon", "Threads")}
    return {"memory": found["RssAnon"] * 1024, "threads": found["Threads"], "files": len(os.listdir(f"/proc/{pid}/fd"))}


def running(url: str) -> float:
    """Samples that hold a slot or wait for one."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:num_requests_"))


def fill_slots(url: str) -> None:
    """Checks that as many samples as there are slots decode together: each has a token before one of them ends."""
    body = {"model": "base", "messages": [{"role": "user", "content": prompt(0)}], "stream": True}
    body |= {"n": SLOTS, "max_tokens": 25, "ignore_eos": True}
    begun = set()
    for choice in choices_of(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).text):
        begun.add(choice["index"])
        if choice["finish_reason"] is not None:
            break
    assert begun == set(range(SLOTS))


def choices_of(events: str) -> list[dict]:
    lines = [line.removeprefix("data: ") for line in events.split("\n\n") if line.startswith("data: {")]
    return [choice for line in lines for choice in json.loads(line)["choices"]]


def watch(pid: int, day) -> list[dict]:
    """What the process holds over the day, which begins here."""
    threads = [threading.Thread(target=day.client, args=(i,)) for i in range(CLIENTS)]
    threads.append(threading.Thread(target=day.change_tenants))
    for thread in threads:
        thread.start()
    measured = []
    while any(thread.is_alive() for thread in threads):
        time.sleep(1)
        measured.append(usage(pid) | {"requests": sum(day.counts.values())})
    return measured


def report(measured: list[dict], requests: int) -> str:
    """What the process held at the start, after the first third, and at the end."""
    chosen = [measured[at] for at in (0, len(measured) // 3, -1)]
    return f"{requests} requests; " + "; ".join(
        f"{one['memory'] / 1e6:.0f} MB, {one['threads']} threads, {one['files']} files" for one in chosen
    )


# ---------------------------------------------------------------------------------------------------------- the tenants


class Tenants:
    """Which adapter each tenant has had. None: it was not loaded."""

    def __init__(self, url: str):
        self.http = httpx.Client(base_url=url, timeout=60)
        self.history: dict[str, list[int | None]] = defaultdict(lambda: [None])
        self.known: Counter[str] = Counter()
        """for each tenant, the number of its last change that the server has confirmed"""
        self.changes = 0

    def load(self, name: str, adapter: int) -> None:
        replace = self.history[name][-1] is not None
        body = {"lora_name": name, "lora_path": str(adapter), "load_inplace": replace}
        assert self._change("load", name, adapter, body).json()["replaced"] == replace

    def unload(self, name: str) -> None:
        self._change("unload", name, None, {"lora_name": name})

    def _change(self, kind: str, name: str, adapter: int | None, body: dict) -> httpx.Response:
        self.history[name].append(adapter)
        response = self.http.post(f"/v1/{kind}_lora_adapter", json=body)
        assert response.status_code == 200, response.text
        self.known[name] = len(self.history[name]) - 1
        self.changes += 1
        return response

    def held(self, name: str, since: int) -> tuple:
        """The adapters that a tenant may have had since its change of that number."""
        return tuple(dict.fromkeys(self.history[name][since:]))


# -------------------------------------------------------------------------------------------------------------- the day


class Day:
    def __init__(self, url: str, tenants: Tenants, until: float):
        self.url, self.tenants, self.until = url, tenants, until
        self.counts: Counter[str] = Counter()
        self.slow = 0
        """answers that were read slowly"""
        self.failures: list[str] = []
        self.seen: dict[tuple, set] = defaultdict(set)
        """for each kind of request, with the adapters that it may have met, the answers"""

    def client(self, number: int) -> None:
        draw = np.random.default_rng(number)
        acts = (self.ask, self.leave, self.send_nonsense, self.read_slowly)
        while time.monotonic() < self.until and not self.failures:
            with httpx.Client(base_url=self.url, timeout=60) as http:
                for _ in range(20):
                    try:
                        acts[draw.choice(4, p=[0.76, 0.1, 0.1, 0.04])](http, draw)
                    except BaseException as error:
                        self.failures.append(repr(error))

    def change_tenants(self) -> None:
        draw, tenants = np.random.default_rng(CLIENTS), self.tenants
        try:
            while time.monotonic() < self.until and not self.failures:
                name, other = (f"t{number}" for number in draw.choice(NAMES, 2, replace=False))
                if (tenants.history[name][-1] is None) != (tenants.history[other][-1] is None):  # one goes, one comes
                    gone, new = (name, other) if tenants.history[other][-1] is None else (other, name)
                    tenants.unload(gone)
                    tenants.load(new, int(draw.integers(ADAPTERS)))
                elif tenants.history[name][-1] is not None:
                    tenants.load(name, int(draw.integers(ADAPTERS)))
                time.sleep(0.02)
        except BaseException as error:
            self.failures.append(repr(error))

    def drawn(self, draw) -> tuple[str, dict, tuple]:
        """A path, a body, and what the answer depends on besides the adapter."""
        chat, words, new, sampling = (int(draw.integers(most)) for most in (2, 6, 3, len(SAMPLINGS)))
        text, count = prompt(words, 4 + 3 * words), (3, 8, 14)[new]
        tenant = "base" if draw.random() < 0.1 else f"t{draw.integers(NAMES)}"
        body = {"model": tenant, "max_tokens": count, "stream": bool(draw.random() < 0.5)} | SAMPLINGS[sampling]
        if chat:
            path, body["messages"] = "/v1/chat/completions", [{"role": "user", "content": text}]
        else:
            path, body["prompt"] = "/v1/completions", text
        return path, body, (chat, words, count, sampling)

    def ask(self, http: httpx.Client, draw) -> None:
        path, body, kind = self.drawn(draw)
        if draw.random() < 0.05:
            body["timeout"] = 0.01
        since = self.tenants.known[body["model"]]
        response = http.post(path, json=body)
        self.note(body, kind, since, response.status_code, response.text)

    def leave(self, http: httpx.Client, draw) -> None:
        """Leaves before the answer, in it, or before the request is complete."""
        path, body, _ = self.drawn(draw)
        text = json.dumps(body | {"stream": True, "max_tokens": 20, "ignore_eos": True})
        with self.connected() as client:
            whole = draw.random() < 0.8
            send(client, path, text if whole else text[:-5], len(text))
            if whole and draw.random() < 0.7:
                client.recv(200)
        self.counts["left"] += 1

    def send_nonsense(self, http: httpx.Client, draw) -> None:
        good = {"model": "base", "prompt": "w20"}
        content, headers, status = [
            (json.dumps(good | {"model": "nobody"}), {}, 404),
            (json.dumps(good | {"temperature": "hot"}), {}, 400),
            (json.dumps(good | {"prompt": prompt(0, LENGTH + 1)}), {}, 400),
            (json.dumps(good)[:-1], {}, 400),
            (json.dumps(good), {"content-type": "text/plain"}, 415),
        ][draw.integers(5)]
        found = http.post("/v1/completions", content=content, headers={"content-type": "application/json"} | headers)
        assert found.status_code == status and found.json()["error"]["message"], found.text
        self.counts["refused"] += 1

    def read_slowly(self, http: httpx.Client, draw) -> None:
        path, body, kind = self.drawn(draw)
        since, found = self.tenants.known[body["model"]], b""
        with self.connected() as client:
            send(client, path, json.dumps(body))
            while part := client.recv(400):
                found += part
                time.sleep(0.05)
        head, _, rest = found.partition(b"\r\n\r\n")
        text = unchunked(rest) if b"chunked" in head else rest
        self.slow += 1
        self.note(body, kind, since, int(head.split()[1]), text.decode())

    def connected(self) -> socket.socket:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        made.settimeout(60)
        made.connect(("127.0.0.1", int(self.url.rpartition(":")[2])))
        return made

    def note(self, body: dict, kind: tuple, since: int, status: int, text: str) -> None:
        """Keeps an answer for `wrong_answers`, or counts why there is none."""
        held = (None,) if body["model"] == "base" else self.tenants.held(body["model"], since)
        if status == 200 and '"error"' not in text:
            found: dict[int, str] = defaultdict(str)
            for choice in choices_of(text) if body["stream"] else json.loads(text)["choices"]:
                said = choice.get("text") or choice.get("message", choice.get("delta", {})).get("content") or ""
                found[choice["index"]] += said
            assert body["model"] == "base" or held != (None,), "an answer of a tenant that is not there"
            self.seen[(kind, held)].add(tuple(text for _, text in sorted(found.items())))
            self.counts["answers"] += 1
        elif status == GONE:
            assert None in held and body["model"] != "base", text
            self.counts["gone"] += 1
        elif status == BUSY:
            self.counts["busy"] += 1
        else:
            assert "timeout" in body and (status == LATE or '"timeout"' in text), (status, text)
            self.counts["late"] += 1

    def wrong_answers(self, adapters: list) -> list:
        """The answers that are not those of the engine alone."""
        model = backbone("llama")
        bank = AdapterBank(model.config, max_r=4, sites=(*SITES, "down_proj"), methods=METHODS)
        for i, adapter in enumerate(adapters):
            bank.add(str(i), adapter)
        alone = Engine(model, bank, chat_tokenizer(), slots=SLOTS, max_length=LENGTH)
        known: dict[tuple, tuple] = {}

        def expected(kind, adapter):
            if (kind, adapter) not in known:
                chat, words, count, sampling = kind
                text = prompt(words, 4 + 3 * words)
                given = [{"role": "user", "content": text}] if chat else text
                tenant = None if adapter is None else str(adapter)
                alone.submit(Request(given, tenant, count, strip=False, **SAMPLINGS[sampling]))
                known[kind, adapter] = tuple(found.text for _, found in sorted(answers(alone).items()))
            return known[kind, adapter]

        wrong = []
        for (kind, held), found in self.seen.items():
            right = {expected(kind, adapter) for adapter in held}
            wrong += [(kind, held, answer, right) for answer in found - right]
        return wrong


def send(client: socket.socket, path: str, text: str, length: int | None = None) -> None:
    lines = (f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json", "connection: close")
    head = "\r\n".join((*lines, f"content-length: {length or len(text)}"))
    client.sendall(f"{head}\r\n\r\n{text}".encode())


def unchunked(data: bytes) -> bytes:
    found = b""
    while data:
        size, _, data = data.partition(b"\r\n")
        found, data = found + data[: int(size, 16)], data[int(size, 16) + 2 :]
    return found
