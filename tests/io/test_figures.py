"""A figure shows itself in a notebook, and a sentence under it fits its width."""

import subprocess
import sys

import matplotlib
import pytest

from para_jax.io.figures import explain, new_figure, run_names, style


def test_a_sentence_is_wrapped_to_the_width_and_is_no_mathematics():
    figure = new_figure(2, 2)
    explain(figure, "costs $5 " * 20)
    lines = figure.get_supxlabel().splitlines()
    assert len(lines) > 3 and max(map(len, lines)) <= 34 and lines[0].startswith(r"costs \$5")


def test_runs_are_named_by_their_folders_or_by_paths_if_these_are_equal(tmp_path):
    assert run_names([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert run_names(["a/run", "b/run"]) == ["a/run", "b/run"]


@pytest.mark.long
def test_a_notebook_shows_a_figure_without_pyplot():
    code = (
        "import sys; from para_jax.io.figures import new_figure; f = new_figure(2, 2); f.subplots(); "
        "assert f._repr_png_().startswith(b'\\x89PNG'); assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_missing_matplotlib_is_named_with_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ValueError, match=r"matplotlib is not installed; `pip install 'para_jax\[plot\]'`"):
        style()(new_figure)(2, 2)


def test_the_style_lasts_while_a_picture_is_made_and_shown():
    figure = new_figure(2, 2)
    axes = style()(figure.subplots)()
    figure.draw_without_rendering()
    assert matplotlib.rcParams["font.size"] != 9
    assert {tick.label1.get_fontsize() for tick in axes.xaxis.get_major_ticks()} == {9}
