"""Pictures hold what they are said to show; how they look was after_score by eye."""

import json
import subprocess
import sys

import numpy as np
import pytest

from para_jax.evaluation.factors import Spread
from para_jax.plots import curves_plot, factors_plot, save, smoothed, sorted_bins, spread_plot

SITES = ("q_proj", "v_proj")


def run(folder, *, metric="accuracy", steps=20, slope=-0.01):
    """A run folder whose loss falls on a line, scored at two steps."""
    folder.mkdir(parents=True)
    rows = [{"step": i, "loss": 1 + slope * i, "grad_norm": 1.0} for i in range(1, steps + 1)]
    rows += [
        {"step": i, "validation_loss": 0.5, f"validation_{metric}": i / 100, f"validation_{metric}_stderr": 0.01}
        for i in (10, 20)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 21, "lo')
    return folder


def lines(axes):
    return [line.get_xydata() for line in axes.get_lines() if len(line.get_xydata())]


def factors(seed, width=100):
    draw = np.random.default_rng(seed)
    return {site: (1 + draw.normal(0, 0.1, (3, width))).astype(np.float32) for site in SITES}


@pytest.mark.parametrize("count", [1, 2, 20, 137])
def test_smoothing_leaves_a_line_as_it_is_and_calms_what_jumps(count):
    line = np.arange(count) * 0.5 - 3
    np.testing.assert_allclose(smoothed(line), line, atol=1e-12)
    noise = np.random.default_rng(0).normal(size=count)
    assert len(smoothed(noise)) == count and (count < 20 or smoothed(noise).std() < noise.std())


def test_learning_curves_show_each_run_s_losses_and_scores_at_their_steps(tmp_path):
    figure = curves_plot([run(tmp_path / "a"), run(tmp_path / "b", slope=-0.02)])
    loss, accuracy = figure.axes
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("loss (nats a token)", "validation accuracy")
    assert accuracy.get_xlabel() == "optimiser step"
    assert [text.get_text() for text in loss.get_legend().get_texts()][:2] == ["a", "b"]
    raw, calm, validation = lines(loss)[:3]
    np.testing.assert_allclose(raw[:, 1], 1 - 0.01 * np.arange(1, 21))
    np.testing.assert_allclose(calm, raw)
    np.testing.assert_array_equal(validation, [[10, 0.5], [20, 0.5]])
    np.testing.assert_array_equal(lines(accuracy)[0], [[10, 0.1], [20, 0.2]])


def test_runs_of_different_metrics_have_a_panel_each_and_equal_names_are_told_apart(tmp_path):
    figure = curves_plot([run(tmp_path / "a" / "run"), run(tmp_path / "b" / "run", metric="f1")])
    assert [axes.get_ylabel() for axes in figure.axes[1:]] == ["validation accuracy", "validation f1"]
    named = [text.get_text() for text in figure.axes[0].get_legend().get_texts()][:2]
    assert named == [str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")]


def test_a_run_that_is_called_by_dollars_is_drawn_with_them(tmp_path):
    figure = curves_plot([run(tmp_path / "$5 and $\\bad{$", metric="$\\bad{$")])
    save(figure, tmp_path / "curves.svg")
    assert (tmp_path / "curves.svg").stat().st_size > 1000


@pytest.mark.filterwarnings("ignore:Data has no positive values")
def test_numbers_that_no_run_measures_are_drawn_or_left_out(tmp_path):
    for i, value in enumerate(("NaN", "Infinity", "-Infinity", "1e308", "1e29", "-5", "0", "1e-320", "1" + "0" * 300)):
        folder = run(tmp_path / str(i))
        rows = [f'{{"step": {step}, "loss": {value}}}\n' for step in (1, 2, 2**62)]
        (folder / "metrics.jsonl").write_text("".join(rows) + f'{{"step": 1, "validation_accuracy": {value}}}\n')
        save(curves_plot([folder]), tmp_path / "curves.png")


def test_a_log_of_another_form_is_refused_by_file_and_line(tmp_path):
    folder = run(tmp_path / "a")
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n5\n')
    with pytest.raises(ValueError, match=f"{folder}/metrics.jsonl:2: '5'"):
        curves_plot([folder])


def test_what_is_no_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no run is there"):
        curves_plot([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "test_before_loss": 1.0}\n')
    with pytest.raises(ValueError, match="no training step is there yet"):
        curves_plot([tmp_path])


def test_bins_are_averages_of_sorted_units():
    values = np.array([[3.0, 1, 2, 4], [0, 0, -8, 0]])
    np.testing.assert_array_equal(sorted_bins(values), [[1, 2, 3, 4], [-8, 0, 0, 0]])
    many = np.random.default_rng(0).normal(size=(2, 960))
    bins = sorted_bins(many)
    assert bins.shape == (2, 48) and (np.diff(bins, axis=1) > 0).all()
    np.testing.assert_allclose(bins.mean(axis=1), many.mean(axis=1))


def test_two_prompts_and_their_difference_have_one_colour_scale_around_zero():
    a, b = factors(1), factors(2)
    figure = factors_plot({"A": a, "B": b}, "Factors of x")
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == 3 * len(SITES)
    assert len({image.get_clim() for image in images}) == 1
    low, high = images[0].get_clim()
    assert low == -high < 0 and images[0].get_cmap().name == "RdBu_r"
    np.testing.assert_allclose(images[0].get_array(), sorted_bins(a["q_proj"] - 1))
    np.testing.assert_allclose(images[-1].get_array(), sorted_bins(a["v_proj"] - b["v_proj"]))
    assert "Factors of x" in figure.get_suptitle() and figure.axes[4].get_ylabel().startswith("A − B")


def test_one_prompt_has_a_map_a_site_and_a_fresh_adapter_s_maps_are_blank():
    figure = factors_plot({"A": {site: np.ones((3, 8), np.float32) for site in SITES}}, "t")
    images = [axes.images[0] for axes in figure.axes if axes.images]
    assert len(images) == len(SITES) and all((image.get_array() == 0).all() for image in images)


def test_the_spread_is_drawn_over_the_layers_a_column_a_site_and_a_colour_an_adapter():
    size, spread = ({site: np.array([0.5, 0.2, 0.1]) * k for site in SITES} for k in (1, 0.3))
    figure = spread_plot({"raw": Spread(size, spread, 9), "rms": Spread(size, size, 9)}, "t")
    assert len(figure.axes) == 4 and [axes.get_title() for axes in figure.axes[:2]] == list(SITES)
    raw, rms = lines(figure.axes[0])
    np.testing.assert_allclose(raw, [[0, 0.3], [1, 0.3], [2, 0.3]])
    np.testing.assert_allclose(rms[:, 1], 1)
    assert len(lines(figure.axes[2])) == 4  # each adapter's spread and size
    named = [text.get_text() for text in figure.legends[0].get_texts()]
    assert named[0].startswith("raw: spread") and named[-1].startswith("rms: shared")


def test_an_adapter_has_one_colour_and_one_legend_entry_whichever_sites_it_has():
    q, v, both = ({site: np.array([0.5, 0.2]) for site in sites} for sites in (SITES[:1], SITES[1:], SITES))
    spreads = {name: Spread(size, size, 9) for name, size in {"q": q, "v": v, "both": both}.items()}
    figure = spread_plot(spreads, "t")
    colours = [[line.get_color() for line in axes.get_lines() if len(line.get_xydata())] for axes in figure.axes[:2]]
    assert colours == [["C0", "C2"], ["C1", "C2"]]
    legend = figure.legends[0]
    assert [text.get_text().split(":")[0] for text in legend.get_texts()] == ["q", "q", "v", "v", "both", "both"]
    assert [line.get_color() for line in legend.get_lines()] == ["C0", "C0", "C1", "C1", "C2", "C2"]


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_a_figure_is_saved_as_its_suffix_says(tmp_path, suffix, start):
    (tmp_path / f"f{suffix}").write_text("before")
    save(factors_plot({"A": factors(1)}, "t"), tmp_path / f"f{suffix}")
    assert [file.name for file in tmp_path.iterdir()] == [f"f{suffix}"]
    assert (tmp_path / f"f{suffix}").read_bytes().startswith(start)


def test_a_prompt_in_a_title_is_text_and_never_mathematics(tmp_path):
    title = repr("It costs $5.\nIs that less than $6?")  # as the command shows a prompt
    size = {site: np.array([0.5, 0.2]) for site in SITES}
    save(factors_plot({"A": factors(1)}, title), tmp_path / "factors.png")
    save(spread_plot({"A": Spread(size, size, 9)}, title), tmp_path / "spread.png")


def test_a_notebook_shows_a_figure_without_pyplot():
    code = (
        "import sys; from para_jax.plots import new_figure; f = new_figure(2, 2); f.subplots(); "
        "assert f._repr_png_().startswith(b'\\x89PNG'); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_matplotlib_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"matplotlib is not installed; `pip install 'para_jax\[plot\]'`"):
        factors_plot({"A": factors(1)}, "t")
