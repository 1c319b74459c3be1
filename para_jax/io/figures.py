"""What all pictures share: their style, an empty figure, the sentence under it, and saving. Needs the extra [plot]."""

from __future__ import annotations

import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import atomic
from .checks import expanded

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Matplotlib's axes overflow beyond this value.
LARGEST = 1e30
#: Colours that people with any colour vision tell apart (Okabe and Ito 2008), without black and yellow.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#CC79A7"]
#: Each kind of method has one colour in all pictures. The first part that a method's name holds decides.
METHODS = {"base": "black", "(IA)^3": "#0072B2", "constant": "#CC79A7", "PARA": "#009E73", "LoRA": "#D55E00"}
STYLE: dict[Any, Any] = {
    "axes.prop_cycle": f"cycler(color={COLOURS})",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": "medium",
    "errorbar.capsize": 2,
    "font.size": 9,
    "grid.alpha": 0.3,
    "legend.fontsize": "small",
    "lines.markersize": 4,
}


@contextmanager
def style() -> Iterator[None]:
    """The style of all pictures while one is drawn; a decorator of the functions that draw."""
    try:
        from matplotlib import rc_context
    except ImportError:
        raise ValueError("matplotlib is not installed; `pip install 'para_jax[plot]'`") from None
    with rc_context(STYLE):
        yield


def method_colour(name: str) -> str:
    return next((colour for part, colour in METHODS.items() if part in name), "#E69F00")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that shows itself in a notebook without pyplot and its global state."""
    from matplotlib.figure import Figure

    class Picture(Figure):
        draw = style()(Figure.draw)  # ticks are made while it draws

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
    lines = textwrap.fill(escaped(text), int(17 * figure.get_size_inches()[0]))
    figure.supxlabel(lines, fontsize=8, color="0.3")


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
