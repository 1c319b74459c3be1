"""The page shows a client its own tenants, as text, and its playground gives the engine's answers."""

import json
import re
import shutil
import threading
import time
import urllib.request
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
from golden_models import backbone, strong
from starlette.applications import Starlette
from starlette.testclient import TestClient
from tiny_engine import SITES
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from para_jax import AdapterBank, Engine, ParaConfig, Request, init_adapter
from para_jax.server import page
from para_jax.server.api_keys import Access
from para_jax.server.config import ServerConfig
from para_jax.server.page import ROWS
from para_jax.server.serve import serve
from para_jax.server.traffic import OTHER, Outcome, Traffic

ALL = Access()


def models_of(*names):
    visible = lambda access: [name for name in names if access.may_use(name)]  # noqa: E731
    return SimpleNamespace(base="the-base", visible=visible, has=names.__contains__)


def engine_with(running=None, waiting=None):
    cache = SimpleNamespace(queries=10, hits=5)
    return SimpleNamespace(running=running or {}, waiting=waiting or {}, slots=4, kv_usage=0.5, prefix_cache=cache)


def traffic_of(known, tokens, limit=1000):
    traffic = Traffic(known, limit)
    for name, new in tokens.items():
        outcome = Outcome("POST", "/", "id", served=True, tenant=name)
        traffic.begin(outcome)
        outcome.note_piece(0, 0.0, new, "stop")
        traffic.end(outcome)
    return traffic


def test_the_policy_allows_the_files_of_the_page_and_nothing_from_elsewhere():
    known = models_of()
    with TestClient(Starlette(routes=page.routes(engine_with(), known, Traffic(known)))) as client:
        html, css, js = (client.get(path) for path in ("/", "/page.css", "/page.js"))
    for response, kind in ((html, "text/html"), (css, "text/css"), (js, "text/javascript")):
        assert response.status_code == 200 and response.headers["content-type"].startswith(kind)
        policy = dict(part.strip().split(" ", 1) for part in response.headers["content-security-policy"].split(";"))
        assert policy["default-src"] == "'self'" and "unsafe" not in str(policy)
        assert policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    foreign = r"https?://(?!www\.w3\.org/2000/svg)|innerHTML|insertAdjacentHTML|document\.write|eval\("
    assert not re.search(foreign, html.text + css.text + js.text)
    assert not re.search(r"<[a-z][^>]*\s(style|on[a-z]+)=|<script>|<style>", html.text)  # the policy would block them


def test_the_base_model_comes_first_and_then_the_most_active_tenants():
    names = [f"t{i:03}" for i in range(ROWS + 20)]
    known = models_of(*names)
    traffic = traffic_of(known, {None: 3, "t010": 7, "t011": 9})
    found = page.state(engine_with({"t069": 1}, {None: 2}), known, traffic, ALL)
    rows = [(row["name"], row["requests"], row["running"], row["waiting"], row["new_tokens"]) for row in found["rows"]]
    assert rows[:4] == [(None, 1, 0, 2, 3), ("t011", 1, 0, 0, 9), ("t010", 1, 0, 0, 7), ("t000", 0, 0, 0, 0)]
    assert rows[-1] == ("t069", 0, 1, 0, 0) and len(rows) == 1 + ROWS and found["found"] == len(names)
    engine = found["engine"]
    assert (engine["running"], engine["waiting"], engine["new_tokens"], engine["requests"]) == (1, 2, 19, 3)
    json.dumps(found)
    searched = page.state(engine_with(), known, traffic, ALL, "T06")
    assert [row["name"] for row in searched["rows"]] == [None, *(f"t06{i}" for i in range(10))]


def test_a_limited_key_learns_of_its_own_tenants_alone():
    known = models_of("a", "b")
    traffic, engine = traffic_of(known, {None: 3, "a": 7, "b": 9}), engine_with({"b": 1, None: 1}, {"b": 2, "a": 1})
    found = page.state(engine, known, traffic, Access(frozenset({"a"}), keyed=True))
    own = {"name": "a", "running": 0, "waiting": 1, "requests": 1, "prompt_tokens": 0, "new_tokens": 7}
    assert found["rows"][1:] == [own] and found["engine"] is None and found["found"] == 1
    assert {value for name, value in found["rows"][0].items()} == {None}


def test_counts_that_may_be_among_the_others_are_unknown():
    known = models_of("a", "b")
    traffic = traffic_of(known, {"a": 1, "b": 1}, limit=1)
    rows = {row["name"]: row["new_tokens"] for row in page.state(engine_with(), known, traffic, ALL)["rows"]}
    assert OTHER in traffic.by_tenant() and rows == {None: 0, "a": 1, "b": None}


# ----------------------------------------------------------------------------------------------------------- a browser

NAMES = ('<img src=x onerror="window.harmed=1">', "</script><script>window.harmed=1</script>", "a & b")
PROMPT, KEY = "<b>30</b> <b>41</b> <b>52</b>", "right-key"


def html_tokenizer():
    """Each token's text is HTML."""
    words = ["<pad>", "<s>", "</s>"] + [f"<b>{i}</b>" for i in range(3, 256)]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.decoder = decoders.Metaspace(replacement="|")
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


@contextmanager
def served(engine, folder):
    """The URL of a server with a key."""
    file = folder / "keys"
    file.write_text(KEY)
    stop, ready, urls = threading.Event(), threading.Event(), []

    def on_ready(url):
        urls.append(url)
        ready.set()

    config = ServerConfig(port=0, served_model_name="the-base", api_key_file=str(file))
    notices = {"stop": stop, "on_ready": on_ready}
    thread = threading.Thread(target=serve, args=(engine, config), kwargs=notices, daemon=True)
    thread.start()
    try:
        assert ready.wait(120)
        yield urls[0]
    finally:
        stop.set()
        thread.join(60)


@contextmanager
def chromium(width, height):
    """A browser with a page of this size."""
    webdriver = pytest.importorskip("selenium.webdriver")
    programs = shutil.which("chromium"), shutil.which("chromedriver")
    if None in programs:
        pytest.skip("there is no chromium with its chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", f"--window-size={width},{height}"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(programs[1]))
    try:
        yield browser
    finally:
        browser.quit()


class Page:
    """What a person does and sees."""

    def __init__(self, browser):
        self.browser = browser

    def all(self, css):
        return self.browser.find_elements("css selector", css)

    def one(self, css):
        return self.browser.find_element("css selector", css)

    def texts(self, css):
        script = "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent)"
        return self.browser.execute_script(script, css)

    def until(self, question, seconds=20):
        began = time.monotonic()
        while not (found := question()):
            assert time.monotonic() - began < seconds, self.one("body").text
            time.sleep(0.02)
        return found

    def write(self, id, text):
        self.one(f"#{id}").clear()
        self.one(f"#{id}").send_keys(text)

    def use_key(self, key):
        self.until(lambda: self.one("#key").is_displayed())
        self.write("key", key)
        self.one("#key-form button").click()

    def choose(self, *names):
        """Exactly these tenants; "" is the base model."""
        self.until(lambda: not [chip.click() for chip in self.all("#chosen button")[:1]])
        for name in names:
            script = (
                "return [...document.querySelectorAll('#rows input')].find((box) => box.dataset.id === arguments[0])"
            )
            self.until(lambda: self.browser.execute_script(script, name)).click()  # noqa: B023


@pytest.mark.long
def test_a_browser_shows_text_as_text_and_streams_answers_side_by_side(tmp_path):
    model = backbone("llama")
    bank = AdapterBank(model.config, max_r=4, sites=SITES, capacity=200)
    for i, name in enumerate([*NAMES, *(f"tenant-{i:02}" for i in range(ROWS + 10))]):
        bank.add(name, strong(init_adapter(ParaConfig(r=4), model.config), i % 4, 0.3))
    engine = Engine(model, bank, html_tokenizer(), slots=4, max_length=64)
    asked = {name or "the-base": Request(PROMPT, name, 24, strip=False) for name in (None, *NAMES)}
    ids = {engine.submit(request): name for name, request in asked.items()}
    expected = {ids[completion.id]: completion.text for completion in engine.run()}
    assert len(set(expected.values())) == 4 and all(text.startswith("<b>") for text in expected.values())

    with chromium(1300, 900) as browser, served(engine, tmp_path) as url:
        here = Page(browser)
        browser.get(url)
        here.use_key("wrong-key")
        here.until(lambda: "key" in here.one("#key-error").text)
        assert not here.one("#work").is_displayed() and not here.texts("#rows td")
        here.use_key(KEY)
        here.until(lambda: here.one("#work").is_displayed())

        assert len(here.until(lambda: here.texts("#rows tr"))) == 1 + ROWS
        here.write("search", "IMG")
        here.until(lambda: here.texts("#rows label span") == ["base model", NAMES[0]])
        here.one("#search").clear()
        here.write("search", "a")
        here.until(lambda: NAMES[2] in here.texts("#rows label span"))

        def shown():
            return dict(zip(here.texts(".answer h3"), here.texts(".answer .text"), strict=True))

        here.write("search", "")
        here.until(lambda: NAMES[1] in here.texts("#rows label span"))
        here.choose("", *NAMES)
        here.write("prompt", PROMPT)
        here.write("tokens", "24")
        here.one("#send").click()
        here.until(lambda: len(here.all(".answer")) == 4 and not here.all(".answer.live"))
        assert shown() == expected
        for foot in here.texts(".answer footer"):
            assert re.search(r"first token \d+ ms · 24 tokens · [\d,.]+ tokens/s · cut", foot)
        assert not here.all(".text *") and not here.all("#rows img, #chosen img, .answer img")

        step = engine.step
        engine.step = lambda: time.sleep(0.3) or step()
        here.write("tokens", "50")
        here.one("#send").click()
        here.until(lambda: all(here.texts(".answer .text")) and len(here.all(".answer")) == 4)
        here.one("#stop").click()
        here.until(lambda: not here.all(".answer.live"))
        assert all("stopped" in foot for foot in here.texts(".answer footer"))
        assert all(0 < len(text) < 50 * 7 for text in shown().values())
        here.until(lambda: not engine.running)  # the server has cancelled them
        engine.step = step

        here.one("[value=chat]").click()  # this tokenizer has no chat template
        here.one("#send").click()
        here.until(lambda: len(here.texts(".answer .error")) == 4)
        assert "template" in here.texts(".answer .error")[0]

        counted = [json.loads(read(f"{url}/page/state"))["engine"][name] for name in ("requests", "new_tokens")]
        assert counted[0] == 8 and counted[1] >= 4 * 24
        assert browser.execute_script("return window.harmed") is None
        loaded = browser.execute_script("return performance.getEntriesByType('resource').map((one) => one.name)")
        assert loaded and all(one.startswith(url) for one in loaded)
        assert [line for line in browser.get_log("browser") if "status of 40" not in line["message"]] == []

    with served(engine, tmp_path) as url, chromium(390, 844) as browser:  # a phone
        size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        here = Page(browser)
        browser.get(url)
        here.use_key(KEY)
        here.until(lambda: here.texts("#rows tr"))
        assert browser.execute_script("return document.documentElement.scrollWidth") == 390


def read(url):
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {KEY}"})
    return urllib.request.urlopen(request, timeout=10).read()
