"""Pictures: learning curves, the factors that prompts make, measurements. matplotlib comes with the extra [plot].

Each function returns a matplotlib Figure, which a notebook shows where it is a cell's last value; `save` writes it.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from . import atomic
from .config import expanded
from .evaluation.factors import Spread, root_mean_square
from .training.metrics_file import is_log, read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"base": "black", "PARA": "tab:green", "(IA)^3": "tab:blue"}
#: Columns of a heat map: the units of a site are sorted by their factor, and averaged to this many values.
BINS = 48
FORMATS = (".png", ".pdf", ".svg")
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
    """Writes the figure in the format of the file's suffix, one of FORMATS. Replaces an old file atomically."""
    drawn = io.BytesIO()
    figure.savefig(drawn, format=expanded(file).suffix.removeprefix("."), dpi=120)
    atomic.write_bytes(expanded(file), drawn.getvalue())


def explain(figure: Figure, text: str) -> None:
    """Puts a sentence under the picture that says how to read it."""
    width = int(17 * figure.get_size_inches()[0])  # characters of this size
    figure.supxlabel(textwrap.fill(plain(text), width), fontsize=8, color="0.3")


def plain(text: str) -> str:
    """A text with its dollars escaped, which matplotlib would read as mathematics."""
    return text.replace("$", r"\$")


# ----------------------------------------------------------------------------------------------------- learning curves


def curves_plot(folders: Sequence[str | Path]) -> Figure:
    """The training loss, smoothed, and the validation loss and scores of one or more runs over the optimiser's steps,
    from their metrics.jsonl."""
    runs = dict(zip(run_names(folders), map(read_run, folders), strict=True))
    measured = [
        name.removeprefix("validation_")
        for rows in runs.values()
        for row in rows
        for name in row
        if name.startswith("validation_")
    ]
    metrics = [name for name in dict.fromkeys(measured) if name != "loss" and not name.endswith("_stderr")]
    figure = new_figure(7, 3.2 + 2.4 * len(metrics))
    panels = figure.subplots(1 + len(metrics), 1, sharex=True, squeeze=False, height_ratios=[1.4] + [1] * len(metrics))[
        :, 0
    ]
    for i, (name, rows) in enumerate(runs.items()):
        colour, (steps, losses) = f"C{i % 10}", series(rows, "loss")
        panels[0].plot(steps, losses, color=colour, alpha=0.2, linewidth=0.8)
        panels[0].plot(steps, smoothed(losses), color=colour, label=plain(name))
        panels[0].plot(*series(rows, "validation_loss"), color=colour, marker="o", markersize=4, linestyle="--")
        for axes, metric in zip(panels[1:], metrics, strict=True):
            steps, scores = series(rows, f"validation_{metric}")
            errors = dict(zip(*series(rows, f"validation_{metric}_stderr"), strict=True))
            axes.errorbar(
                steps, scores, [errors.get(s, np.nan) for s in steps], color=colour, marker="o", markersize=4, capsize=2
            )
    panels[0].plot([], [], color="grey", label="training, smoothed")
    panels[0].plot([], [], color="grey", marker="o", markersize=4, linestyle="--", label="validation")
    panels[0].set_ylabel("loss (nats per token)")
    panels[0].set_yscale("log")
    panels[0].yaxis.set_major_formatter("{x:g}")
    panels[0].set_title("Learning curves; bars are one standard error", fontsize=10)
    panels[0].legend(fontsize=8)
    for axes, metric in zip(panels[1:], metrics, strict=True):
        axes.set_ylabel(plain(f"validation {metric}"))
    panels[-1].set_xlabel("optimiser step")
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure


def run_names(folders: Sequence[str | Path]) -> list[str]:
    """The folders' own names, or their paths if two names are equal."""
    names = [expanded(folder).resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def read_run(folder: str | Path) -> list[dict]:
    file = expanded(folder) / "metrics.jsonl"
    if not is_log(file):
        raise ValueError(f"{folder}: no run is there (metrics.jsonl); give the output_dir of `para-jax train`")
    rows = list(read_metrics(file))
    if not any("loss" in row for row in rows):
        raise ValueError(f"{file}: no training step is there yet; wait for the first one")
    return rows


def series(rows: list[dict], name: str) -> tuple[list, list]:
    """The steps at which a run logged `name`, and the values; NaN (a gap) for a value too large to draw."""
    held = [(row["step"], float(row[name])) for row in rows if name in row]
    return [step for step, _ in held], [value if abs(value) < LARGEST else np.nan for _, value in held]


def smoothed(values: Sequence[float]) -> np.ndarray:
    """Each value averaged with its neighbours, a tenth of all values; fewer at both ends, so that no end is bent."""
    held, last = np.asarray(values), len(values) - 1
    reach = [min(len(held) // 20, i, last - i) for i in range(len(held))]
    return np.array([held[i - r : i + r + 1].mean() for i, r in enumerate(reach)])


# ------------------------------------------------------------------------------------------------------------- factors


def factors_plot(factors: Mapping[str, Mapping[str, np.ndarray]], title: str) -> Figure:
    """The factors of one prompt, or of two and their difference, as heat maps: layers down, the units of a site across,
    sorted by value. Colour is l - 1, white at 0, with one scale for all maps: where the difference is as strong as the
    factors themselves, they depend on the prompt.

    Args:
        factors: a prompt's name to its factors l, {site: [layers, site width]}.
    """
    maps = {name: {site: values - 1 for site, values in sites.items()} for name, sites in factors.items()}
    if len(maps) == 2:
        (a, first), (b, second) = maps.items()
        maps[f"{a} − {b}"] = {site: first[site] - second[site] for site in first}
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
            size = root_mean_square(maps[name][site].ravel())
            axes.set_title(f"{site}, rms {size:.3g}", fontsize=8)
        axes_row[0].set_ylabel(f"{name}\nlayer", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("units, sorted (%)", fontsize=8)
    figure.colorbar(image, ax=grid, label="l − 1", extend="both", extendfrac=0.02, aspect=30, pad=0.02)
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure


def sorted_bins(values: np.ndarray) -> np.ndarray:
    """Each layer's values, sorted and averaged over BINS parts of equal size (fewer for fewer values)."""
    ordered = np.sort(values, axis=1)
    parts = np.array_split(ordered, min(BINS, values.shape[1]), axis=1)
    return np.stack([part.mean(axis=1) for part in parts], axis=1)


def spread_plot(spreads: Mapping[str, Spread], title: str) -> Figure:
    """How much factors differ from prompt to prompt, over the layers: a column per site, a colour per adapter. The
    upper row shows the spread over prompts relative to the part that all prompts share. The lower row shows both,
    because the ratio means little in a layer with factors near 1."""
    sites = list(dict.fromkeys(site for spread in spreads.values() for site in spread.size))
    figure = new_figure(1 + 2.8 * len(sites), 5.4)
    grid = figure.subplots(2, len(sites), squeeze=False, sharex=True, sharey="row")
    for column, site in enumerate(sites):
        for i, (name, spread) in enumerate(spreads.items()):
            if site not in spread.size:
                continue
            layers, look = np.arange(len(spread.size[site])), dict(color=f"C{i}", marker="o", markersize=3)
            grid[0, column].plot(layers, spread.ratio[site], **look)
            grid[1, column].plot(layers, spread.spread[site], label=f"{name}: spread over prompts", **look)
            grid[1, column].plot(
                layers,
                spread.size[site],
                label=f"{name}: shared by all prompts",
                **look | {"marker": ""},
                linestyle="--",
            )
        grid[0, column].set_title(site, fontsize=9)
        grid[1, column].set_xlabel("layer")
    for axes, label in zip(grid[:, 0], ("spread / shared", "l − 1, root mean square"), strict=True):
        axes.set_ylabel(label, fontsize=9)
        axes.set_yscale("symlog", linthresh=0.01, linscale=0.3)
        axes.set_ylim(bottom=0)
        axes.yaxis.set_major_formatter("{x:g}")
    for axes in grid.flat:
        axes.grid(alpha=0.3)
    drawn = {line.get_label(): line for axes in grid[1] for line in axes.get_lines()}
    named = [f"{name}: {what}" for name in spreads for what in ("spread over prompts", "shared by all prompts")]
    figure.legend([drawn[text] for text in named], named, loc="outside lower center", ncols=2, fontsize=8)
    figure.suptitle(title, fontsize=9, parse_math=False)
    return figure


# -------------------------------------------------------------------------------------------------------- measurements


def decode_plot(record: dict, file: str | Path) -> None:
    """Draws the record of `para-jax bench decode`: time of a decode step over the number of different tenants in the
    largest batch."""
    rows = max(side["rows"] for side in record["sides"].values())
    lines: dict[str, dict[int, float]] = {}
    for name, side in record["sides"].items():
        if side["rows"] == rows and "bank of 1" not in side["note"]:
            lines.setdefault(side["method"], {})[side["tenants"]] = record["medians"][name]
    figure = new_figure(6.4, 4)
    axes = figure.subplots()
    base = lines.pop("base")[0]
    axes.axhline(base, color=COLOURS["base"], linestyle="--", label="base")
    greys = iter(("tab:orange", "tab:red", "tab:purple"))
    for method, points in lines.items():
        tenants = sorted(points)
        colour = COLOURS.get(method) or next(greys)
        axes.plot(tenants, [points[n] for n in tenants], marker="o", color=colour, label=method)
    axes.set_xscale("log", base=2)
    ticks = sorted({n for points in lines.values() for n in points})
    axes.set_xticks(ticks, [str(n) for n in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(f"different tenants in a batch of {rows} rows")
    axes.set_ylabel("milliseconds per decode step")
    axes.set_title(f"{record['context_tokens']} tokens of context; {record['device']}", fontsize=8)
    axes.legend()
    save(figure, file)
