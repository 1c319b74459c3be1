"""The two borders: what comes over HTTP and what comes from a hub is refused by a ValueError, or is what it says."""

import json
import shutil
from copy import deepcopy
from functools import cache

import httpx
import numpy as np
import pytest
from golden_models import FAMILIES, FIXTURES, backbone, strong
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_server import new_engine, running
from tiny_gguf import byte_level_gguf, write_gguf
from tiny_tokenizers import plain

from para_jax import Ia3Config, LoraConfig, ParaConfig, init_adapter, load_adapter, load_backbone, save_adapter
from para_jax.adapters.adapter import named_leaves
from para_jax.backbone.load import load_model_config
from para_jax.data.examples import encode_prompt
from para_jax.data.tokenizer import load_tokenizer

TEXTS = (
    "",
    "\0",
    "\x1b]0;owned\x07",
    "a" * 6000,
    "日本語",
    "../../x",
    "/etc/passwd",
    "${oc.env:HOME}",
    "1e9",
    "q_proj",
    "A",
)
NUMBERS = (0, 1, -1, 3, 1000, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308, float("nan"), float("inf"))
SCALARS = st.sampled_from((*TEXTS, *NUMBERS, None, True, False))
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(TEXTS), inner)
)
QUICK = settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))


def places(tree):
    """Every (container, key) in a tree of dictionaries and lists."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)) if isinstance(tree, list) else ():
        yield tree, key
        yield from places(tree[key])


@st.composite
def changed(draw, tree):
    """The tree with one or two of its values removed or replaced, or with a field more."""
    made = deepcopy(tree)
    for _ in range(draw(st.integers(1, 2))):
        node, key = draw(st.sampled_from(list(places(made)) or [({}, "x")]))
        change = draw(st.sampled_from(("replace", "replace", "remove", "add")))
        if change == "replace":
            node[key] = draw(VALUES)
        elif change == "remove":
            node.pop(key, None) if isinstance(node, dict) else node.pop(key)
        elif isinstance(node, dict):
            node[draw(st.sampled_from(TEXTS))] = draw(VALUES)
    return made


@st.composite
def damaged(draw, data):
    """The bytes with some flipped near the header or anywhere, cut off or inserted."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, min(len(made) - 1, 300)) | st.integers(0, len(made) - 1))
        change = draw(st.sampled_from(("flip", "flip", "insert", "cut")))
        if change == "flip":
            made[at] ^= 1 << draw(st.integers(0, 7))
        elif change == "insert":
            made[at:at] = draw(st.binary(min_size=1, max_size=8))
        else:
            del made[max(at, 1) :]
    return bytes(made)


def refused_or(load):
    """What it loads; None where it is refused with an error that can be shown."""
    try:
        return load()
    except (ValueError, OSError) as error:
        assert str(error) and len(str(error)) < 4000 and "\x1b" not in str(error)
        return None


# ---------------------------------------------------------------------------------------------------------------- HTTP


CHAT = {"model": "A", "messages": [{"role": "user", "content": "w30 w31"}], "max_tokens": 3, "n": 2, "stop": ["w9"]}
TEXT = {"model": "A", "prompt": ["w20 w21"], "max_tokens": 3, "temperature": 0, "logprobs": 1, "echo": True, "seed": 4}
LOAD = {"lora_name": "new", "lora_path": "../outside", "load_inplace": False}
PATHS = {"/v1/chat/completions": CHAT, "/v1/completions": TEXT, "/v1/load_lora_adapter": LOAD}


@pytest.fixture(scope="module")
def server():
    with running(new_engine()) as made:
        yield made


@pytest.mark.parametrize("path", PATHS)
def test_a_request_is_answered_or_refused_in_openais_shape_and_costs_nobody_else(server, path):
    good = {"model": "A", "prompt": "w20", "max_tokens": 3, "temperature": 0}
    with httpx.Client(base_url=server.url, timeout=60) as client:
        expected = client.post("/v1/completions", json=good).json()["choices"]

        @QUICK
        @given(
            changed(PATHS[path]).map(lambda tree: json.dumps(tree).encode()) | damaged(json.dumps(PATHS[path]).encode())
        )
        def ask(body):
            answer = client.post(path, content=body, headers={"content-type": "application/json"})
            assert answer.status_code in (200, 400, 401, 403, 404, 413, 415, 429), answer.text
            if answer.status_code != 200:
                assert list(answer.json()["error"]) == ["message", "type", "param", "code"] and len(answer.text) < 3000

        ask()
        server.idle()
        assert client.post("/v1/completions", json=good).json()["choices"] == expected


# ------------------------------------------------------------------------------------------------------- files of a hub


ADAPTERS = (ParaConfig(r=4), ParaConfig(r=2, late_r=3, up_bias=True), LoraConfig(r=2, use_rslora=True), Ia3Config())


@pytest.fixture(scope="module", params=ADAPTERS, ids=lambda config: type(config).__name__)
def adapter(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    save_adapter(strong(init_adapter(request.param, backbone("llama").config), 1), folder)
    return folder


@QUICK
@given(data=st.data())
def test_an_adapter_is_refused_or_has_finite_arrays_of_the_backbones_shape(adapter, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("changed") / "adapter"
    shutil.copytree(adapter, folder)
    file = folder / data.draw(st.sampled_from(("adapter_config.json", "adapter_model.safetensors")))
    if file.suffix == ".json" and data.draw(st.booleans()):
        file.write_text(json.dumps(data.draw(changed(json.loads(file.read_text())))))
    else:
        file.write_bytes(data.draw(damaged(file.read_bytes())))
    loaded = refused_or(lambda: load_adapter(folder, backbone("llama").config))
    if loaded is not None:
        assert all(np.isfinite(leaf).all() for leaf in named_leaves(loaded).values())


@QUICK
@given(data=st.data())
def test_a_backbones_config_is_refused_or_read_as_it_says(tmp_path_factory, data):
    folder, family = tmp_path_factory.mktemp("backbone"), data.draw(st.sampled_from(FAMILIES))
    said = data.draw(changed(json.loads((FIXTURES / family / "config.json").read_text())))
    (folder / "config.json").write_text(json.dumps(said))
    config = refused_or(lambda: load_model_config(folder))
    for key, field in {"vocab_size": "vocab_size", "hidden_size": "width", "num_hidden_layers": "num_layers"}.items():
        if config is not None and said.get(key) is not None:
            assert getattr(config, field) == said[key]


@QUICK
@given(data=st.data())
def test_damaged_weights_are_refused_or_load(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("weights")
    shutil.copy(FIXTURES / "llama" / "config.json", folder)
    weights = (FIXTURES / "llama" / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data.draw(damaged(weights)))
    refused_or(lambda: load_backbone(folder))


@cache
def gguf_bytes(folder, write):
    return write(folder / f"{write.__name__}.gguf").read_bytes()


@QUICK
@given(data=st.data())
def test_a_damaged_gguf_file_is_refused_or_loads(tmp_path_factory, data):
    file = tmp_path_factory.mktemp("gguf") / "changed.gguf"
    write, load = data.draw(st.sampled_from(((write_gguf, load_backbone), (byte_level_gguf, load_tokenizer))))
    file.write_bytes(data.draw(damaged(gguf_bytes(tmp_path_factory.getbasetemp(), write))))
    refused_or(lambda: load(file))


#: Templates that fail, or reach out of the sandbox.
TEMPLATES = (
    "{{ 1/0 }}", "{{ 'a' + 1 }}", "{{ messages[5].content }}", "{% break %}", "{{ ''.__class__.__mro__ }}",
    "{{ cycler.__init__.__globals__ }}", "{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{{ none.x }}",
    "{{ raise_exception('\x1b]0;owned\x07' * 50) }}", "{{ '{0.__class__}'.format(1) }}", "{{ '\ud83d' }}", "{{ (",
    "{{ messages.clear() }}", "{{ messages[0].update({'content': 5}) }}", "{% macro m() %}{{ m() }}{% endmacro %}",
)  # fmt: skip


@QUICK
@given(data=st.data())
def test_a_tokenizer_is_refused_or_encodes_and_runs_no_code(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("tokenizer")
    plain().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    files = "tokenizer.json", "tokenizer_config.json", "config.json", "chat_template.jinja"
    file = folder / data.draw(st.sampled_from(files))
    if file.suffix == ".json":
        file.write_text(json.dumps(data.draw(changed(json.loads(file.read_text()) | {"auto_map": {"x": "evil.X"}}))))
        (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')")
    else:
        file.write_bytes(data.draw(st.sampled_from(TEMPLATES)).encode(errors="surrogatepass"))

    def use():
        tokenizer = load_tokenizer(folder)
        ids = encode_prompt(tokenizer, "the lazy dog")
        return ids + (encode_prompt(tokenizer, [{"role": "user", "content": "a"}]) if tokenizer.chat_template else [])

    ids = refused_or(use)
    assert not (folder / "ran").exists() and (ids is None or all(type(id) is int and id >= 0 for id in ids))
