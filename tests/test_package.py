"""What `import para_jax` offers, to Python and to type checkers."""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import para_jax

INIT = Path(para_jax.__file__)


def imports_for_type_checkers():
    """The names that __init__.py imports under `if TYPE_CHECKING`, with their modules."""
    block = next(node for node in ast.parse(INIT.read_text()).body if isinstance(node, ast.If))
    return {name.name: node.module for node in block.body if isinstance(node, ast.ImportFrom) for name in node.names}


def test_type_checkers_see_every_name_that_is_imported_late():
    seen = imports_for_type_checkers()
    assert "generate" in seen and "Engine" in seen
    for name, module in seen.items():
        if name != "ParaLM":  # needs lm-eval
            assert getattr(para_jax, name) is getattr(sys.modules[f"para_jax.{module}"], name)
    assert seen == para_jax._LATER


def test_the_package_says_that_it_is_typed():
    assert (INIT.parent / "py.typed").is_file()


@pytest.mark.long
def test_transformers_says_nothing_about_pytorch_but_its_other_warnings_stay():
    code = """
import logging
from para_jax.data.chats import render_template
import transformers
assert render_template("{{ messages[0].content }}", [{"role": "user", "content": "hi"}]) == "hi"
logging.getLogger("transformers").warning("another warning")
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRANSFORMERS_")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "[transformers] another warning\n")


def test_a_star_import_gives_the_public_names_that_need_no_extra():
    names: dict = {}
    exec("from para_jax import *", names)
    assert set(para_jax._LATER) - set(names) == {"serve", "ParaLM"} and "importlib" not in names


def test_help_needs_no_extra(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    assert "ParaLM" not in dir(para_jax) and {"serve", "train"} <= set(dir(para_jax))
