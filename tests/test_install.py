"""How para_jax is installed: what a wheel holds, and where a checkout and a wheel can be imported."""

import importlib
import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BACKEND = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["build-backend"]


def built(kind, folder):
    """A "wheel" or "editable" wheel of this checkout, built by its backend, as pip does."""
    code = f"import sys, {BACKEND} as backend; backend.build_{kind}(sys.argv[1])"
    subprocess.run([sys.executable, "-c", code, folder], cwd=ROOT, check=True, capture_output=True, timeout=300)
    return next(Path(folder).glob("*.whl"))


def environment_with(wheel, folder):
    """An environment in which the wheel is installed, and has the packages of this one. Returns its Python."""
    venv.create(folder)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    zipfile.ZipFile(wheel).extractall(packages)
    (packages / "of_the_tests.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    return folder / "bin" / "python"


def without_path(folder):
    """Environment variables without the path of the tests, on which the checkout may be."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return kept | {"IPYTHONDIR": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture
def above(tmp_path):
    """The folder above a checkout that is called para_jax, such as Colab's /content."""
    folder = tmp_path / "content"
    folder.mkdir()
    (folder / "para_jax").symlink_to(ROOT)
    return folder


def files_in(folder):
    return {file.relative_to(ROOT) for file in (ROOT / folder).rglob("*") if file.is_file()}


@pytest.mark.long
def test_a_wheel_holds_the_package_and_the_configs_and_works_without_a_checkout(tmp_path, above):
    wheel = built("wheel", tmp_path / "dist")
    inside = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    metadata = {path for path in inside if path.parts[0].endswith(".dist-info")}
    package = {path for path in files_in("para_jax") if "__pycache__" not in path.parts}
    assert inside - metadata == package | {"para_jax" / path for path in files_in("configs")}
    assert "LICENSE" in {path.name for path in metadata}
    code = "import para_jax; print(para_jax.__file__, para_jax.load_config('own-data').output_dir)"
    python = environment_with(wheel, tmp_path / "environment")
    shown = subprocess.run([python, "-c", code], cwd=above, env=without_path(tmp_path), capture_output=True, text=True)
    file, output = shown.stdout.split()
    assert Path(file).is_relative_to(tmp_path / "environment") and output == "runs/mine"


def first_cells():
    """Of each notebook the cell that installs para_jax, where it is missing, and the cell with the things to edit."""
    books = [json.loads(file.read_text()) for file in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    cells = [cell for book in books for cell in book["cells"]]
    found = [cell for cell in cells if {"install", "edit"} & set(cell["metadata"].get("tags", []))]
    return ["".join(cell["source"]) for cell in found]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["editable", "wheel"])
def test_a_kernel_above_a_checkout_or_without_one_runs_the_first_cells_of_the_notebooks(kind, tmp_path, above):
    if kind == "wheel":  # as on Colab after `pip install`
        (above / "para_jax").unlink()
    client = importlib.import_module("jupyter_client")
    python = environment_with(built(kind, tmp_path / "dist"), tmp_path / "environment")
    launch = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernels = tmp_path / "kernels"
    (kernels / "editable").mkdir(parents=True)
    (kernels / "editable" / "kernel.json").write_text(json.dumps({"argv": launch, "display_name": "", "language": ""}))
    manager = client.KernelManager(
        kernel_name="editable",
        kernel_spec_manager=client.kernelspec.KernelSpecManager(kernel_dirs=[str(kernels)]),
        connection_file=str(tmp_path / "connection.json"),
    )
    manager.start_kernel(cwd=str(above), env=without_path(tmp_path))
    kernel = manager.blocking_client()
    try:
        kernel.start_channels()
        kernel.wait_for_ready(timeout=120)
        for code in (
            "from para_jax import load_config, load_tokenizer; load_config('own-data')",
            *first_cells(),
        ):  # a cell that restarts the kernel would end it
            reply = kernel.execute_interactive(code, timeout=120, output_hook=print)
            assert reply["content"]["status"] == "ok", reply["content"]
    finally:
        kernel.stop_channels()
        manager.shutdown_kernel(now=True)
