"""What all pictures share: an empty figure, the sentence under it, and saving it. Needs the extra [plot]."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import atomic
from .checks import expanded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Matplotlib's axes overflow beyond this value.
LARGEST = 1e30


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that shows itself in a notebook without pyplot and its global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("matplotlib is not installed; `pip install 'para_jax[plot]'`") from None

    class Picture(Figure):
        def _repr_png_(self) -> bytes:
            data = io.BytesIO()
            self.savefig(data, format="png", dpi=100)
            return data.getvalue()

    return Picture(figsize=(width, height), layout="constrained")


def save(figure: Figure, file: str | Path) -> None:
    """Writes the figure in the format of the file's suffix: .png, .pdf or .svg. Replaces an old file atomically."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=expanded(file).suffix.removeprefix("."), dpi=120)
    atomic.write_bytes(expanded(file), drawn.getvalue())


def explain(figure: Figure, text: str) -> None:
    """Puts a sentence under the picture that says how to read it."""
    figure.supxlabel(wrapped(figure, text), fontsize=8, color="0.3")


def wrapped(figure: Figure, text: str) -> str:
    """A text of font size 8 in lines that fit the figure."""
    return textwrap.fill(escaped(text), int(17 * figure.get_size_inches()[0]))


def escaped(text: str) -> str:
    """A text with its dollars escaped, which matplotlib would read as mathematics."""
    return text.replace("$", r"\$")


def run_names(folders: Sequence[str | Path]) -> list[str]:
    """The folders' own names, or their paths if two names are equal."""
    names = [expanded(folder).resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def drawable(value: float) -> float:
    """The value, or NaN (a gap) for one that cannot be drawn."""
    return value if math.isfinite(value) and abs(value) < LARGEST else math.nan
