"""Each module's tests are where one looks for them: tests/data/test_records.py tests para_jax/data/records.py."""

import ast
from functools import cache
from pathlib import Path

import pytest
from import_reader import imported, module, sources

TESTS = Path(__file__).parent
#: The test file of a module that has none of its own name, and that no test in its folder imports.
ELSEWHERE = {
    "__main__": "cli/test_cli.py",
    "adapters.names": "cli/test_cli.py",
    "data.tenant_file": "runs/test_tenant_file.py",
    "adapters.method": "adapters/test_adding_a_method.py",
    "adapters.para": "test_model.py",
    "backbone.attention": "backbone/test_cache.py",
    "backbone.config_values": "backbone/test_families.py",
    "backbone.feedforward": "test_model.py",
    "backbone.known_configs": "test_model.py",
    "backbone.rotary": "test_model.py",
    "backbone.rotary_config": "backbone/test_families.py",
    "evaluation.accepted_answers": "evaluation/test_score.py",
    "inspect": "cli/test_cli.py",
    "record_file": "bench/test_bench.py",
    "runs.fit": "runs/test_train.py",
    "runs.logs": "runs/test_tenants.py",
    "runs.rows_per_step": "runs/test_batch_size.py",
    "runs.standing": "runs/test_tenants.py",
    "serving.admission": "serving/test_threads.py",
    "serving.pins": "serving/test_prefills.py",
    "server.answer": "server/test_answering.py",
    "server.logprobs": "server/test_answering.py",
    "tensor_file": "backbone/test_safetensors.py",
    "training.passes": "runs/test_batch_size.py",
    "training.same_run": "training/test_checkpoint.py",
    "training.quiet_orbax": "training/test_checkpoint.py",
}


@cache
def imported_by_tests(folder: str) -> set[str]:
    """The names inside para_jax that the test files of a folder import."""
    files = (TESTS / folder).glob("test_*.py")
    return {name for file in files for name in imported("__init__.py", file.read_text())}


def own_test_file(file: str) -> Path:
    """By the mirror: a/b.py has a/test_b.py, and a/__init__.py has a/test_a.py."""
    *folder, name = file.removesuffix(".py").split("/")
    return TESTS.joinpath(*folder, f"test_{folder[-1] if name == '__init__' else name}.py")


def has_tests_in_its_folder(file: str) -> bool:
    """A test file for its whole package, or one that imports the module."""
    folder = file.rpartition("/")[0]
    if (TESTS / folder / f"test_{folder.rpartition('/')[2]}.py").exists():
        return True
    return any(f"{name}.".startswith(f"{module(file)}.") for name in imported_by_tests(folder))


def holds_code(text: str) -> bool:
    return any(not isinstance(node, ast.Expr) for node in ast.parse(text).body)


def test_each_module_has_a_test_file():
    files = {file: text for file, text in sources().items() if file != "__init__.py" and holds_code(text)}
    without = {module(file) for file in files if not own_test_file(file).exists() and not has_tests_in_its_folder(file)}
    assert without == set(ELSEWHERE)
    assert [name for name in ELSEWHERE.values() if not (TESTS / name).exists()] == []


def test_no_test_file_imports_another():
    for file in TESTS.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            names += [name.name for name in node.names] if isinstance(node, ast.Import) else []
            assert not any(name.rpartition(".")[2].startswith("test_") for name in names), file


@pytest.mark.parametrize(
    ("file", "expected"),
    [("data/records.py", "data/test_records.py"), ("cli/__init__.py", "cli/test_cli.py"), ("hub.py", "test_hub.py")],
)
def test_the_mirror_of_a_file(file, expected):
    assert own_test_file(file) == TESTS / expected
