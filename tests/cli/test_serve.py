"""`para-jax serve`: what it says of mistakes, and the bank that it makes."""

import re
import socket
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import jax
import pytest
from golden_models import backbone, strong
from tiny_run import backbone_folder

from para_jax import Ia3Config, LoraConfig, ParaConfig, init_adapter, save_adapter
from para_jax.adapters.preview import previews
from para_jax.cli import main, options, parser, serve
from para_jax.server import config as server_config

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("serve")
    backbone_folder(made / "model")
    return made


def test_a_port_in_use_is_told_before_anything_is_loaded(folder, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "--backbone", str(folder / "model"), "--port", str(port)]) == 2
    assert f"--port {port}" in capsys.readouterr().err


def test_a_missing_package_is_told_with_the_extra(folder, capsys, monkeypatch):
    monkeypatch.setattr(server_config, "find_spec", lambda name: None if name == "uvicorn" else find_spec(name))
    assert main(["serve", "--backbone", str(folder / "model")]) == 2
    said = capsys.readouterr().err
    assert "uvicorn" in said and "para_jax[serve]" in said and "starlette" not in said


def test_the_base_models_name_is_the_folders_or_the_hub_id(folder):
    assert serve.base_name(str(folder / "model")) == "model"
    assert serve.base_name("org/tiny") == "org/tiny" and serve.base_name("smollm2-135m") == "smollm2-135m"


def made_bank(model, sources, **options):
    given = {
        "adapter_root": None,
        "adapter_memory": 1,
        "methods": None,
        "sites": None,
        "max_r": None,
        "capacity": None,
    }
    found = dict(zip(sources, previews(sources.values(), model.config), strict=True))
    return serve.bank_of(SimpleNamespace(**given | options), found, model)


def test_the_bank_fits_its_adapters_and_with_updates_others_too(tmp_path):
    model, sources = backbone("llama"), {}
    for name, config in {
        "para": ParaConfig(r=2, target_modules=("q_proj",)),
        "lora": LoraConfig(r=20, target_modules=("o_proj",)),
    }.items():
        save_adapter(strong(init_adapter(config, model.config)), tmp_path / name, model=model)
        sources[name] = str(tmp_path / name)
    assert made_bank(model, {}) is None
    fitting = made_bank(model, sources)
    assert (fitting.names, fitting.max_r, fitting.capacity) == (("para", "lora"), 20, 2)
    assert set(fitting.methods) == {"para", "lora"} and set(fitting.sites) == {"q_proj", "o_proj"}
    wider = made_bank(model, sources, adapter_root="adapters")
    assert (wider.names, wider.max_r, wider.capacity) == (("para", "lora"), 20, 1024)
    assert set(wider.methods) == {"para", "ia3", "lora"}
    assert set(wider.sites) == {"q_proj", "v_proj", "up_proj", "o_proj"}
    options = {"adapter_root": "adapters", "methods": "ia3", "sites": "k_proj,v_proj", "max_r": 1, "capacity": 3}
    chosen = made_bank(model, {}, **options)
    assert (chosen.methods, set(chosen.sites), chosen.max_r, chosen.capacity) == (("ia3",), {"k_proj", "v_proj"}, 1, 3)
    chosen.add("one", strong(init_adapter(Ia3Config(target_modules=("v_proj",)), model.config)))


def test_adapters_that_need_more_memory_are_loaded_when_they_are_asked_for(tmp_path):
    model, sources = backbone("llama"), {}
    for i, name in enumerate("ab"):
        save_adapter(strong(init_adapter(ParaConfig(r=2), model.config), i), tmp_path / name, model=model)
        sources[name] = str(tmp_path / name)
    little, updated = (made_bank(model, sources, adapter_memory=1e-9, adapter_root=root) for root in (None, "adapters"))
    whole = made_bank(model, sources)
    assert (len(little), len(updated), len(whole)) == (0, 2, 2) and little.names == whole.names
    assert little.entry("b").content == whole.entry("b").content and len(little) == 1
    save_adapter(strong(init_adapter(ParaConfig(r=2), model.config), 7), tmp_path / "b", model=model)  # trained again
    assert little.entry("b").content == whole.entry("b").content, "as long as it stays in memory"
    assert little.entry("a").content == whole.entry("a").content
    assert little.entry("b").content == made_bank(model, sources).entry("b").content != whole.entry("b").content


def test_adapters_that_leave_change_no_program(tmp_path):
    """Clients may unload all adapters of a kind, and load one again. Of a kind that a bank does not have by itself."""
    model, config = backbone("llama"), ParaConfig(r=2, scope="response")
    save_adapter(strong(init_adapter(config, model.config)), tmp_path / "para", model=model)
    bank = made_bank(model, {"para": str(tmp_path / "para")}, adapter_root="adapters")
    before = jax.tree.map(lambda leaf: leaf.shape, bank.rows([None]))
    bank.remove("para")
    after = jax.tree.map(lambda leaf: leaf.shape, bank.rows([None]))
    assert jax.tree.leaves(after) == jax.tree.leaves(before)
    assert jax.tree.structure(after) == jax.tree.structure(before)


def test_the_greeting_shows_a_command_that_a_shell_understands():
    line = serve.greeting("http://127.0.0.1:1", "it's", True)
    assert line.startswith("serving at http://127.0.0.1:1\n") and "Bearer $KEY" in line and "'\"'\"'" in line


def test_the_documented_defaults_of_the_options_are_the_commands():
    section = (ROOT / "docs" / "server.md").read_text().split("## Options\n")[1].split("\n## ")[0]
    commands = next(one for one in parser()._actions if one.dest == "command").choices
    actions, checked = commands["serve"]._option_string_actions, []
    with_own = {"--max-length": options.MAX_LENGTH}  # its default follows from the model, up to this
    for names, default in re.findall(r"^\| (`--[^|]*) \| ([^|]*) \|", section, re.M):
        for option, text in zip(re.findall(r"`(--[\w-]+)`?", names), default.split(", "), strict=False):
            if number := re.fullmatch(r"(\d+)( MiB)?", text):
                default = with_own.get(option, actions[option].default)
                assert default == int(number[1]) * (2**20 if number[2] else 1), option
                checked.append(option)
    assert len(checked) >= 10, checked
