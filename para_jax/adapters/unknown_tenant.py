"""The error for an unknown tenant's name. The command line checks names before it loads JAX."""

from __future__ import annotations

import bisect
import difflib
from collections.abc import Sequence

from ..config import BASE
from ..io.checks import shorten
from ..io.untrusted import safe_name

#: How many known names of each kind an unknown one is compared with; a comparison takes about 50 microseconds.
COMPARED = 50


def unknown(name: object, known: tuple[str, ...]) -> str:
    """The error for a tenant that the bank does not hold, with names that are similar at the beginning or the end."""
    if name == BASE:  # what the command line and the server call it
        return f"no tenant {BASE!r}; for the base model give None"
    nearest = nearest_names(str(name), known)
    if nearest:
        return f"no tenant {shorten(name)}; the nearest are {', '.join(map(safe_name, nearest))}"
    held = ", ".join(map(safe_name, known[:3])) or "none"
    return f"no tenant {shorten(name)}; it holds {held}{' ...' if len(known) > 3 else ''}"


def nearest_names(name: str, known: Sequence[str]) -> list[str]:
    """At most three known names that are similar to this one at the beginning or the end."""
    text = name[:100]
    near = sorted(one for one in known if one.startswith(text[:3]))
    at = bisect.bisect(near, text)  # neighbours in this order share the longest beginnings
    near = near[max(0, at - COMPARED // 2) : at + COMPARED // 2]
    near += [one for one in known if one.endswith(text[-3:])][:COMPARED] + list(known[:COMPARED])
    return difflib.get_close_matches(text, dict.fromkeys(one[:100] for one in near), n=3, cutoff=0.5)
