"""Bars of scores: what is drawn is what was given. Their looks were judged by eye."""

import math

import pytest

from para_jax.evaluation.score_plots import Bar, Scores, scores_plot
from para_jax.reports.plots import save


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_bars_show_scores_errors_and_the_base_model():
    bars = {"PARA": Bar(0.9, 0.04, 60), "LoRA": Bar(0.7, 0.06, 60)}
    figure = scores_plot({"mine": Scores("accuracy", bars, Bar(0.3, 0.05, 60))})
    (axes,) = figure.axes
    assert [patch.get_width() for patch in axes.patches[:2]] == [0.9, 0.7] and texts(axes) == [
        "0.900 ± 0.040",
        "0.700 ± 0.060",
    ]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["PARA", "LoRA"]
    assert axes.get_title() == "mine, 60 examples, base model 0.300 ± 0.050"
    assert axes.get_xlabel() == "accuracy, higher is better"
    assert [line.get_xdata()[0] for line in axes.get_lines() if line.get_linestyle() == "--"] == [0.3]
    assert axes.patches[-1].get_x() == 0.25 and axes.patches[-1].get_width() == pytest.approx(0.1)
    assert "one standard error" in figure.get_supxlabel()


def test_bars_of_other_examples_say_how_many_and_a_loss_is_lower_is_better():
    bars = {"a": Bar(0.4, None, 9), "b": Bar(0.5, None, 7)}
    (axes,) = scores_plot({"t": Scores("loss", bars)}).axes
    assert texts(axes) == ["0.400", "0.500"] and "lower is better" in axes.get_xlabel()
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a (9)", "b (7)"]


def test_values_that_cannot_be_drawn_and_names_with_dollars_are_no_error(tmp_path):
    bars = {"$5 and $\\bad{$": Bar(math.nan, math.nan), "b": Bar(1e300, math.inf, 3), "c": Bar(-0.5, 0.1)}
    save(scores_plot({"$\\bad{$": Scores("$\\x{$", bars, Bar(math.inf))}), tmp_path / "s.svg")
    with pytest.raises(ValueError, match="no scores"):
        scores_plot({})
