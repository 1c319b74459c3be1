"""What `import para_jax` offers, to Python and to type checkers."""

import ast
import importlib
from pathlib import Path

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
            assert getattr(para_jax, name) is getattr(importlib.import_module(f"para_jax.{module}"), name)
    assert seen == para_jax._LATER


def test_the_package_says_that_it_is_typed():
    assert (INIT.parent / "py.typed").is_file()
