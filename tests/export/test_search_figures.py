"""Figures of a search: their data, what is drawn, when they are in the report."""

import json

import pytest
from matplotlib.figure import Figure
from run_folder import page, rows

from nemo_minitron.export import search_figures
from nemo_minitron.export.plot import svg

MEASURED = [
    {"name": "a", "parameters": 100, "kept": 0.5, "loss": 3.0},
    {"name": "b", "parameters": 90, "kept": 0.6, "loss": 3.5},
    {"name": "c", "parameters": 110, "kept": 0.7, "loss": 3.2},
    {"name": "d", "parameters": 90, "kept": 0.4, "loss": 3.6},
]
RANKS = [
    {"step": step, "candidate": name, "loss": loss, "rank": rank}
    for step, order in ((2, "abc"), (4, "bac"), (6, "ba"))
    for rank, (name, loss) in enumerate(zip(order, (1.0, 1.5, 2.0), strict=False), 1)
]


@pytest.mark.parametrize(("without", "front"), [((), {"a", "b"}), (("loss",), {"b", "c"}), (("loss", "kept"), set())])
def test_who_is_on_the_front(without, front):
    """By the loss where it was measured (less is better), else by what is kept (more is)."""
    given = [{name: value for name, value in row.items() if name not in without} for row in MEASURED]
    plot = search_figures.pareto(given)
    assert {name for name, *_, on in plot.rows if on} == front
    assert svg(plot) == svg(plot)


def test_only_what_was_measured_is_shown():
    plot = search_figures.pareto([*MEASURED[:2], {**MEASURED[2], "loss": None}])
    assert [row[0] for row in plot.rows] == ["a", "b"]


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


def test_the_report_shows_a_search_where_there_was_one(run):
    assert "The search" not in page(run).words
    (run / "search").mkdir()
    (run / "search" / "measured.json").write_text(json.dumps(MEASURED))
    (run / "search" / "ranks.json").write_text(json.dumps(RANKS))
    assert {"The search", "Shapes of the search", "Ranks of brief distillation"} <= set(page(run).words)
    assert [row["name"] for row in rows(run, "pareto")] == ["a", "b", "c", "d"]
    assert len(rows(run, "ranks")) == len(RANKS)
