"""A client sees the base model and the tenants that its key opens, and of the others not even that they are there."""

import json
from types import SimpleNamespace

import pytest

from para_jax.server.api_keys import Access
from para_jax.server.app import show_model
from para_jax.server.errors import ApiError
from para_jax.server.models import Models

ALL, ANYONE = Access(None, keyed=True), Access()
ACME = Access(frozenset({"acme"}), keyed=True)


class Bank:
    """The names of a bank, and an entry for each but one, which can't be loaded."""

    names = ("acme", "acme2", "globex", "damaged")

    def __contains__(self, name):
        return name in self.names

    def holds(self, name):
        return name == "acme"

    def entry(self, name):
        if name not in self:
            raise ValueError(f"no tenant; it holds {self.names}")
        if name == "damaged":
            raise ValueError("/secret/damaged: no such folder")
        return f"entry of {name}"


@pytest.fixture
def models():
    return Models(Bank(), "org/tiny", {"acme": "runs/acme"})  # pyright: ignore[reportArgumentType]


def refusal(models, name, access):
    with pytest.raises(ApiError) as raised:
        models.resolve(name, access)
    assert (raised.value.status, raised.value.param, raised.value.code) == (404, "model", "model_not_found")
    return raised.value.message


def test_names_are_tenants_or_the_base_model(models):
    assert models.resolve("acme", ANYONE) == ("acme", "entry of acme")
    assert models.resolve("org/tiny", ACME) == models.resolve("base", ACME) == (None, None)
    refusal(models, "Acme", ALL)
    assert refusal(models, "Acme", ANYONE) == "the model 'Acme' does not exist; GET /v1/models lists those there are"
    assert Models(None).resolve("base", ANYONE) == (None, None)


def test_an_adapter_that_can_not_be_loaded_is_the_servers_error_and_its_log_has_the_reason(models, capfd):
    with pytest.raises(ApiError) as raised:
        models.resolve("damaged", ANYONE)
    assert (raised.value.status, raised.value.code) == (500, "adapter_failed")
    assert "damaged" in raised.value.message and "/secret" not in raised.value.message
    assert "/secret/damaged" in capfd.readouterr().err
    refusal(models, "damaged", ACME)


def test_a_model_is_shown_without_loading_its_adapter(models):
    def shown(name, access):
        request = SimpleNamespace(path_params={"name": name}, state=SimpleNamespace(access=access))
        return json.loads(bytes(show_model(models, request).body))["id"]  # pyright: ignore[reportArgumentType]

    assert [shown(name, ALL) for name in ("damaged", "base", "acme")] == ["damaged", "org/tiny", "acme"]
    with pytest.raises(ApiError, match="does not exist"):
        shown("damaged", ACME)


def test_an_adapter_that_is_not_held_is_loaded_for_who_may_use_it(models):
    assert models.must_load("globex", ALL) and not models.must_load("acme", ALL)
    assert not any(models.must_load(name, ACME) for name in ("globex", "base", "org/tiny", "nobody"))
    assert not Models(None).must_load("acme", ANYONE)


def test_a_tenant_of_another_key_looks_like_an_unknown_one(models):
    assert refusal(models, "globex", ACME).replace("globex", "X") == refusal(models, "glubex", ACME).replace(
        "glubex", "X"
    )


def test_the_nearest_names_are_for_holders_of_a_key_and_are_its_own(models):
    assert "acme2" in refusal(models, "acme3", ALL)
    assert "acme" in refusal(models, "acme2", ACME) and "the nearest are acme" in refusal(models, "acme3", ACME)
    assert "acme2" not in refusal(models, "acme3", ACME)
    assert "nearest" not in refusal(models, "acme3", ANYONE)
    assert "\n" not in refusal(models, "acme3\n" + "x" * 10_000, ALL)


def test_the_list_has_the_base_and_each_tenant_with_its_source(models):
    base, acme = models.listed(ACME)
    assert (base["id"], base["parent"]) == ("org/tiny", None)
    assert (acme["id"], acme["parent"], acme["root"], acme["object"]) == ("acme", "org/tiny", "runs/acme", "model")
    assert [one["id"] for one in models.listed(ALL)] == ["org/tiny", *Bank.names]
    assert models.card("globex")["root"] == "globex"


def test_a_source_is_known_from_when_it_is_added_until_it_is_removed(models):
    models.note("globex", "runs/globex")
    assert (
        models.card("globex")["root"] == "runs/globex"
        and models.card("globex")["created"] >= models.card(None)["created"]
    )
    models.forget("globex")
    assert models.card("globex")["root"] == "globex"


def test_a_tenants_name_can_be_written_as_json():
    """A folder's name need not be UTF-8: Python gives b"caf\\xe9" as "caf\\udce9"."""

    class Latin(Bank):
        names = ("caf\udce9",)

    with pytest.raises(ValueError, match="the tenant .*caf"):
        Models(Latin(), "base")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["base", "acme"])
def test_a_tenant_cannot_have_a_name_of_the_base_model(name):
    class Taken(Bank):
        names = (name,)

    with pytest.raises(ValueError, match=name):
        Models(Taken(), "acme")  # pyright: ignore[reportArgumentType]
