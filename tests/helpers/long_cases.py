"""Parameters of a test that repeats its law: `pytest` takes some of them, `pytest -m long` and `-m slow` the others."""

from collections.abc import Iterable

import pytest


def quick(values: Iterable, *chosen, slow: tuple = ()) -> list:
    """The values for `pytest.mark.parametrize`. All but the chosen ones are marked long, and some of them slow."""
    marked = {True: pytest.mark.slow, False: pytest.mark.long}
    return [value if value in chosen else pytest.param(value, marks=marked[value in slow]) for value in values]


def first_cases(items: list[pytest.Item], whole: str) -> list[pytest.Item]:
    """The first case of each file: enough for a second Python, where a first one runs all.

    Args:
        whole: the name of a file that keeps all its cases.
    """
    first = {item.path: item for item in reversed(items)}
    return [item for item in items if item.path.name == whole or item is first[item.path]]


def long(*case) -> object:
    return pytest.param(*case, marks=pytest.mark.long)


def slow(*case) -> object:
    return pytest.param(*case, marks=pytest.mark.slow)
