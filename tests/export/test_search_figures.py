"""Figures of a search: their data, what is drawn, when they are in the report."""

import json

import pytest
from matplotlib.figure import Figure
from run_folder import MEASURED, RANKS, page, rows

from nemo_minitron.export import search_figures
from nemo_minitron.export.plot import NARROW, WIDTH, svg


@pytest.mark.parametrize(("without", "front"), [((), {"a", "b"}), (("loss",), {"b", "c"}), (("loss", "kept"), set())])
def test_who_is_on_the_front(without, front):
    """By the loss where it was measured (less is better), else by what is kept (more is)."""
    given = [{name: value for name, value in row.items() if name not in without} for row in MEASURED]
    plot = search_figures.pareto(given)
    assert {name for name, _, _, on, _ in plot.rows if on} == front
    assert svg(plot) == svg(plot)


def test_only_what_was_measured_is_shown():
    plot = search_figures.pareto([*MEASURED[:2], {**MEASURED[2], "loss": None}])
    assert [row[0] for row in plot.rows] == ["a", "b"]


def test_the_chosen_plan_is_marked():
    """It need not be on the front: the loss before retraining does not decide."""
    plot, figure = search_figures.pareto(MEASURED, chosen="d"), Figure()
    assert [row[0] for row in plot.rows if row[-1]] == ["d"]
    plot.draw(figure)
    marked = [line.get_xydata().tolist() for line in figure.axes[0].lines if line.get_label() == "the chosen plan"]
    assert marked == [[[90, 3.6]]]
    assert plot.caption.endswith("The star is the plan that was chosen, d.")
    assert "star" not in search_figures.pareto(MEASURED).caption


def test_lines_of_ranks_end_where_a_candidate_stopped():
    figure = Figure()
    plot = search_figures.ranks(RANKS)
    plot.draw(figure)
    above, below = figure.axes
    lines = {line.get_label(): line.get_xydata().tolist() for line in above.lines}
    assert lines == {"a": [[2, 1], [4, 2], [6, 2]], "b": [[2, 2], [4, 1], [6, 1]], "c": [[2, 3], [4, 3]]}
    assert below.lines[0].get_ydata().tolist() == [1.0, 1.5, 1.5]
    assert above.get_ylim() == (3.5, 0.5)  # the first on top
    assert plot.caption.startswith("b wins")


@pytest.mark.parametrize("width", [WIDTH, NARROW])
def test_long_names_leave_the_lines_their_room(width):
    """On a phone the legend stands above; beside the axes it took three quarters of the width."""
    long = [row | {"candidate": f"layers28-hidden576-ffn{row['candidate']}"} for row in RANKS]
    figure = Figure(figsize=(width, 4.6), layout="constrained")
    search_figures.ranks(long).draw(figure)
    figure.draw_without_rendering()
    assert all(axes.get_position().width > 0.5 for axes in figure.axes)


def test_the_report_shows_a_search_where_there_was_one(run):
    assert "The search" not in page(run).words
    (run / "search").mkdir()
    (run / "search" / "measured.json").write_text(json.dumps(MEASURED))
    (run / "search" / "ranks.json").write_text(json.dumps(RANKS))
    assert {"The search", "Shapes of the search", "Ranks of brief distillation"} <= set(page(run).words)
    assert [row["name"] for row in rows(run, "pareto") if row["chosen"] == "1"] == ["b"]  # first at the last step
    assert [row["name"] for row in rows(run, "pareto")] == ["a", "b", "c", "d"]
    assert len(rows(run, "ranks")) == len(RANKS)
