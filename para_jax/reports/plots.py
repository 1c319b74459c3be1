"""Pictures: learning curves, the factors that prompts make, measurements. matplotlib comes with the extra [plot].

Each function returns a matplotlib Figure, which a notebook shows if it is the last value of a cell; `save` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..evaluation.score_plots import shorten_name
from ..io.checks import expanded
from ..io.figures import COLOURS, drawable, escaped, explain, method_colour, new_figure, run_names, style
from ..io.figures import save as save
from ..io.storage.bucket import BucketPath, Place
from ..training.metrics_file import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Columns of a heat map: the units of a site are sorted by their factor, and averaged to this many values.
BINS = 48


# ----------------------------------------------------------------------------------------------------- learning curves

#: More curves of one run than this are drawn as their median and range.
MAX_CURVES = 10


@style()
def curves_plot(folders: str | Place | Sequence[str | Place]) -> Figure:
    """The training loss, smoothed, and the validation loss and scores of one or more runs over the optimiser's steps,
    from their metrics.jsonl. A run of many tenants has a curve for each tenant; with more than MAX_CURVES, the median
    of all and their range. Raises ValueError for a folder without a run, and for no folders.

    >>> curves_plot(["runs/mine"]).savefig("curves.png")
    """
    folders = [folders] if isinstance(folders, str | Path | BucketPath) else folders
    if not folders:
        raise ValueError("curves_plot: no folders; give the output_dir of one or more runs")
    runs = read_runs(folders)
    metrics = validation_metrics([rows for tenants in runs.values() for rows in tenants.values()])
    figure = new_figure(7, 3.9 + 2.1 * len(metrics))
    panels = figure.subplots(1 + len(metrics), 1, squeeze=False, height_ratios=[3.0] + [2.1] * len(metrics))[:, 0]
    for colour, (name, tenants) in zip(colours_of(len(runs)), runs.items(), strict=True):
        draw_losses(panels[0], name, list(tenants.values()), colour)
        for metric, axes in zip(metrics, panels[1:], strict=True):
            draw_scores(axes, metric, list(tenants.values()), colour)
    panels[0].set_ylabel("loss (nats per token)")
    name_curves(figure, panels[0])
    for metric, axes in zip(metrics, panels[1:], strict=True):
        axes.set_ylabel(escaped(f"validation {metric}"))
    for axes in panels:
        plain_axes(axes)
        axes.set_xlim(panels[0].get_xlim())
    panels[-1].set_xlabel("optimiser step")
    explain(
        figure,
        "A loss that falls is good; a validation loss that rises while training falls is overfitting. Bars are one "
        "standard error over the examples; shades span the lowest to the highest tenant.",
    )
    return figure


def colours_of(count: int) -> list[str]:
    """This number of different colours: those of all pictures, or of a map if there are not enough."""
    from matplotlib import colormaps, colors

    if count <= len(COLOURS):
        return COLOURS[:count]
    return [colors.to_hex(colormaps["viridis"](0.95 * i / (count - 1))) for i in range(count)]


def draw_losses(axes, name: str, tenants: list[list[dict]], colour: str) -> None:
    if len(tenants) > 1:
        label = escaped(f"{name}: median of {len(tenants)}")
        draw_range(axes, [smoothed_series(rows) for rows in tenants], colour, label=label)
        draw_range(axes, [series(rows, "validation_loss") for rows in tenants], colour, linestyle="--")
        return
    (rows,) = tenants
    axes.plot(*series(rows, "loss"), color=colour, alpha=0.2, linewidth=0.8)
    axes.plot(*smoothed_series(rows), color=colour, label=escaped(shorten_name(name, 60)))
    axes.plot(*series(rows, "validation_loss"), color=colour, marker="o", linestyle="--")


def draw_scores(axes, metric: str, tenants: list[list[dict]], colour: str) -> None:
    if len(tenants) > 1:
        draw_range(axes, [series(rows, f"validation_{metric}") for rows in tenants], colour, marker="o")
        return
    (rows,) = tenants
    steps, scores = series(rows, f"validation_{metric}")
    held = dict(zip(*series(rows, f"validation_{metric}_stderr"), strict=True))
    errors = [held.get(step, np.nan) for step in steps]
    axes.errorbar(steps, scores, errors, color=colour, marker="o")


def draw_range(axes, curves: Sequence[tuple[list, Sequence[float] | np.ndarray]], colour: str, **look) -> None:
    """The median of many curves at each step, and the range from the lowest to the highest."""
    at: dict[int, list[float]] = {}
    for curve in curves:
        for step, value in zip(*curve, strict=True):
            if np.isfinite(value):
                at.setdefault(step, []).append(value)
    steps = sorted(at)
    low, middle, high = ([of(at[step]) for step in steps] for of in (min, np.median, max))
    axes.plot(steps, middle, color=colour, **look)
    axes.fill_between(steps, low, high, color=colour, alpha=0.15, lw=0)


def name_curves(figure: Figure, losses) -> None:
    """The legend of the losses' curves, above the picture."""
    losses.plot([], [], color="grey", label="training, smoothed")
    losses.plot([], [], color="grey", marker="o", linestyle="--", label="validation")
    figure.legend(*losses.get_legend_handles_labels(), loc="outside upper center", ncols=2)


def plain_axes(axes) -> None:
    """Whole steps below, and plain numbers at the side, on a logarithmic scale where losses differ much."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    low, high = axes.dataLim.intervaly
    if axes.get_ylabel().startswith("loss") and 0 < 5 * low < high:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter("{x:g}")


def validation_metrics(runs: Sequence[list[dict]]) -> list[str]:
    """The metrics that some run was scored by on its validation data, besides the loss."""
    names = dict.fromkeys(name for rows in runs for row in rows for name in row if name.startswith("validation_"))
    measured = [name.removeprefix("validation_") for name in names if not name.endswith("_stderr")]
    return [name for name in measured if name != "loss"]


def read_runs(folders: Sequence[str | Path]) -> dict[str, dict[str, list[dict]]]:
    """The rows of each curve to draw, {name: {tenant: rows}}. A run of more than MAX_CURVES tenants is one name with
    all of them; with fewer, each tenant is a name of its own."""
    found: dict[str, dict[str, list[dict]]] = {}
    for name, folder in zip(run_names(folders), folders, strict=True):
        tenants = sorted(file.parent.name for file in expanded(folder).glob("*/config.yaml"))
        logs = {tenant: rows for tenant in tenants if (rows := rows_of_tenant(expanded(folder) / tenant))}
        if len(logs) > MAX_CURVES:
            found[name] = logs
        elif logs:
            prefix = f"{name}/" if len(folders) > 1 else ""
            found |= {f"{prefix}{tenant}": {tenant: rows} for tenant, rows in logs.items()}
        else:
            found[name] = {name: read_run(folder)}
    return found


def rows_of_tenant(folder) -> list[dict]:
    """The rows of a tenant's log; none before its first step."""
    rows = list(read_metrics(folder / "metrics.jsonl")) if (folder / "metrics.jsonl").is_file() else []
    return rows if any("loss" in row for row in rows) else []


def read_run(folder: str | Path) -> list[dict]:
    file = expanded(folder) / "metrics.jsonl"
    if not file.is_file():
        raise ValueError(f"{folder}: no run is there (metrics.jsonl); give the output_dir of `para-jax train`")
    rows = list(read_metrics(file))
    if not any("loss" in row for row in rows):
        raise ValueError(f"{file}: no training step is there yet; wait for the first one")
    return rows


def series(rows: list[dict], name: str) -> tuple[list, list]:
    """The steps at which a run logged `name`, and the values; NaN (a gap) for a value too large to draw."""
    held = [(row["step"], float(row[name])) for row in rows if name in row]
    return [step for step, _ in held], [drawable(value) for _, value in held]


def smoothed_series(rows: list[dict]) -> tuple[list, np.ndarray]:
    steps, values = series(rows, "loss")
    return steps, smoothed(values)


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Each value averaged with its neighbours, a tenth of all values; fewer at both ends, so that no end is bent."""
    held, last = np.asarray(values), len(values) - 1
    reach = [min(len(held) // 20, i, last - i) for i in range(len(held))]
    return np.array([held[i - r : i + r + 1].mean() for i, r in enumerate(reach)])


# ------------------------------------------------------------------------------------------------------------- factors


@style()
def factors_plot(factors: Mapping[str, Mapping[str, np.ndarray]], title: str) -> Figure:
    """The factors of one prompt, or of two and their difference, as heat maps: layers down, the units of a site across,
    sorted by value. Colour is l - 1, white at 0, with one scale for all maps: where the difference is as strong as the
    factors themselves, they depend on the prompt.

    Args:
        factors: a prompt's name to its factors l, {site: [layers, site width]}.

    >>> factors = {site: l[:, 0] for site, l in vectors(model, adapter, tokens, 5).items()}
    >>> factors_plot({"The capital of France is": factors}, "one tenant").savefig("factors.png")
    """
    maps = {name: {site: values - 1 for site, values in sites.items()} for name, sites in factors.items()}
    if len(maps) == 2:
        (a, first), (b, second) = maps.items()
        both = f"{a} − {b}" if len(a) + len(b) <= 20 else "the first − the second"
        maps[both] = {site: first[site] - second[site] for site in first}
    sites = list(next(iter(maps.values())))
    binned = {name: {site: sorted_bins(values) for site, values in of_name.items()} for name, of_name in maps.items()}
    scale = max(np.quantile(abs(bins), 0.98) for of_name in binned.values() for bins in of_name.values()) or 1e-9
    figure = new_figure(1.2 + 2.6 * len(sites), 0.9 + 2.7 * len(maps))
    grid = figure.subplots(len(maps), len(sites), squeeze=False, sharex=True, sharey=True)
    for axes_row, (name, of_name) in zip(grid, binned.items(), strict=True):
        for axes, (site, bins) in zip(axes_row, of_name.items(), strict=True):
            image = axes.imshow(
                bins,
                cmap="RdBu_r",
                vmin=-scale,
                vmax=scale,
                aspect="auto",
                interpolation="nearest",
                extent=(0, 100, len(bins) - 0.5, -0.5),
            )
            axes.set_title(f"{site}, rms {np.sqrt((maps[name][site] ** 2).mean()):.3g}")
            axes.grid(visible=False)
        axes_row[0].set_ylabel(f"{escaped(shorten_name(name))}\nlayer")
    for axes in grid[-1]:
        axes.set_xlabel("units, sorted (%)")
    figure.colorbar(image, ax=grid, label="l − 1", extend="both", extendfrac=0.02, aspect=30, pad=0.02)
    figure.suptitle(title, fontsize="medium", parse_math=False)
    said = (
        "A factor l multiplies one unit of a linear layer's output. l − 1 is 0 (white) where the adapter changes "
        "nothing. Units are sorted in each layer from the smallest factor to the largest; rms is the root mean square "
        "of l − 1."
    )
    if len(factors) == 2:
        said += " If the last row is as strong as the others, the factors depend on the prompt."
    explain(figure, said)
    return figure


def sorted_bins(values: np.ndarray) -> np.ndarray:
    """Each layer's values, sorted and averaged over BINS parts of equal size (fewer for fewer values)."""
    ordered = np.sort(values, axis=1)
    parts = np.array_split(ordered, min(BINS, values.shape[1]), axis=1)
    return np.stack([part.mean(axis=1) for part in parts], axis=1)


# -------------------------------------------------------------------------------------------------------- measurements


@style()
def decode_plot(record: dict, file: str | Path) -> None:
    """Draws the record of `para-jax bench decode`: time of a decode step over the number of different tenants in the
    largest batch."""
    rows = max(side["rows"] for side in record["sides"].values())
    lines: dict[str, dict[int, str]] = {}
    for name, side in record["sides"].items():
        if side["rows"] == rows and "bank of 1" not in side["note"]:
            lines.setdefault(side["method"], {})[side["tenants"]] = name
    figure = new_figure(6.4, 4)
    axes = figure.subplots()
    axes.axhline(record["medians"][lines.pop("base")[0]], color="black", linestyle="--", label="base")
    for marker, (method, points) in zip("osD^v", lines.items(), strict=False):
        tenants = sorted(points)
        rounds = [[measured[points[n]] for measured in record["rounds"]] for n in tenants]
        reach = min(0.5, 0.98 / len(record["rounds"]) ** 0.5)  # of the ranks around the median, by the normal law
        low, middle, high = np.quantile(rounds, (0.5 - reach, 0.5, 0.5 + reach), axis=1)
        errors, colour = (middle - low, high - middle), method_colour(method)
        axes.errorbar(tenants, middle, errors, marker=marker, color=colour, label=method)
    axes.set_xscale("log", base=2)
    ticks = sorted({n for points in lines.values() for n in points})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"different tenants in a batch of {rows} rows")
    axes.set_ylabel("milliseconds per decode step")
    _, _, backbone = record["command"].partition("--backbone ")
    title = f"{backbone.split(' ')[0]}; {record['context_tokens']} tokens of context; {record['device']}"
    axes.set_title(title)
    axes.legend()
    explain(figure, "The medians of the rounds, with their 95 % intervals.")
    save(figure, file)
