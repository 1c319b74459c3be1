"""Pictures of scores: bars of methods, adapters or tenants, with the base model's score. Needs the extra [plot]."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
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


class Scores(NamedTuple):
    """Scores of one metric on one set of examples, or of tenants each on their own."""

    metric: str
    bars: Mapping[str, Bar]
    """by name, in the order to draw them from the top"""
    base: Bar | Mapping[str, Bar] | None = None
    """the base model's score: one for all bars, or one for each name that has one"""


# ------------------------------------------------------------------------------------------------------------- picture


def scores_plot(panels: Mapping[str, Scores], title: str = "") -> Figure:
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
    if title:
        figure.suptitle(title, fontsize=10, parse_math=False)
    left_out = any(len(scores.bars) < len(panels[name].bars) for name, scores in drawn.items())
    explain(figure, sentence(list(drawn.values()), left_out))
    return figure


def draw_panel(axes, name: str, scores: Scores) -> None:
    """A panel with one set of scores: the bars, the base model's scores, and all of them as numbers."""
    counts = {bar.count for bar in scores.bars.values()}
    draw_bars(axes, scores.bars)
    draw_base(axes, scores)
    name_bars(axes, scores.bars, with_counts=len(counts) > 1)
    set_range(axes, scores)
    write_numbers(axes, scores)
    count = next(iter(counts))
    of_all = f", {count} examples" if len(counts) == 1 and count else ""
    of_base = f", base model {number(scores.base.score)}" if isinstance(scores.base, Bar) else ""
    axes.set_title(escaped(name) + of_all + of_base, fontsize=9)
    is_loss = scores.metric == "loss"
    says = "loss (nats per token), lower is better" if is_loss else f"{escaped(scores.metric)}, higher is better"
    axes.set_xlabel(says, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.grid(alpha=0.3, axis="x")
    axes.set_axisbelow(True)


def draw_bars(axes, bars: Mapping[str, Bar]) -> None:
    places, shown = range(len(bars)), [drawable(bar.score) for bar in bars.values()]
    errors = list(map(drawable_error, bars.values()))
    axes.barh(places, shown, height=0.62, color="C0", alpha=0.75)
    if not all(map(math.isnan, errors)):
        axes.errorbar(shown, places, xerr=errors, fmt="none", ecolor="black", elinewidth=1, capsize=2.5)


def draw_base(axes, scores: Scores) -> None:
    """A dashed line for the score that belongs to all bars, or a diamond on each bar that has one of its own."""
    if isinstance(scores.base, Bar):
        axes.axvline(drawable(scores.base.score), color="black", linestyle="--", linewidth=1)
        if scores.base.stderr:
            score, error = drawable(scores.base.score), scores.base.stderr
            axes.axvspan(score - error, score + error, color="black", alpha=0.08, linewidth=0)
    elif scores.base:
        held = [(scores.base[key], place) for place, key in enumerate(scores.bars) if key in scores.base]
        axes.errorbar(
            [drawable(bar.score) for bar, _ in held], [place for _, place in held],
            xerr=[drawable_error(bar) for bar, _ in held],
            fmt="D", clip_on=False, markersize=5, color="white", markeredgecolor="black", ecolor="black",
            elinewidth=1, capsize=2.5,
        )  # fmt: skip


def name_bars(axes, bars: Mapping[str, Bar], *, with_counts: bool) -> None:
    """The names at the left, perhaps with the number of examples, and the first bar at the top."""
    counts = [f" ({bar.count})" if bar.count and with_counts else "" for bar in bars.values()]
    labels = [escaped(shorten_name(key)) + count for key, count in zip(bars, counts, strict=True)]
    axes.set_yticks(range(len(bars)), labels, fontsize=8)
    axes.set_ylim(len(bars) - 0.4, -0.6)


def set_range(axes, scores: Scores) -> None:
    """The range of the scores and their errors, with zero and room for the numbers."""
    drawn = [*scores.bars.values(), *bases(scores)]
    ends = [round(end, 9) for end in [0.0, *(end for bar in drawn for end in reach(bar))]]  # 0.2 - 0.2 may be below 0
    low, high = min(ends), max(ends)
    space = (high - low) or 1.0
    room = space * (0.45 if isinstance(scores.base, Mapping) else 0.3)
    axes.set_xlim(low - (0.05 * space if low < 0 else 0), high + room)
    axes.xaxis.set_major_formatter("{x:g}")
    if high <= 1 and low >= 0 and scores.metric != "loss":
        axes.set_xticks([tick / 5 for tick in range(6) if tick / 5 <= high + room])


def write_numbers(axes, scores: Scores) -> None:
    """Each bar's score and error at its end, and the base model's where each bar has its own."""
    for place, (key, bar) in enumerate(scores.bars.items()):
        base = scores.base.get(key) if isinstance(scores.base, Mapping) else None
        right = max([0.0, *reach(bar), *(reach(base) if base else [])])
        text = number(bar.score) + (f" ± {number(bar.stderr)}" if bar.stderr else "")
        text += f" (base {number(base.score)})" if base else ""
        axes.annotate(text, (right, place), (5, 0), textcoords="offset points", va="center", fontsize=8)


def drawable_error(bar: Bar) -> float:
    """The standard error, or NaN (no whisker) if there is none or it can't be drawn."""
    return drawable(bar.stderr) if bar.stderr else math.nan


def legible(scores: Scores) -> Mapping[str, Bar]:
    """The bars, without those in the middle of the order by score if there are too many."""
    if len(scores.bars) <= MAX_BARS:
        return scores.bars
    ordered = sorted(scores.bars, key=lambda key: scores.bars[key].score, reverse=scores.metric != "loss")
    kept = ordered[: MAX_BARS // 2] + ordered[-MAX_BARS // 2 :]
    return {key: scores.bars[key] for key in kept}


def bases(scores: Scores) -> list[Bar]:
    """The base model's scores that are drawn."""
    if isinstance(scores.base, Mapping):
        return [bar for key, bar in scores.base.items() if key in scores.bars]
    return [scores.base] if scores.base else []


def reach(bar: Bar) -> list[float]:
    """How far a score and its error reach, to both sides; nothing for a score that is not drawn."""
    ends = [bar.score - (bar.stderr or 0.0), bar.score + (bar.stderr or 0.0)]
    return [end for end in ends if math.isfinite(drawable(end))]


def sentence(drawn: Sequence[Scores], left_out: bool) -> str:
    """The sentence that says how to read this picture."""
    said = []
    if any(bar.stderr for scores in drawn for bar in scores.bars.values()):
        said.append("Whiskers are one standard error over the examples: bars that differ by less may differ by chance.")
    if any(isinstance(scores.base, Bar) for scores in drawn):
        said.append("The dashed line is the base model.")
    if any(scores.base and not isinstance(scores.base, Bar) for scores in drawn):
        said.append("The diamond is the base model on the same examples.")
    if any(len({bar.count for bar in scores.bars.values()}) > 1 for scores in drawn):
        said.append("The number of examples is in brackets.")
    if left_out:
        said.append(f"Only the best and the worst {MAX_BARS // 2} are drawn.")
    return " ".join(said) or "Each bar is a score."


def number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1e4 else f"{value:.3g}"


def shorten_name(name: str, longest: int = 40) -> str:
    """The start and the end of a long name."""
    part = (longest - 3) // 2
    return name if len(name) <= longest else f"{name[:part]}...{name[-part:]}"
