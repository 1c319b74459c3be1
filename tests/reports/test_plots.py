"""Figures contain the data that they claim to show; their looks were judged by eye."""

import json

import numpy as np
import pytest

from para_jax.io.storage.bucket import BucketPath
from para_jax.reports import plots
from para_jax.reports.plots import curves_plot, factors_plot, save, smoothed, sorted_bins

SITES = ("q_proj", "v_proj")


def run(folder, *, metric="accuracy", steps=20, slope=-0.01):
    """A run folder: the loss falls linearly, with scores at two steps."""
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


def test_learning_curves_show_losses_and_scores_at_their_steps(tmp_path):
    figure = curves_plot([run(tmp_path / "a"), run(tmp_path / "b", slope=-0.02)])
    loss, accuracy = figure.axes
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("loss (nats per token)", "validation accuracy")
    assert accuracy.get_xlabel() == "optimiser step"
    assert named(figure)[:2] == ["a", "b"]
    raw, calm, validation = lines(loss)[:3]
    np.testing.assert_allclose(raw[:, 1], 1 - 0.01 * np.arange(1, 21))
    np.testing.assert_allclose(calm, raw)
    np.testing.assert_array_equal(validation, [[10, 0.5], [20, 0.5]])
    np.testing.assert_array_equal(lines(accuracy)[0], [[10, 0.1], [20, 0.2]])


def test_each_metric_has_a_panel_and_runs_of_equal_names_stay_apart(tmp_path):
    figure = curves_plot([run(tmp_path / "a" / "run"), run(tmp_path / "b" / "run", metric="f1")])
    assert [axes.get_ylabel() for axes in figure.axes[1:]] == ["validation accuracy", "validation f1"]
    a, b = named(figure)[:2]
    assert a.endswith("/a/run") and b.endswith("/b/run")


def test_what_is_no_run_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path}: no run is there"):
        curves_plot([tmp_path])
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "test_before_loss": 1.0}\n')
    with pytest.raises(ValueError, match="no training step is there yet"):
        curves_plot(str(tmp_path))


def test_no_folders_are_an_error_and_a_folder_may_be_in_a_bucket(monkeypatch):
    with pytest.raises(ValueError, match="no folders; give the output_dir"):
        curves_plot([])
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]
    monkeypatch.setattr(plots, "read_runs", lambda folders: {str(folder): {"": rows} for folder in folders})
    assert named(curves_plot(BucketPath("bucket", "runs/a")))[0] == "gs://bucket/runs/a"


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


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_a_figure_is_saved_as_its_suffix_says(tmp_path, suffix, start):
    (tmp_path / f"f{suffix}").write_text("before")
    save(factors_plot({"A": factors(1)}, "t"), tmp_path / f"f{suffix}")
    assert [file.name for file in tmp_path.iterdir()] == [f"f{suffix}"]
    assert (tmp_path / f"f{suffix}").read_bytes().startswith(start)


def test_a_prompt_in_a_title_is_text_and_never_mathematics(tmp_path):
    save(factors_plot({"A": factors(1)}, "'It costs $5.\\nIs that less than $6?'"), tmp_path / "factors.png")


# ------------------------------------------------------------------------------------------------- curves of many runs


def many(folder, count, **how):
    folder.mkdir()
    (folder / "config.yaml").write_text("")
    run(folder / "unused")  # no tenant: it has no config
    for i in range(count):
        run(folder / f"t{i:02}", slope=-0.01 * (1 + i % 3), **how)
        (folder / f"t{i:02}" / "config.yaml").write_text("")
    return folder


def named(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_a_run_of_many_has_a_curve_for_each_tenant(tmp_path):
    folder = many(tmp_path / "run", 3)
    (folder / "t02" / "metrics.jsonl").write_text("")  # waits for a slot
    figure = curves_plot([folder])
    assert named(figure)[:3] == ["t00", "t01", "training, smoothed"]
    other = run(tmp_path / "other")
    assert named(curves_plot([folder, other]))[:3] == ["run/t00", "run/t01", "other"]


def test_more_tenants_are_their_median_and_range_and_said(tmp_path):
    figure = curves_plot([many(tmp_path / "run", 12)])
    assert named(figure)[0] == "run: median of 12"
    median = lines(figure.axes[0])[0]
    np.testing.assert_allclose(median[:, 1], 1 - 0.02 * np.arange(1, 21))
    shade = figure.axes[0].collections[0].get_paths()[0].vertices[:, 1]
    np.testing.assert_allclose((shade.min(), shade.max()), (1 - 0.03 * 20, 1 - 0.01))
