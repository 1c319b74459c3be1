"""Pictures of measurements. matplotlib comes with the extra [plot]."""

from __future__ import annotations

from pathlib import Path

COLOURS = {"base": "black", "PARA": "tab:green", "(IA)^3": "tab:blue"}


def decode_plot(record: dict, file: str | Path) -> None:
    """Draws the record of `para-jax bench decode`: time of a decode step over the number of different tenants in the
    largest batch."""
    from matplotlib.figure import Figure

    rows = max(side["rows"] for side in record["sides"].values())
    lines: dict[str, dict[int, float]] = {}
    for name, side in record["sides"].items():
        if side["rows"] == rows and "bank of 1" not in side["note"]:
            lines.setdefault(side["method"], {})[side["tenants"]] = record["medians"][name]
    figure = Figure(figsize=(6.4, 4), layout="constrained")
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
    axes.set_ylabel("milliseconds a decode step")
    axes.set_title(f"{record['context_tokens']} tokens of context; {record['device']}", fontsize=8)
    axes.legend()
    figure.savefig(file, dpi=120)
