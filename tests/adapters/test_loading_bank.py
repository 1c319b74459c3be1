"""A bank that loads adapters when they are asked for gives what one that holds them all gives."""

from concurrent.futures import ThreadPoolExecutor
from threading import Event

import jax
import numpy as np
import pytest
from golden_models import FIXTURES, strong

from para_jax import AdapterBank, Ia3Config, LoraConfig, ParaConfig, init_adapter, load_adapter, save_adapter
from para_jax.adapters import loading_bank
from para_jax.adapters.loading_bank import LoadingBank, bank_of
from para_jax.adapters.preview import previews
from para_jax.backbone.load import load_model_config
from para_jax.server.api_keys import Access
from para_jax.server.errors import ApiError
from para_jax.server.models import Models

CONFIGS = [ParaConfig(r=4), LoraConfig(r=2), Ia3Config(target_modules=("q_proj", "v_proj")), ParaConfig(r=2)]
NAMES = ["a", "b", "c", "d"]


@pytest.fixture(scope="module")
def found(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("loading")
    for i, (name, own) in enumerate(zip(NAMES, CONFIGS, strict=True)):
        save_adapter(strong(init_adapter(own, config), i, 0.3), folder / name)
    return dict(zip(NAMES, previews([str(folder / name) for name in NAMES], config), strict=True))


@pytest.fixture(scope="module")
def alike(config, tmp_path_factory):
    """Adapters of one size."""
    folder = tmp_path_factory.mktemp("alike")
    for i, name in enumerate(NAMES):
        save_adapter(strong(init_adapter(ParaConfig(r=2, late_r=5), config), i, 0.3), folder / name)
    return dict(zip(NAMES, previews([str(folder / name) for name in NAMES], config), strict=True))


@pytest.fixture(scope="module")
def config():
    return load_model_config(FIXTURES / "llama")


def loading(found, config, most):
    """A bank with room for the `most` largest adapters, and the names that it loads."""
    loads, sizes = [], sorted((one.nbytes for one in found.values()), reverse=True)

    def load(name):
        loads.append(name)
        return load_adapter(found[name].place, config)

    return bank_of(found, config, load, sum(sizes[:most])), loads


def test_a_small_bank_is_an_ordinary_one(found, config):
    bank, loads = loading(found, config, 4)
    assert type(bank) is AdapterBank and loads == NAMES and bank.names == tuple(NAMES)
    assert [entry.nbytes for entry in bank.entries] == [one.nbytes for one in found.values()]
    assert bank.identities() == loading(found, config, 1)[0].identities()
    bank.replace("a", load_adapter(found["d"].place, config))
    assert bank.identities()[0] == ("a", bank.entry("a").content)
    bank.remove("b")
    bank.add("b", load_adapter(found["d"].place, config))
    assert bank.identities()[-1] == ("b", bank.entry("b").content)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_an_adapter_is_loaded_when_it_is_asked_for_and_the_least_recently_used_leave(alike, config, most):
    bank, loads = loading(alike, config, most)
    size = alike["a"].nbytes
    assert loads == [] and bank.names == tuple(NAMES) and "d" in bank and "e" not in bank
    assert str(bank).startswith(f"4 tenants, {4 * size / 1e6:.1f} MB") and f"{most * size / 1e6:.1f} MB of them" in str(
        bank
    )
    bank.entry("a")
    kept = bank.entry("a")
    assert loads == ["a"]
    for name in "bcad":
        entry = bank.entry(name)
        assert len(bank) <= most and bank.nbytes <= most * size and bank.entry(name).version == entry.version
    assert bank.entry("a").content == kept.content
    assert loads == {1: [*"abcada"], 2: [*"abcad"], 3: [*"abcd"]}[most]  # with 3, the first to come was used since
    with pytest.raises(ValueError, match="'e'.*a, b, c"):
        bank.entry("e")


def test_the_tenants_of_a_bank_that_loads_stay_the_same(found, config):
    """A replaced adapter would come back once the new one had left the memory."""
    bank, _ = loading(found, config, 1)
    before, adapter = bank.entry("a").content, load_adapter(found["d"].place, config)
    for change in (lambda: bank.replace("a", adapter), lambda: bank.add("e", adapter), lambda: bank.remove("a")):
        with pytest.raises(ValueError, match="'[ae]'.* stay the same; make another bank"):
            change()
    assert bank.names == tuple(NAMES) and bank.entry("b") and bank.entry("a").content == before
    assert bank.identities() == [(name, one.digest) for name, one in found.items()]


def test_rows_are_those_of_a_bank_that_holds_everything(found, config):
    bank, _ = loading(found, config, 1)
    whole, _ = loading(found, config, 4)
    rows, expected = (one.rows(["b", None, "a", "d"]) for one in (bank, whole))
    assert jax.tree.structure(rows) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, rows, expected)


def test_an_adapter_that_can_not_be_loaded_is_an_error_of_its_own_tenant(found, config):
    def load(name):
        if name == "b":
            raise ValueError("b is damaged")
        return load_adapter(found[name].place, config)

    bank = LoadingBank.of(found, config, load, 0)
    with pytest.raises(ValueError, match="b is damaged"):
        bank.entry("b")
    assert bank.entry("a").method == "para"
    assert bank.identities() == [(name, one.digest) for name, one in found.items()]


def test_a_request_to_an_adapter_that_is_held_does_not_wait_for_one_that_is_loading(found, config):
    begun, go_on = Event(), Event()

    def load(name):
        if name == "b":
            begun.set()
            assert go_on.wait(60)
        return load_adapter(found[name].place, config)

    bank = LoadingBank.of(found, config, load, found["b"].nbytes + max(found["a"].nbytes, found["c"].nbytes))
    held = bank.entry("a")
    with ThreadPoolExecutor(2) as pool:
        try:
            slow = [pool.submit(bank.entry, "b") for _ in range(2)]
            assert begun.wait(60)
            assert bank.entry("a") is held and not slow[0].done()
            assert bank.holds("a") and not bank.holds("b") and "b" in bank
        finally:
            go_on.set()
        assert slow[0].result() is slow[1].result()
    bank.entry("c")
    assert list(bank._entries) == ["b", "c"]


def test_a_bank_is_crowded_while_requests_hold_many_adapters_of_it(alike, config, monkeypatch):
    """They may wait for long, so without a limit a burst over many tenants would fill the memory."""
    monkeypatch.setattr(loading_bank, "FEWEST", 2)
    bank, _ = loading(alike, config, 1)
    held = [bank.entry(name) for name in "ab"]
    assert bank.crowded and len(bank) == 1
    del held[0]
    assert not bank.crowded
    held.append(bank.entry("c"))
    assert bank.crowded
    bank.memory = 2 * bank.largest  # room for four, and two are held
    assert not bank.crowded
    bank.memory = bank.largest
    models = Models(bank, "base", [])
    with pytest.raises(ApiError) as refused:
        models.resolve("d", Access())
    assert refused.value.status == 429 and models.resolve("c", Access())[1] is held[-1]
    held.clear()
    bank.entry("d")
    assert not bank.crowded
