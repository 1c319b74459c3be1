"""The pictures of compare_methods.py's results. A kind of method has one colour in all of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from compare_statistics import LEVEL, Ranking, p_text
from PIL import Image

from para_jax.io.figures import escaped, explain, method_colour, new_figure, style
from para_jax.io.figures import save as save_picture

#: Markers of the positions where an adapter acts.
MARKERS = {"response": "s", "prompt": "^", "": "o"}
LINES = {"s": "--", "^": ":", "o": "-"}
SCOPES = "Circles act on all tokens, squares on the response only, triangles on the prompt only."


#: Ticks of an axis of bytes.
TICKS = {5e4: "50 kB", 2e5: "200 kB", 1e6: "1 MB", 4e6: "4 MB", 16e6: "16 MB", 64e6: "64 MB"}


class Point(NamedTuple):
    """A method's score in a panel."""

    name: str
    x: float
    """0: a base model, which is drawn as a line"""
    y: float
    low: float
    high: float
    """of the seeds"""


def save(figure, file: Path) -> None:
    """Writes a picture with few colours, which takes a third of the bytes."""
    save_picture(figure, file)
    Image.open(file).convert("RGB").quantize(64, Image.Quantize.MAXCOVERAGE).save(file, optimize=True)


def marker(name: str) -> str:
    words = name.replace(",", " ").split()
    return next(shape for scope, shape in MARKERS.items() if scope in words or not scope)


# ------------------------------------------------------------------------------------------------------------- scores


@style()
def draw_bytes(panels: dict[str, list[Point]]):
    """Scores against bytes per tenant, a panel for each task."""
    figure, axes_of = panel_grid(panels)
    sizes = sorted(point.x for points in panels.values() for point in points if point.x) or [1e6]
    for task, points in panels.items():
        axes, found = axes_of[task], side_by_side([point for point in points if point.x])
        scatter(axes, found)
        lowest = min((point.low for point in found), default=0.0)
        span = max((point.high for point in found), default=1.0) - lowest
        below = []
        for point in points:
            if point.x:
                continue
            if point.y >= lowest - span / 2:  # a base model far below would hide the differences
                axes.axhline(point.y, color=method_colour(point.name), linestyle=":", linewidth=1)
                found.append(point)
            else:
                below.append(f"{point.name}: {point.y:.3f}")
        if below:
            said = escaped(f"far below: {'; '.join(below)}")
            axes.text(0, 1.01, said, transform=axes.transAxes, fontsize="small", va="bottom", color="0.3")
        axes.set_xticks(list(TICKS), TICKS.values())
        axes.minorticks_off()
        axes.set_xlim(sizes[0] / 1.6, sizes[-1] * 1.6)
        axes.set_xlabel("size of a tenant's adapter in float32")
        name_points(axes, found)
    said = "The mean of the seeds, and their range. Up is better, left is smaller."
    explain(figure, f"{said} {SCOPES} Equal sizes are side by side.")
    return figure


def side_by_side(points: Sequence[Point]) -> list[Point]:
    """Points whose x differs by less than 15 % are spread around their middle, so that none hides another."""
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda point: point.x):
        if groups and point.x < 1.15 * groups[-1][0].x:
            groups[-1].append(point)
        else:
            groups.append([point])
    spread = []
    for group in groups:
        middle = group[len(group) // 2].x
        spread += [p._replace(x=middle * 1.12 ** (i - (len(group) - 1) / 2)) for i, p in enumerate(group)]
    return spread


@style()
def draw_scopes(tasks: dict[str, dict[str, list[Point]]]):
    """What other scopes score less than `all`, by task and method: y of a point is the difference."""
    places, names, y = [], [], 0.0
    for task, methods in tasks.items():
        names.append((y, task))
        y += 1
        for method, points in methods.items():
            names.append((y + 0.25 * (len(points) - 1), method))
            for point in points:
                places.append((y, point))
                y += 0.5
            y += 0.4
    figure = new_figure(7, 1 + 0.18 * y)
    axes = figure.subplots()
    axes.axvline(0, color="black", linewidth=0.8)
    for height, point in places:
        shape = dict(color=method_colour(point.name), marker=marker(point.name), linewidth=1)
        shape |= dict(markerfacecolor="white") if " w=" in point.name else {}
        axes.errorbar([point.y], [height], xerr=[[point.y - point.low], [point.high - point.y]], **shape)
    axes.set_yticks([height for height, _ in names], [escaped(name) for _, name in names], fontsize="small")
    for (_, name), label in zip(names, axes.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if name in tasks else "normal")
    axes.set_ylim(y, -0.7)
    low, high = min(point.y for _, point in places), max(point.y for _, point in places)
    axes.set_xlim(low - 0.08, high + 0.08)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("score less that of scope all")
    shapes = "Squares act on the response only (hollow: also on a window before it), triangles on the prompt only."
    explain(figure, f"Left of 0: the scope costs. {shapes} Whiskers are 95 % intervals over test rows and seeds.")
    return figure


@style()
def draw_examples(panels: dict[str, list[Point]]):
    """Scores against training examples, a line for each method."""
    figure, axes_of = panel_grid(panels)
    for task, points in panels.items():
        axes, last = axes_of[task], {}
        for name in dict.fromkeys(point.name for point in points):
            own = sorted((point for point in points if point.name == name), key=lambda point: point.x)
            line = dict(color=method_colour(name), linestyle=LINES[marker(name)], linewidth=1)
            axes.plot([point.x for point in own], [point.y for point in own], **line)
            scatter(axes, own)
            last[name] = own[-1]
        sizes = sorted({point.x for point in points})
        axes.set_xticks(sizes, [str(int(one)) for one in sizes])
        axes.minorticks_off()
        axes.set_xlabel("training examples")
        name_points(axes, list(last.values()))
    explain(figure, f"The mean of the seeds, and their range; of several trainings the longest. {SCOPES}")
    return figure


def panel_grid(panels: dict[str, list[Point]]):
    """A figure with a panel for each task, at most three in a row, and the panels by task."""
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    most = max(len({point.name for point in points}) for points in panels.values())
    figure = new_figure(5.2 * columns, lines * max(3.0, 0.9 + 0.17 * most) + 0.5)
    every = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in every[len(panels) :]:
        axes.set_visible(False)
    for axes, task in zip(every, panels, strict=False):
        axes.set_title(escaped(task), pad=14)
        axes.set_xscale("log")
        axes.set_ylabel("score on test data")
    return figure, dict(zip(panels, every, strict=False))


def scatter(axes, points: Sequence[Point]) -> None:
    for point in points:
        whiskers = [[max(0.0, point.y - point.low)], [max(0.0, point.high - point.y)]]
        shape = dict(color=method_colour(point.name), marker=marker(point.name), linewidth=1)
        axes.errorbar([point.x], [point.y], whiskers, **shape)


def name_points(axes, points: Sequence[Point]) -> None:
    """Names in a column at the right of the panel, each with a thin line to its point."""
    low, high = axes.get_ylim()
    heights = dodged([(point.y - low) / (high - low) for point in points], 1 / 19)
    right = axes.get_xlim()[1]
    for point, height in zip(points, heights, strict=True):
        axes.annotate(
            escaped(point.name),
            (point.x or right, point.y),
            (1.04, height),
            textcoords="axes fraction",
            color=method_colour(point.name),
            fontsize="small",
            va="center",
            annotation_clip=False,
            arrowprops=dict(arrowstyle="-", color=method_colour(point.name), linewidth=0.4, alpha=0.6),
        )


def dodged(heights: Sequence[float], gap: float) -> list[float]:
    """Heights in the same order from bottom to top, at least `gap` apart, within 0 and 1 where there is room."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    gap = min(gap, 1 / max(1, len(heights) - 1))
    placed: list[float] = []
    for i in order:
        placed.append(max(heights[i], placed[-1] + gap) if placed else max(0.0, heights[i]))
    for at in reversed(range(len(placed))):
        placed[at] = min(placed[at], placed[at + 1] - gap if at + 1 < len(placed) else 1.0)
    found = [0.0] * len(heights)
    for i, height in zip(order, placed, strict=True):
        found[i] = height
    return found


# ---------------------------------------------------------------------------------------------------------------- ranks


@style()
def draw_ranks(found: Ranking):
    """Mean ranks over tasks, the best on top. Bars join methods that are not told apart."""
    names, groups = list(found.ranks), found.groups()
    figure = new_figure(6.5, 1.5 + 0.3 * len(names))
    axes = figure.subplots()
    worst = len(names)
    step = 0.03 * worst
    for height, name in zip(reversed(range(worst)), names, strict=True):
        rank = found.ranks[name]
        axes.plot([rank], [height], marker(name), color=method_colour(name), markersize=6)
        axes.annotate(
            f"{escaped(name)}  {rank:.2f}", (rank, height), (8, 0), textcoords="offset points", va="center",
            color=method_colour(name), annotation_clip=False,
        )  # fmt: skip
    for i, group in enumerate(groups):
        ends = [worst - 1 - names.index(name) for name in (group[0], group[-1])]
        x = 0.9 - step * (i + 1)
        axes.plot([x, x], [ends[0] + 0.2, ends[1] - 0.2], color="0.45", linewidth=3, solid_capstyle="butt")
    axes.plot([1, 1 + found.critical], [worst + 0.1] * 2, color="black", linewidth=2)
    axes.annotate(f"critical difference {found.critical:.2f}", (1, worst + 0.35))
    axes.set_ylim(-0.7, worst + 0.9)
    axes.set_xlim(0.8 - step * (len(groups) + 1), worst + 1.5)
    axes.set_xticks(range(1, worst + 1))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel(f"mean rank over {found.tasks} tasks (1 is best)")
    told = "Friedman's test does not tell the methods apart" if found.p > LEVEL else "Bars join methods not told apart"
    explain(figure, f"{told} (Nemenyi at {LEVEL:.0%}; Friedman {p_text(found.p)}).")
    return figure
