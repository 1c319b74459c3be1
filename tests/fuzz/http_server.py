"""A server with a tenant that the client may use and one that it must never hear of, in a thread of this process."""

import http.client
import json
import logging
import os
import socket
import threading
import time
from functools import cache
from pathlib import Path

from golden_models import backbone, strong

import para_jax
from para_jax import AdapterBank, Engine, Ia3Config, init_adapter, save_adapter, serve
from para_jax.server.answering import Limits
from para_jax.server.api_keys import ApiKeys
from para_jax.server.connections import BoundedProtocol

from . import serving
from .cases import Wrong, is_control, shared_folder
from .runner import SECRET

#: What a limited client must never see, the key that it has, and the key of everything.
HIDDEN, LIMITED, UNLIMITED = "hidden-globex", "sk-limited", "sk-unlimited"
#: Seconds after which the server gives up a request that does not come, and in which it must be at rest again.
LATE_SECONDS, REST_SECONDS = 0.3, 10
#: Threads that serving may add: the server's own pool, asyncio's for updates and Starlette's for /metrics.
MOST_THREADS = 4 + 40 + 40


class Log(logging.Handler):
    """Keeps what the server logs since a case began."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class Server:
    def __init__(self):
        self.root = shared_folder() / "http" / "adapters"
        self.outside = self.root.parent / "outside"
        model, self.log = backbone("llama"), Log()
        fresh = init_adapter(Ia3Config(target_modules=("v_proj",)), model.config)
        self.bank = AdapterBank(model.config, max_r=4, sites=serving.SITES)
        self.bank.add("A", serving.adapters()["A"])
        self.bank.add(HIDDEN, strong(fresh, 9))
        self.before = {name: self.bank.entry(name).content for name in self.bank.names}
        for i, folder in enumerate((self.root / "mine", self.root / "other", self.outside)):
            save_adapter(strong(fresh, i), folder)
        (self.root / "link").symlink_to(self.outside)
        options = {"queue_limit": 16, "queue_limit_per_tenant": 8, "max_logprobs": 3}
        self.engine = Engine(model, self.bank, serving.tokenizer(), slots=3, max_length=serving.LENGTH, **options)
        BoundedProtocol.header_seconds = BoundedProtocol.body_seconds = LATE_SECONDS
        self._start()
        self._warm()
        self.files = len(os.listdir("/proc/self/fd"))
        self.threads = threading.active_count()

    def _start(self) -> None:
        ready, urls = threading.Event(), []
        options = {
            "port": 0,
            "api_keys": ApiKeys([f"{LIMITED} A", UNLIMITED]),
            "adapter_root": self.root,
            "limits": Limits(max_body=2**18, body_seconds=LATE_SECONDS, timeout=5),
            "on_ready": lambda url: (urls.append(url), ready.set()),
        }
        logging.getLogger("para_jax").addHandler(self.log)
        logging.getLogger("para_jax").setLevel(logging.INFO)
        threading.Thread(target=lambda: serve(self.engine, **options), daemon=True).start()
        assert ready.wait(120)
        self.port = int(urls[0].rpartition(":")[2])

    def _warm(self) -> None:
        """Opens what the server keeps open: the process of the chat template, for one."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        body = json.dumps({"model": "A", "messages": [{"role": "user", "content": "w20"}], "max_tokens": 1})
        headers = {"content-type": "application/json", "authorization": f"Bearer {UNLIMITED}"}
        connection.request("POST", "/v1/chat/completions", body, headers)
        assert connection.getresponse().status == 200
        connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=8)

    def require_sane(self) -> None:
        """Raises Wrong unless the server answers, has forgotten the case, and logged it as a case should be."""
        self.require_rest()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=8)
        for path in ("/health", "/ready"):
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            if response.status != 200:
                raise Wrong(f"afterwards {path} is {response.status}")
        connection.close()
        lines, self.log.lines = self.log.lines, []
        for line in lines:
            if "Traceback" in line or any(map(is_control, line)) or "\n" in line:
                raise Wrong(f"logged {line[-700:]!r}")

    def require_rest(self) -> None:
        until = time.monotonic() + REST_SECONDS
        while problem := self._unrest():
            if time.monotonic() > until:
                raise Wrong(f"not at rest after {REST_SECONDS} s: {problem}")
            time.sleep(0.002)

    def _unrest(self) -> str:
        engine, files = self.engine, len(os.listdir("/proc/self/fd"))
        if engine.open or engine.running or engine.waiting:
            return f"{engine.open} open, {engine.running} hold slots, {engine.waiting} wait"
        if threading.active_count() > self.threads + MOST_THREADS:
            return f"{threading.active_count()} threads"
        return f"{files} files, {self.files} before" if files > self.files + 1 else ""

    def restore_tenants(self) -> dict[str, str]:
        """Puts the bank back as it was. Returns the contents that were loaded."""
        loaded = {}
        for name in self.bank.names:
            content = self.bank.entry(name).content
            if name not in self.before:
                loaded[name] = content
                self.bank.remove(name)
            elif content != self.before[name]:
                raise Wrong(f"{name!r} has another adapter now")
        if gone := set(self.before) - set(self.bank.names):
            raise Wrong(f"{gone} were unloaded")
        return loaded

    def inside(self) -> dict[str, str]:
        """The contents that may be loaded, by folder."""
        if not hasattr(self, "_inside"):
            bank = AdapterBank(backbone("llama").config, max_r=4, sites=serving.SITES)
            self._inside = {}
            for name in ("mine", "other"):
                bank.add(name, self.root / name)
                self._inside[name] = bank.entry(name).content
        return self._inside

    def leaks(self) -> list[str]:
        """What no response may hold, unless the client said it."""
        places = [str(self.root), str(self.root.parent), str(Path(para_jax.__file__).parent), "site-packages"]
        return [*places, "Traceback", ".py", SECRET[1], "site_packages", UNLIMITED, "0x7f"]


@cache
def server() -> Server:
    return Server()
