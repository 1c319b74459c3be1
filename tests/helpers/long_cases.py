"""Parameters of a test that repeats its law: `pytest` takes some of them, `pytest -m long` and `-m slow` the others."""

from collections.abc import Iterable
from pathlib import Path

import pytest


def quick(values: Iterable, *chosen, slow: tuple = ()) -> list:
    """The values for `pytest.mark.parametrize`. All but the chosen ones are marked long, and some of them slow."""
    marked = {True: pytest.mark.slow, False: pytest.mark.long}
    return [value if value in chosen else pytest.param(value, marks=marked[value in slow]) for value in values]


def first_cases(items: Iterable[pytest.Item], whole: str, most: int = 3) -> list[pytest.Item]:
    """The first case of each file's first tests: enough for a second Python, where a first one runs all.

    Args:
        whole: the name of a file that keeps all its cases.
        most: tests of a file.
    """
    found: dict[Path, dict[str, pytest.Item]] = {}
    for item in items:
        of_file, test = found.setdefault(item.path, {}), item.nodeid.partition("[")[0]
        if item.path.name == whole:
            of_file[item.nodeid] = item
        elif len(of_file) < most:
            of_file.setdefault(test, item)
    return [item for of_file in found.values() for item in of_file.values()]


def long(*case) -> object:
    return pytest.param(*case, marks=pytest.mark.long)


def slow(*case) -> object:
    return pytest.param(*case, marks=pytest.mark.slow)
