"""Fields: the values of a JSON object, taken one by one and checked. What is left at the end is refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NoReturn

from ..config import shorten
from ..untrusted import require_unicode
from .errors import wrong_field


class Fields:
    """A field that is null counts as missing, because OpenAI's clients send such fields. Errors are ApiError 400 that
    name the field."""

    def __init__(self, found: dict, inside: str = ""):
        """
        Args:
            inside: the name of the field that holds this object.
        """
        self._left = {name: value for name, value in found.items() if value is not None}
        self._inside = f"{inside}." if inside else ""

    def __contains__(self, name: str) -> bool:
        """Whether a field is there and not yet taken."""
        return name in self._left

    def take(self, name: str) -> Any:
        """The value, whatever it is; None if it is not there."""
        return self._left.pop(name, None)

    def whole(self, name: str, least: int, most: int) -> int | None:
        value = self._left.pop(name, None)
        if value is None:
            return None
        if type(value) is not int or not least <= value <= most:
            self.refuse(name, value, f"give a whole number from {least} to {most}")
        return value

    def number(self, name: str, least: float, most: float) -> float | None:
        value = self._left.pop(name, None)
        if value is None:
            return None
        if type(value) not in (int, float) or not least <= value <= most:
            self.refuse(name, value, f"give a number from {least:g} to {most:g}")
        return value

    def flag(self, name: str) -> bool:
        value = self._left.pop(name, False)
        if type(value) is not bool:
            self.refuse(name, value, "give true or false")
        return value

    def text(self, name: str, most: int, *, least: int = 1) -> str | None:
        value = self._left.pop(name, None)
        if value is None:
            return None
        if not isinstance(value, str) or not least <= len(value) <= most:
            self.refuse(name, value, f"give a text of {least} to {most} characters")
        try:
            require_unicode(name, value)
        except ValueError as error:
            raise wrong_field(self._inside + name, str(error)) from None
        return value

    def refuse(self, name: str, value: object, advice: str) -> NoReturn:
        """Raises the error of a field with a wrong value."""
        raise wrong_field(self._inside + name, f"{self._inside}{name} is {shorten(value)}; {advice}")

    def require_inert(self, table: Mapping[str, tuple[tuple, str]]) -> None:
        """Takes fields whose effect is not computed here. Only the values that ask for nothing are allowed.

        Args:
            table: for each field, the allowed values, and what to say of others.
        """
        for name, (allowed, advice) in table.items():
            if name in self._left:
                value = self._left.pop(name)
                if not any(type(value) is type(one) and value == one for one in allowed):
                    self.refuse(name, value, advice)

    def require_none_left(self, known: Iterable[str]) -> None:
        """Raises the error of the first field that no one has taken, with the nearest of the known ones."""
        for name in self._left:
            near = difflib.get_close_matches(name[:100], list(known), n=1)
            advice = f"; did you mean {near[0]}?" if near else ""
            raise wrong_field(self._inside + shorten(name)[1:-1], f"no field {self._inside}{shorten(name)}{advice}")
