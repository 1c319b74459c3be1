"""Requests to the HTTP server: changed fields, headers, paths, bodies and bytes, and clients that stop halfway."""

import json
import random
import socket
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from typing import Any, NamedTuple

from para_jax import Request
from para_jax.server.protocol import CHAT_FIELDS, TEXT_FIELDS

from . import mutate, names
from .cases import Trial, Wrong
from .http_server import HIDDEN, LIMITED, UNLIMITED, Server, server
from .serving import answer

CHAT, TEXT, LOAD, UNLOAD = (
    "/v1/chat/completions", "/v1/completions", "/v1/load_lora_adapter", "/v1/unload_lora_adapter",
)  # fmt: skip
#: Statuses of a request that is refused. 500 is a fault, and so is 503 of a server that neither starts nor stops.
REFUSED = (400, 401, 403, 404, 405, 408, 413, 415, 429, 431, 504)
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {
        "model": "A", "messages": [{"role": "system", "content": "w20"}, {"role": "user", "content": "w30 w31"}],
        "max_completion_tokens": 3, "temperature": 0, "top_p": 0.9, "top_k": 5, "n": 2, "seed": 1, "stop": ["w9"],
        "stream": False, "logprobs": True, "top_logprobs": 2, "user": "u", "metadata": {"a": "b"},
        "response_format": {"type": "text"}, "tools": [],
    },
    TEXT: {
        "model": "A", "prompt": ["w20 w21", "w30"], "max_tokens": 3, "temperature": 0, "n": 2, "seed": 4,
        "stop": "w9", "stream": True, "stream_options": {"include_usage": True}, "logprobs": 1, "echo": True,
        "timeout": 4, "stop_token_ids": [30], "ignore_eos": False, "context_length": [1, 1],
    },
    LOAD: {"lora_name": "new", "lora_path": "mine", "load_inplace": False, "base_model_name": ""},
    UNLOAD: {"lora_name": "new", "lora_int_id": None},
}  # fmt: skip
EXTRA = (*CHAT_FIELDS, *TEXT_FIELDS, "lora_name", "lora_path", "tenant", "adapter", "id")
PATHS = (
    "/v1/models", "/v1/models/A", "/v1/models/" + HIDDEN[:-1], "/metrics", "/health", "/ready", "/version", "/",
    "/page/state", "/page/../metrics", "/v1/models/../../metrics", "/%2e%2e/%2e%2e/etc/passwd", "/../../etc/passwd",
    "//etc/passwd", "/v1//models", "/v1/models/%00", "/v1/models/%0d%0ax-injected:%20yes", "/v1/models/a%0Ab",
    "/v1/models/%ff%fe", "/v1/models/%f0%9f%98%80", "/v1/models/" + "a" * 5000, "/a?x=" + "b" * 9000, "/health?x", "*",
    "http://127.0.0.1/health", "http://[::1/health", "/v1/completions/", "/V1/COMPLETIONS", "/docs", "/openapi.json",
    "/static/../page.html", "\\..\\x", "/v1/models/%", "/v1/models/\x7f", "/v1/models/é", "/#x", "?", "",
)  # fmt: skip
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "get", "G(T", "X" * 5000, "")
HEADERS = (
    "x-request-id: a\tb", "x-request-id: " + "i" * 129, "x-request-id: ok\x00", "x-request-id: é", "x-request-id:",
    "content-type: application/json; charset=utf-16", "content-type: text/plain", "content-type: APPLICATION/JSON",
    "content-type: multipart/form-data; boundary=x", "content-type:", "content-encoding: gzip", "content-length: 0",
    "content-length: -1", "content-length: 1e3", "content-length: +5", "content-length: " + "9" * 30,
    "content-length: 5\r\ncontent-length: 6", "transfer-encoding: chunked", "transfer-encoding: gzip, chunked",
    "transfer-encoding: xchunked", "expect: 100-continue", "expect: x", "upgrade: websocket\r\nconnection: upgrade",
    "upgrade: h2c", "host: y", "connection: close, te", "te: trailers", "authorization: Bearer",
    "authorization: Basic c2s6", "authorization: é", "authorization: Bearer sk-unlimite",
    "authorization: Bearer " + "k" * 9000, "cookie: " + "c" * 40000, "x-forwarded-for: 127.0.0.1",
    "x-forwarded-host: evil", "x: 1\r\n y: folded", "x : 1", ": x", "x\x00y: 1", "é: 1", "a: b\nx-injected: yes",
    "range: bytes=0-1", "accept: text/html", "origin: http://evil", "x" * 9000 + ": 1", "many: 1\r\n" * 300 + "many: 2",
)  # fmt: skip


#: Fields that a good request has only together with another one.
TOGETHER = {"context_length": ("echo", "logprobs"), "stream_options": ("stream",), "top_logprobs": ("logprobs",)}


class Sent(NamedTuple):
    """The bytes of a request, and how the client behaves."""

    data: bytes
    unlimited: bool
    """whether its key opens everything"""
    pieces: int = 1
    leaves: bool = False
    """whether it closes its end without reading"""


def request(draw: random.Random, folder: Path) -> Trial:
    """Any request is answered right or refused in OpenAI's shape. It tells nothing of others, and leaves nothing."""
    there = server()
    there.log.lines.clear()
    sent, asked = drawn(draw, there)

    def run():
        try:
            response = exchange(there, sent)
            if response is not None:
                check_response(there, sent, *response)
                if asked is not None and response[0] == 200:
                    check_answer(asked, response[2])
        finally:
            loaded = there.restore_tenants() if not sent.leaves else {}
        there.require_sane()
        loaded |= there.restore_tenants()
        if not set(loaded.values()) <= set(there.inside().values()):
            raise Wrong(f"loaded from outside the root: {loaded}")
        if response is not None and response[0] in REFUSED:
            raise ValueError(f"refused with {response[0]}")

    return Trial(run, ("refused",))


# ----------------------------------------------------------------------------------------------------------- the client


def drawn(draw: random.Random, there: Server) -> tuple[Sent, dict | None]:
    """A request; with its body, if that is a JSON object that nothing else may change."""
    path = draw.choice((CHAT, TEXT, TEXT, LOAD, LOAD, UNLOAD, *(["other"] * 2)))
    method, body, asked, unlimited = "POST", b"", None, path in (LOAD, UNLOAD) or draw.random() < 0.2
    if path == "other":
        path, method = draw.choice(PATHS), draw.choice((*["GET"] * 10, *METHODS))
        if draw.random() < 0.2:
            path = mutated(draw, path)
    elif path == LOAD and draw.random() < 0.6:
        name = draw.choice(("new", "new", "A", HIDDEN, "base", draw.choice(mutate.TEXTS)))
        body = dumps(draw, {"lora_name": name, "lora_path": adapter_path(draw, there), "load_inplace": name == "new"})
    elif draw.random() < 0.75:
        tree = few(draw, BODIES[path])
        tree = tree if draw.random() < 0.4 else mutate.tree(draw, tree, EXTRA)
        body = dumps(draw, tree)
        asked = tree if path == TEXT and isinstance(tree, dict) else None
    else:
        body = mutate.json_text(draw, few(draw, BODIES[path]), EXTRA)
    given = [] if draw.random() < 0.75 else [draw.choice(HEADERS) for _ in range(draw.choice((1, 1, 2)))]
    key = UNLIMITED if unlimited else draw.choice((*[LIMITED] * 8, None, "sk-wrong"))
    head, body = framed(draw, method, path, body, given, key)
    data = head + body
    asked = None if given or key not in (LIMITED, UNLIMITED) else asked
    if draw.random() < 0.1:
        data, asked = mutate.data(draw, data), None
    if draw.random() < 0.05:
        data, asked = data[: draw.randrange(len(data))], None
    if draw.random() < 0.03:
        data, asked = data * 3, None  # pipelined
    return Sent(data, UNLIMITED.encode() in data, draw.choice((1, 1, 1, 2, 5)), draw.random() < 0.08), asked


def few(draw: random.Random, body: dict) -> dict:
    """The body without some of its fields, so that more of the requests are good ones."""
    needed = ("model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature")
    needed += ("lora_name", "lora_path")
    made = {name: value for name, value in body.items() if name in needed or draw.random() < 0.4}
    return {name: value for name, value in made.items() if made.keys() >= set(TOGETHER.get(name, ()))}


def dumps(draw: random.Random, tree: object) -> bytes:
    return json.dumps(tree, ensure_ascii=draw.random() < 0.5).encode(errors="surrogatepass")


def mutated(draw: random.Random, text: str) -> str:
    return mutate.data(draw, text.encode()).decode("latin-1")


def adapter_path(draw: random.Random, there: Server) -> str:
    """A path that may lead out of the root."""
    outside, root = str(there.outside), str(there.root)
    path = draw.choice((
        "mine", "other", "link", "../outside", "mine/../../outside", outside, root, ".", "", "mine/", 
        "./mine", "./././other",
        "../adapters/mine", "mine/../../adapters/../outside", "/proc/self/cwd", "/proc/self/root" + outside, "mine\0",
        "link/../mine", "..%2foutside", "..\\outside", "~", "~/x", "file://" + outside, "hf://a/b", "gs://a/b",
        "user/name",
        "mine/adapter_config.json", "//" + outside, root + "/mine", root + "/../outside", *names.NAMES,
    ))  # fmt: skip
    if draw.random() < 0.3:
        cut = draw.randint(0, len(path))
        path = path[:cut] + draw.choice(("../", "./", "/", "\0", "%2e%2e/", " ", "..")) + path[cut:]
    return path


def framed(draw: random.Random, method: str, path: str, body: bytes, given: list[str], key) -> tuple[bytes, bytes]:
    """The head and the body as they are sent: with a length, or in chunks that may be wrong."""
    lines = [f"{method} {path} HTTP/{draw.choice((*['1.1'] * 20, '1.0', '2.0', '9', ''))}", "host: localhost", *given]
    lines += [f"authorization: {draw.choice(('Bearer', 'bearer'))} {key}"] if key else []
    if not any(line.startswith("content-type") for line in given):
        lines.append("content-type: application/json")
    if draw.random() < 0.15 or "transfer-encoding: chunked" in given:
        lines += [] if "transfer-encoding: chunked" in given else ["transfer-encoding: chunked"]
        body = chunked(draw, body)
    elif body and not any(line.startswith("content-length") for line in given):
        lines.append(f"content-length: {len(body)}")
    lines += [] if draw.random() < 0.1 else ["connection: close"]
    return ("\r\n".join(lines) + "\r\n\r\n").encode(errors="surrogatepass"), body


def chunked(draw: random.Random, body: bytes) -> bytes:
    made, at = b"", 0
    while at < len(body):
        size = draw.choice((1, 7, 100, 5000))
        part = body[at : at + size]
        made, at = made + b"%x\r\n%s\r\n" % (len(part), part), at + size
    made += b"0\r\n\r\n"
    wrong = (
        b"-1\r\n",
        b"zz\r\n\r\n",
        b"ffffffffffffffff\r\n",
        b"0\r\nx-injected: yes\r\n\r\n",
        b"5;ext=" + b"e" * 9000,
        b"",
    )
    return made if draw.random() < 0.7 else made[:-5] + draw.choice(wrong)


def exchange(there: Server, sent: Sent) -> tuple[int, list[tuple[str, str]], bytes] | None:
    """The status, headers and body of the first response. None if there is none: the server may close."""
    with there.connect() as client:
        try:
            size = max(1, len(sent.data) // sent.pieces)
            for at in range(0, len(sent.data), size):
                client.sendall(sent.data[at : at + size])
            if sent.leaves:
                return None
            return first_response(client, sent.data.startswith(b"HEAD "))
        except (ConnectionError, BrokenPipeError):
            return None  # it was closed before all was sent; what it said may be lost
        except TimeoutError:
            raise Wrong("no answer, and the connection is open") from None


def first_response(client: socket.socket, head: bool) -> tuple[int, list[tuple[str, str]], bytes] | None:
    response = HTTPResponse(client, method="HEAD" if head else "POST")
    try:
        response.begin()
        return response.status, response.getheaders(), response.read()
    except HTTPException as error:
        if "without response" in str(error) or "IncompleteRead" in repr(error) or not str(error):
            return None
        raise Wrong(f"not a response: {error!r}") from None


# --------------------------------------------------------------------------------------------------------------- oracle


def check_response(there: Server, sent: Sent, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
    if status != 200 and status not in REFUSED:
        raise Wrong(f"status {status}: {body[:300]!r}")
    lines = [f"{name}: {value}" for name, value in headers]
    if any(name.lower() == "x-injected" for name, _ in headers):
        raise Wrong(f"a header of the client's: {lines}")
    whole = "\n".join(lines).encode("latin-1", "replace") + body
    hidden = [] if sent.unlimited else [HIDDEN]
    page = b"<html" in body
    for text in [*there.leaks(), *hidden]:
        if text.encode() in whole and not said(sent.data, text) and not page:
            raise Wrong(f"the response tells {text!r}: {whole[:500]!r}")
    if status != 200 and body:
        found = json.loads(body)
        if list(found) != ["error"] or list(found["error"]) != ["message", "type", "param", "code"]:
            raise Wrong(f"not an error of OpenAI's shape: {body[:300]!r}")
        if not found["error"]["message"] or len(body) > 3000:
            raise Wrong(f"an error of {len(body)} bytes: {body[:300]!r}")


def said(data: bytes, text: str) -> bool:
    return text.encode() in data or text.encode() in data.replace(b"\\/", b"/")


#: Fields that a greedy answer does not depend on.
WITHOUT_EFFECT = {"n", "seed", "stream", "stream_options", "logprobs", "timeout", "user", "top_p", "top_k"}


def check_answer(asked: dict, body: bytes) -> None:
    """A greedy completion of plain texts is that of the engine alone. Any has as many choices as were asked for."""
    prompts, n = asked["prompt"], asked.get("n") or 1
    if not isinstance(prompts, list) or type(prompts[0]) is int:
        prompts = [prompts]
    choices: dict[int, str] = {}
    for found in json_lines(body) if asked.get("stream") else [json.loads(body)]:
        if "error" in found:
            return
        for choice in found["choices"]:
            choices[choice["index"]] = choices.get(choice["index"], "") + choice["text"]
    if sorted(choices) != list(range(len(prompts) * n)):
        raise Wrong(f"choices {sorted(choices)} for {len(prompts)} prompts, n {n}")
    fields = {name for name, value in asked.items() if value is not None} - WITHOUT_EFFECT
    if not fields <= {"model", "prompt", "max_tokens", "temperature", "stop", "echo"} or "temperature" not in fields:
        return
    if asked["temperature"] != 0 or not all(isinstance(prompt, str) for prompt in prompts):
        return
    stop = asked.get("stop") or ()
    for number, prompt in enumerate(prompts):
        stops = (stop,) if isinstance(stop, str) else tuple(stop)
        tenant = None if asked["model"] == "base" else asked["model"]
        alone = answer(Request(prompt, tenant, asked.get("max_tokens") or 16, stop=stops, strip=False))[0].text
        expected = (prompt if asked.get("echo") else "") + alone
        if found := {choices[number * n + i] for i in range(n)} - {expected}:
            raise Wrong(f"prompt {number} of {asked}: {found}, not {expected!r}")


def json_lines(body: bytes) -> list[dict]:
    return [json.loads(line[6:]) for line in body.split(b"\n\n") if line.startswith(b"data: {")]
