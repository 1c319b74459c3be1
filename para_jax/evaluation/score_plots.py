"""Pictures of scores: bars of methods, adapters or tenants, with the base model's score. Needs the extra [plot]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from ..io.figures import drawable, escaped, explain, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: More bars than this are not drawn: the middle of the order by score is left out.
MAX_BARS = 40


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
    base: Bar | Mapping[str, Bar] | None = None
    """the base model's score: one for all bars, or one for each name that has one"""


def scores_plot(panels: Mapping[str, Scores]) -> Figure:
    """Scores as horizontal bars with their standard errors, one panel per set of scores.

        scores_plot({"my data, test": Scores("accuracy", {"PARA": Bar(0.92, 0.03, 60), "LoRA": Bar(0.88, 0.04, 60)},
                                             base=Bar(0.27, 0.06, 60))})

    A base model's score that belongs to all bars is a dashed line; one for each bar is a diamond on it. A sentence
    under the picture says how to read it.

    Args:
        panels: by the panel's title.
    """
    if not panels or not all(scores.bars for scores in panels.values()):
        raise ValueError("no scores to draw; give a panel with at least one bar")
    drawn = {name: scores._replace(bars=legible(scores)) for name, scores in panels.items()}
    heights = [0.9 + 0.32 * len(scores.bars) for scores in drawn.values()]
    figure = new_figure(7, sum(heights) + 0.7)
    grid = figure.subplots(len(drawn), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, (name, scores) in zip(grid, drawn.items(), strict=True):
        draw_panel(axes, name, scores)
    said = "Whiskers are one standard error over the examples: bars that differ by less may differ by chance. "
    said += "A dashed line or a diamond is the base model on the same examples."
    if any(len(scores.bars) > MAX_BARS for scores in panels.values()):
        said += f" Only the best and the worst {MAX_BARS // 2} are drawn."
    explain(figure, said)
    return figure


def draw_panel(axes, name: str, scores: Scores) -> None:
    """A panel with one set of scores: the bars, the base model's scores, and all of them as numbers."""
    bars, places = list(scores.bars.values()), range(len(scores.bars))
    counts = {bar.count for bar in bars}
    alike = f", {next(iter(counts))} examples" if len(counts) == 1 and None not in counts else ""
    errors = [drawable(bar.stderr or 0.0) for bar in bars]
    axes.barh(places, [drawable(bar.score) for bar in bars], xerr=errors, height=0.62, color="C0", alpha=0.75)
    bases = scores.base if isinstance(scores.base, Mapping) else {}
    if isinstance(scores.base, Bar):
        axes.axvline(drawable(scores.base.score), color="black", linestyle="--", linewidth=1)
    for place, (key, bar) in enumerate(scores.bars.items()):
        text = str(bar)
        if key in bases:
            axes.plot(drawable(bases[key].score), place, "D", markersize=5, color="white", markeredgecolor="black")
            text += f" (base {bases[key]})"
        end = max(0.0, drawable(bar.score + (bar.stderr or 0.0)))
        axes.annotate(text, (end, place), (5, 0), textcoords="offset points", va="center", fontsize=8)
    labels = [shorten_name(key) + ("" if alike or bar.count is None else f" ({bar.count})") for key, bar in
              scores.bars.items()]  # fmt: skip
    axes.set_yticks(places, list(map(escaped, labels)), fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)  # the first bar at the top
    axes.margins(x=0.3)  # room for the numbers
    of_base = f", base model {scores.base}" if isinstance(scores.base, Bar) else ""
    axes.set_title(escaped(name) + alike + of_base, fontsize=9)
    better = "loss (nats per token), lower" if scores.metric == "loss" else f"{escaped(scores.metric)}, higher"
    axes.set_xlabel(f"{better} is better", fontsize=8)


def legible(scores: Scores) -> Mapping[str, Bar]:
    """The bars, without those in the middle of the order by score if there are too many."""
    if len(scores.bars) <= MAX_BARS:
        return scores.bars
    ordered = sorted(scores.bars, key=lambda key: scores.bars[key].score, reverse=scores.metric != "loss")
    return {key: scores.bars[key] for key in (*ordered[: MAX_BARS // 2], *ordered[-MAX_BARS // 2 :])}


def shorten_name(name: str, longest: int = 40) -> str:
    """The start and the end of a long name."""
    part = (longest - 3) // 2
    return name if len(name) <= longest else f"{name[:part]}...{name[-part:]}"
