"""Prints the structure of a checkout: lines, files, lengths, documentation, and imports between packages.

    python scripts/structure.py [CHECKOUT]

Lengths are lines, as median / 90th percentile / maximum. A function's length includes its docstring. An arrow is a
pair of packages (or top-level modules) in which the first imports the second.
"""

import ast
import sys
from pathlib import Path
from statistics import median

FOLDERS = ("para_jax", "tests", "scripts")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def lengths(values: list[int]) -> str:
    ordered = sorted(values) or [0]
    return f"{median(ordered):.0f} / {ordered[int(0.9 * (len(ordered) - 1))]} / {ordered[-1]}"


def share(part: int, total: int) -> str:
    return f"{100 * part / max(total, 1):.1f} %"


def imported_units(tree: ast.AST, package: list[str]) -> set[str]:
    """The packages and top-level modules of para_jax that one file imports."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level]
            names = [node.module] if node.module else [each.name for each in node.names]
            found |= {(base + name.split("."))[0] for name in names}
    return found


def describe(root: Path, folder: str) -> None:
    texts = {file: file.read_text() for file in sorted((root / folder).rglob("*.py"))}
    trees = {file: ast.parse(text) for file, text in texts.items()}
    files = [file for file, text in texts.items() if file.name != "__init__.py" or len(text.splitlines()) > 5]
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    functions = [node for node in nodes if isinstance(node, FUNCTIONS)]
    documented = [node for node in nodes if isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)) and node.body]
    lines = sum(len(text.splitlines()) for text in texts.values())
    comments = sum(line.lstrip().startswith("#") for text in texts.values() for line in text.splitlines())
    strings = sum(len((ast.get_docstring(node, clean=False) or "").splitlines()) for node in documented)
    print(f"{folder}: {lines} lines in {len(files)} files")
    print(f"  file length      {lengths([len(texts[file].splitlines()) for file in files])}")
    print(f"  function length  {lengths([node.end_lineno - node.lineno + 1 for node in functions])}")
    print(f"  docstrings       {share(strings, lines)} of lines; comments {share(comments, lines)}")
    print(f"  have a docstring {share(sum(map(bool, map(ast.get_docstring, functions))), len(functions))} of functions")
    if folder == "para_jax":
        arrows = set()
        for file, tree in trees.items():
            *package, _ = file.relative_to(root / folder).parts
            own = package[0] if package else file.stem
            if own != "__init__":  # the public names import every layer
                arrows |= {(own, unit) for unit in imported_units(tree, package) - {own}}
        units = {unit for arrow in arrows for unit in arrow}
        print(f"  packages and top-level modules {len(units)}; {len(arrows)} arrows")


if __name__ == "__main__":
    checkout = Path(sys.argv[1] if len(sys.argv) > 1 else ".")
    for name in FOLDERS:
        describe(checkout, name)
