"""docs/other_servers.md and its check, check_hooks.py: the page's code computes what para_jax does."""

import sys
from dataclasses import fields
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts" / "experiments"))

from check_hooks import CONFIGS, LIMIT, MOVED, ROOT, Case, page_code  # noqa: E402
from long_cases import quick  # noqa: E402

from para_jax import ParaConfig, init_adapter, load_backbone, save_adapter  # noqa: E402
from para_jax.config import SITES  # noqa: E402

LLAMA = ROOT / "tests" / "fixtures" / "llama"


@pytest.mark.parametrize("name", quick(list(CONFIGS), "r=4", "six sites"))
def test_the_numpy_llama_of_the_page_equals_para_jax(name, tmp_path):
    code, case = page_code(torch=False), Case(LLAMA, CONFIGS[name], tmp_path / "adapter")
    difference, same_tokens = case.compare(code, case.numpy_step(code))
    assert difference <= LIMIT and same_tokens
    assert case.moved >= MOVED


def test_other_scopes_are_refused(tmp_path):
    save_adapter(init_adapter(ParaConfig(), load_backbone(LLAMA).config), tmp_path / "adapter")
    with pytest.raises(ValueError, match="not a PARA adapter of scope response"):
        page_code(torch=False)["read_adapter"](tmp_path / "adapter")


def test_the_page_names_every_field_tensor_and_site():
    text = (ROOT / "docs" / "other_servers.md").read_text()
    names = [field.name for field in fields(ParaConfig)] + list(SITES)
    names += ["para_down.weight", "para_up.weight", "para_up.bias", "para_constant"]
    assert [name for name in names if f"`{name}`" not in text] == []
