"""Tenants come and go over HTTP; nothing else on the machine can be loaded, and no request notices."""

import threading
import time

import pytest
from golden_models import backbone, strong
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.testclient import TestClient
from tiny_engine import SITES, engine_of, prompt

from para_jax import AdapterBank, Ia3Config, LoraConfig, ParaConfig, Request, init_adapter, save_adapter
from para_jax.server import adapter_updates
from para_jax.server.adapter_updates import LOAD, UNLOAD
from para_jax.server.api_keys import ApiKeys
from para_jax.server.gate import Gate
from para_jax.server.metrics import Metrics
from para_jax.server.models import Models

BASE = "the-base"
CONFIGS = {
    "para": ParaConfig(r=4),
    "other": ParaConfig(r=4),
    "ia3": Ia3Config(target_modules=("v_proj", "down_proj")),
    "lora": LoraConfig(r=2, target_modules=("q_proj",)),
    "big": ParaConfig(r=5),
    "sites": ParaConfig(r=2, target_modules=("o_proj",)),
}


@pytest.fixture(scope="module")
def model():
    return backbone("llama")


@pytest.fixture(scope="module")
def root(model, tmp_path_factory):
    """A folder of adapters, next to a secret one."""
    root = tmp_path_factory.mktemp("disk") / "adapters"
    for i, (name, config) in enumerate(CONFIGS.items()):
        save_adapter(strong(init_adapter(config, model.config), i, 0.3), root / name)
    save_adapter(strong(init_adapter(CONFIGS["para"], model.config), 7), root.parent / "secret")
    qwen = backbone("qwen2").config
    save_adapter(init_adapter(CONFIGS["para"], qwen), root / "qwen")
    (root / "empty").mkdir()
    (root / "file").write_text("x")
    (root / "link").symlink_to(root.parent / "secret")
    (root / "inner").symlink_to(root / "para")
    (root / "circle").symlink_to(root / "circle")
    damaged = root / "damaged"
    damaged.mkdir()
    (damaged / "adapter_config.json").write_text('{"peft_type": "PARA"')
    return root


def client_of(bank, root, keys=(), **options):
    models = Models(bank, BASE)
    gate = Middleware(Gate, keys=ApiKeys(list(keys)), metrics=Metrics(None, models))
    app = Starlette(routes=adapter_updates.routes(models, root, **options), middleware=[gate])
    return TestClient(app), models


@pytest.fixture
def bank(model):
    return AdapterBank(model.config, max_r=4, sites=SITES, methods=("para", "ia3", "lora"), capacity=4)


@pytest.fixture
def client(bank, root):
    return client_of(bank, root)[0]


def refused(client, status, *words, path=LOAD, bank=None, **fields):
    """Checks the error, that each word is in it, and that the bank is as it was."""
    before = bank and {name: bank.entry(name).content for name in bank.names}
    response = client.post(path, json=fields)
    error = response.json()["error"]
    assert (response.status_code, [word for word in words if word not in error["message"]]) == (status, []), error
    assert not bank or {name: bank.entry(name).content for name in bank.names} == before
    return error


# ------------------------------------------------------------------------------------------------------ load and unload


@pytest.mark.parametrize("name", ["para", "ia3", "lora"])
def test_an_adapter_is_loaded_and_unloaded(bank, root, name):
    client, models = client_of(bank, root)
    loaded = client.post(LOAD, json={"lora_name": "acme", "lora_path": name, "base_model_name": ""})
    assert loaded.status_code == 200
    found = loaded.json()
    assert found["message"] == "Success: LoRA adapter 'acme' added successfully."  # vLLM's text
    assert (found["method"], found["replaced"]) == (name, False)
    assert found["content_sha256"] == bank.entry("acme").content
    assert models.card("acme")["root"] == name and models.card("acme")["parent"] == BASE
    gone = client.post(UNLOAD, json={"lora_name": "acme"})
    assert gone.json()["message"] == "Success: LoRA adapter 'acme' removed successfully."
    assert gone.status_code == 200 and bank.names == ()
    refused(client, 404, "acme", path=UNLOAD, lora_name="acme")


def test_a_loaded_name_is_replaced_only_in_place(client, bank):
    assert client.post(LOAD, json={"lora_name": "acme", "lora_path": "para"}).status_code == 200
    before = bank.entry("acme").content
    refused(client, 400, "acme", "load_inplace", bank=bank, lora_name="acme", lora_path="other")
    replaced = client.post(LOAD, json={"lora_name": "acme", "lora_path": "other", "load_inplace": True}).json()
    assert replaced["replaced"] and replaced["content_sha256"] == bank.entry("acme").content != before
    new = client.post(LOAD, json={"lora_name": "new", "lora_path": "other", "load_inplace": True}).json()
    assert not new["replaced"] and bank.names == ("acme", "new")


def test_what_the_bank_cannot_take_changes_nothing(client, bank):
    client.post(LOAD, json={"lora_name": "acme", "lora_path": "para"})
    cases = {"empty": "adapter_config.json", "big": "r 5", "sites": "o_proj", "qwen": "backbone", "damaged": "JSON"}
    for path, word in cases.items():
        for fields in ({"lora_name": "new"}, {"lora_name": "acme", "load_inplace": True}):
            error = refused(client, 400, word, bank=bank, lora_path=path, **fields)
            assert error["param"] == "lora_path"
    for name in ("b", "c", "d"):
        assert client.post(LOAD, json={"lora_name": name, "lora_path": "para"}).status_code == 200
    refused(client, 400, "full", "4", bank=bank, lora_name="e", lora_path="para")


def test_a_method_that_the_bank_was_not_made_for_is_refused(model, root):
    bank = AdapterBank(model.config, max_r=4, sites=SITES)
    refused(client_of(bank, root)[0], 400, "LoRA", bank=bank, lora_name="a", lora_path="lora")
    few = AdapterBank(model.config, max_r=4)
    needed = "sites=('q_proj', 'v_proj', 'o_proj', 'up_proj')"
    refused(client_of(few, root)[0], 400, needed, lora_name="a", lora_path="sites")
    refused(client_of(None, root)[0], 400, "base model", lora_name="a", lora_path="lora")


@pytest.mark.parametrize("name", ["a,b", "a\nb", " a", "x" * 129, BASE, 7])
def test_names_that_are_not_safe_are_refused(client, bank, name):
    assert refused(client, 400, bank=bank, lora_name=name, lora_path="para")["param"] == "lora_name"


@pytest.mark.parametrize("base", [BASE, "base", "", None])
def test_both_names_of_the_base_model_are_taken(client, bank, base):
    assert client.post(LOAD, json={"lora_name": "a", "lora_path": "para", "base_model_name": base}).status_code == 200


def test_fields_are_checked_by_name(client, bank):
    fields = {"lora_name": "a", "lora_path": "para"}
    cases = {"load_inplace": "yes", "base_model_name": "another", "is_3d_lora_weight": True, "lora_nam": "x"}
    for name, value in cases.items():
        assert refused(client, 400, bank=bank, **fields, **{name: value})["param"] == name
    assert refused(client, 400, "lora_path", lora_name="a")["param"] == "lora_path"
    assert refused(client, 400, path=UNLOAD, lora_name="a", lora_int_id=3)["param"] == "lora_int_id"
    as_text = client.post(LOAD, content=b'{"lora_name": "a", "lora_path": "para"}')
    assert as_text.status_code == 415 and bank.names == ()
    assert client.post(LOAD, json={"lora_name": "a", "lora_path": "x" * 2**17}).status_code == 413


# --------------------------------------------------------------------------------------------------------------- paths


def test_paths_lead_into_the_root_alone(client, bank, root):
    good = ["para", "./para", "para/", "inner", str(root / "para"), "other/../para", f"{root}/../adapters/para"]
    contents = set()
    for path in good:
        assert (found := client.post(LOAD, json={"lora_name": "a", "lora_path": path, "load_inplace": True})).is_success
        contents.add(found.json()["content_sha256"])
    assert len(contents) == 1
    secret = root.parent / "secret"
    outside = ["../secret", str(secret), "link", "para/../../secret", f"{root}/../secret", f"{root}/link"]
    outside += [".", "..", "/", "circle", "pa\0ra", "x" * 4000]
    for path in outside:
        error = refused(client, 400, bank=bank, lora_name="b", lora_path=path)
        assert error["param"] == "lora_path" and str(root) not in error["message"].replace(path, "")
    for path in ("~", "~root", "gs://bucket/adapter", "file:///etc", "https://x/y", "\\\\x", "file", "nothing/here"):
        refused(client, 404, bank=bank, lora_name="b", lora_path=path)


def test_the_same_answer_for_what_is_outside_whether_it_is_there_or_not(client, root):
    there = refused(client, 400, lora_name="b", lora_path=str(root.parent / "secret"))
    missing = refused(client, 400, lora_name="b", lora_path=str(root.parent / "sesame"))
    assert there["message"].replace("secret", "") == missing["message"].replace("sesame", "")


def test_hub_ids_need_to_be_allowed_and_are_never_a_folder_here(bank, root, monkeypatch, tmp_path):
    asked = []

    def add(bank, name, source):
        asked.append(source)
        raise ValueError("the hub does not answer")

    monkeypatch.setattr(AdapterBank, "add", add)
    refused(client_of(bank, root)[0], 404, lora_name="a", lora_path="user/name")
    client = client_of(bank, root, allow_hub=True)[0]
    refused(client, 400, "hub", lora_name="a", lora_path="user/name@v1")
    assert asked == ["user/name@v1"]
    (tmp_path / "user").mkdir()
    monkeypatch.chdir(tmp_path)
    refused(client, 404, lora_name="a", lora_path="user/name")
    refused(client, 400, lora_name="a", lora_path="../secret")


def test_a_root_that_is_missing_is_refused(bank, root):
    with pytest.raises(OSError, match="nothing"):
        adapter_updates.routes(Models(bank), root / "nothing")


# ---------------------------------------------------------------------------------------------------------------- keys


def test_only_an_unlimited_key_may_update(bank, root):
    client, _ = client_of(bank, root, keys=["all", "some acme"])
    fields = {"lora_name": "acme", "lora_path": "para"}
    for key, status in {"": 401, "wrong": 401, "some": 403, "all": 200}.items():
        headers = {"authorization": f"Bearer {key}"} if key else {}
        assert client.post(LOAD, json=fields, headers=headers).status_code == status
        if status != 200:
            assert bank.names == ()
    for path in ("nothing", "../secret", "para"):  # a limited key learns nothing about the disk
        found = client.post(LOAD, json=fields | {"lora_path": path}, headers={"authorization": "Bearer some"})
        assert found.json()["error"]["code"] == "limited_key"


# ------------------------------------------------------------------------------------------------- requests that decode


@pytest.mark.long
def test_requests_that_decode_end_with_the_adapter_that_they_began_with(model, bank, client):
    engine = engine_of(model, bank)
    client.post(LOAD, json={"lora_name": "a", "lora_path": "para"})

    def alone(path):
        client.post(LOAD, json={"lora_name": "a", "lora_path": path, "load_inplace": True})
        return tokens(engine, start(engine))

    def start(engine, seed=1):
        return engine.open_stream(Request(prompt(seed), "a", max_new_tokens=24, temperature=1.0, seed=5))

    def tokens(engine, stream):
        return [token for piece in stream for token in piece.tokens]

    second, first = alone("other"), alone("para")
    assert first != second and len(first) == 24
    begun = start(engine)
    for _ in range(2):
        engine.step()
    queued = [start(engine) for _ in range(3)]  # the slots are full: the last of them waits
    begun_tokens = [token for piece in begun.take() for token in piece.tokens]
    assert 0 < len(begun_tokens) < 24
    client.post(LOAD, json={"lora_name": "a", "lora_path": "other", "load_inplace": True})
    after = start(engine)
    engine.step()
    assert client.post(UNLOAD, json={"lora_name": "a"}).status_code == 200
    with pytest.raises(ValueError, match="'a'"):
        start(engine)
    assert begun_tokens + tokens(engine, begun) == first
    assert [tokens(engine, one) for one in queued] == [first] * 3
    assert tokens(engine, after) == second


def test_updates_while_another_thread_drives_change_no_answer(model, bank, client):
    engine, stop = engine_of(model, bank), threading.Event()

    def drive():
        while not stop.is_set():
            if engine.wait(0.01):
                engine.step()

    thread = threading.Thread(target=drive, daemon=True)
    thread.start()
    contents, answers = {}, {}
    for path in ("para", "other"):
        client.post(LOAD, json={"lora_name": "b", "lora_path": path, "load_inplace": True})
        contents[path] = bank.entry("b").content
    try:
        for i in range(12):
            client.post(LOAD, json={"lora_name": "b", "lora_path": ("para", "other")[i % 2], "load_inplace": True})
            entry = bank.entry("b")
            stream = engine.open_stream(Request(prompt(2), "b", max_new_tokens=12), entry=entry)
            if i % 3 == 0:
                client.post(UNLOAD, json={"lora_name": "b"})
            found = []
            while not stream.ended:
                assert thread.is_alive(), "the engine's thread has ended"
                found += [token for piece in stream.take() for token in piece.tokens]
                time.sleep(0.001)
            answers.setdefault(entry.content, set()).add(tuple(found))
    finally:
        stop.set()
        thread.join(60)
    assert set(answers) == set(contents.values())
    assert [len(found) for found in answers.values()] == [1, 1] and len(set.union(*answers.values())) == 2
