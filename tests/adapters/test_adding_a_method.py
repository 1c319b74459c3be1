"""docs/adding_a_method.md holds: its config, file and entry, in a copy of the package, make a method that works."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from para_jax.adapters.methods import METHODS
from para_jax.config import ADAPTER_CONFIGS

ROOT = Path(__file__).parents[2]


def code_blocks() -> list[str]:
    text = (ROOT / "docs" / "adding_a_method.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def replace_table(file: Path, table: str, block: str) -> list[str]:
    """Puts the block in the place of the table, and returns the lines that are new."""
    before = file.read_text()
    after, count = re.subn(table, lambda _: block, before, flags=re.MULTILINE | re.DOTALL)
    assert count == 1
    file.write_text(after)
    return [line for line in after.splitlines() if line.strip() and line not in before.splitlines()]


@pytest.mark.long
def test_the_documented_method_works_after_a_config_a_file_and_two_entries(tmp_path):
    config, file, entry = code_blocks()
    shutil.copytree(ROOT / "para_jax", tmp_path / "para_jax", ignore=shutil.ignore_patterns("__pycache__"))
    adapters = tmp_path / "para_jax" / "adapters"
    (adapters / "bias.py").write_text(file)
    assert replace_table(adapters / "methods.py", r"^METHODS\b.*?^\)\n", entry) == [
        "from .bias import BIAS",
        "    BIAS,",
    ]
    table = tmp_path / "para_jax" / "config" / "adapter.py"
    added = replace_table(table, r"^ADAPTER_CONFIGS\b.*?^\}\n", config)
    assert added[0] == "class BiasConfig(AdapterConfig):" and added[-1] == '    "bias": BiasConfig,'

    names = "[load_config(None, [f]) for f in ('adapter.method=bias', 'sweep.method=[para, bias]')]"
    first = f"from para_jax import load_config; {names}"  # as the command line does, before anything has loaded JAX
    subprocess.run(
        [sys.executable, "-c", first], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path)}, check=True
    )

    options = ["-c", str(ROOT / "pyproject.toml"), "-n", "0", "-p", "no:cacheprovider"]
    laws = str(Path(__file__).with_name("added_method.py"))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options, laws],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert "7 passed" in run.stdout


def test_a_run_may_name_every_method():
    assert {method.name: method.config for method in METHODS} == ADAPTER_CONFIGS
