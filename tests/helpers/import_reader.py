"""Reads which modules of para_jax a file imports, without importing it."""

import ast
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "para_jax"


def sources() -> dict[str, str]:
    """The text of each file, by its path inside para_jax."""
    files = sorted(PACKAGE.rglob("*.py"))
    return {file.relative_to(PACKAGE).as_posix(): file.read_text() for file in files}


def imported(file: str, text: str) -> Iterator[str]:
    """The dotted names inside para_jax that a file imports, wherever in it: "config.load_config", "devices"."""
    package = file.split("/")[:-1]
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level] + (node.module or "").split(".")
            names = [name.name for name in node.names if name.name != "__version__"]  # a constant of the package
            yield from (".".join([part for part in base if part] + [name]) for name in names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "para_jax":
            yield from (".".join([*node.module.split(".")[1:], name.name]) for name in node.names)
        elif isinstance(node, ast.Import):
            yield from (name.name[9:] for name in node.names if name.name.startswith("para_jax"))
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            yield from loaded_by_name(file, node)


def loaded_by_name(file: str, call: ast.Call) -> Iterator[str]:
    """What `import_module` loads. A package's face may load the modules of its table; others spell the name out."""
    name = call.args[0]
    if not isinstance(name, ast.Constant):
        assert file.endswith("__init__.py"), f"{file}: import_module({ast.unparse(name)}) hides what it imports"
    elif name.value.startswith("."):
        package = file.split("/")[:-1]
        dots = len(name.value) - len(name.value.lstrip("."))
        yield ".".join([*package[: len(package) + 1 - dots], name.value.lstrip(".")])
    elif name.value.startswith("para_jax"):
        yield name.value[9:]


def module(file: str) -> str:
    """The dotted name of a file inside para_jax: "config", "config.file"."""
    return file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def circles(files: dict[str, str]) -> set[frozenset[str]]:
    """The groups of modules that import each other, directly or through others, wherever in a file the import is."""
    modules = {module(file): file for file in files if file != "__init__.py"}
    reached = {name: set() for name in modules}
    for name, file in modules.items():
        for other in imported(file, files[file]):
            other = other if other in modules else other.rpartition(".")[0]
            reached[name] |= {other} & modules.keys()
    for _ in modules:
        before = sum(map(len, reached.values()))
        reached = {name: others.union(*(reached[other] for other in others)) for name, others in reached.items()}
        if sum(map(len, reached.values())) == before:
            break
    return {frozenset({other for other in reached[name] if name in reached[other]}) for name in modules} - {frozenset()}
