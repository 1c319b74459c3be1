"""Pictures of scores: bars of methods, adapters or tenants, with the base model's score. Needs the extra [plot]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..io.figures import drawable, escaped, explain, new_figure, style

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Bar(NamedTuple):
    """One score."""

    score: float
    """of the metric "loss": the loss itself, never negated"""
    stderr: float | None = None
    count: int | None = None
    """examples"""

    def __str__(self) -> str:
        return f"{self.score:.3f}" + (f" ± {self.stderr:.3f}" if self.stderr else "")


class Scores(NamedTuple):
    """Scores of one metric on one set of examples, or of tenants each on their own."""

    metric: str
    bars: Mapping[str, Bar]
    """by name, in the order to draw them from the top"""
    base: Bar | None = None
    """the base model's score"""


@style()
def scores_plot(panels: Mapping[str, Scores]) -> Figure:
    """Scores as horizontal bars with their standard errors, one panel per set of scores, by its title.

        scores_plot({"my data, test": Scores("accuracy", {"PARA": Bar(0.92, 0.03, 60), "LoRA": Bar(0.88, 0.04, 60)},
                                             base=Bar(0.27, 0.06, 60))})

    The base model's score is a dashed line. A sentence under the picture says how to read it.
    """
    if not panels or not all(scores.bars for scores in panels.values()):
        raise ValueError("no scores to draw; give a panel with at least one bar")
    heights = [0.9 + 0.32 * len(scores.bars) for scores in panels.values()]
    figure = new_figure(7, sum(heights) + 0.7)
    grid = figure.subplots(len(panels), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, scores) in zip(grid, panels.items(), strict=True):
        draw_panel(axes, name, scores)
    said = "Whiskers and the shade are one standard error over the examples: less may be chance. "
    said += "A dashed line is the base model on the same examples."
    explain(figure, said)
    return figure


def draw_panel(axes, name: str, scores: Scores) -> None:
    """A panel with one set of scores: the bars, the base model's scores, and all of them as numbers."""
    bars, places = list(scores.bars.values()), range(len(scores.bars))
    counts = {bar.count for bar in bars}
    alike = f", {next(iter(counts))} examples" if len(counts) == 1 and None not in counts else ""
    errors = [drawable(bar.stderr or 0.0) for bar in bars]
    axes.barh(places, [drawable(bar.score) for bar in bars], xerr=errors, height=0.62, alpha=0.75)
    axes.grid(axis="y", visible=False)
    if scores.base:
        score, error = drawable(scores.base.score), drawable(scores.base.stderr or 0.0)
        axes.axvline(score, color="black", linestyle="--", linewidth=1)
        axes.axvspan(score - error, score + error, color="black", alpha=0.12, linewidth=0)
    for place, bar in enumerate(bars):
        end = max(0.0, drawable(bar.score + (bar.stderr or 0.0)))
        axes.annotate(str(bar), (end, place), (5, 0), textcoords="offset points", va="center")
    labels = [shorten_name(key) + ("" if alike or bar.count is None else f" ({bar.count})") for key, bar in
              scores.bars.items()]  # fmt: skip
    axes.set_yticks(places, list(map(escaped, labels)))
    axes.set_ylim(len(bars) - 0.4, -0.6)  # the first bar at the top
    axes.margins(x=0.3)  # room for the numbers
    axes.set_title(escaped(name) + alike + (f", base model {scores.base}" if scores.base else ""))
    better = "loss (nats per token), lower" if scores.metric == "loss" else f"{escaped(scores.metric)}, higher"
    axes.set_xlabel(f"{better} is better")


def shorten_name(name: str, longest: int = 40) -> str:
    """The start and the end of a long name."""
    part = (longest - 3) // 2
    return name if len(name) <= longest else f"{name[:part]}...{name[-part:]}"
