"""The figure of dropped layers: its data, its place in the report, its lines."""

import pytest
from run_folder import SOURCE, page, rows

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.export import importance_figures, write_report
from nemo_minitron.export.run import read_run

LOSS = {(0, -1): 2.0} | {(i, i): v for i, v in enumerate([9.0, 2.2, 2.5, 2.4])}
LOSS |= {(i, i + 1): v for i, v in enumerate([9.5, 3.0, 4.0])}
ACCURACY = {(0, -1): 0.75, (0, 0): 0.25, (1, 1): 0.5, (2, 2): 0.5, (3, 3): 0.625}


@pytest.fixture
def scanned(run, scores):
    scores.depth = {"loss": LOSS, "accuracy": ACCURACY, "removal": {(2, 2): 0.1}}
    scores.save(run / "scores.safetensors")
    return run


def test_a_run_without_a_scan_says_nothing_of_it(run):
    assert "Dropped layers" not in page(run).words
    assert not (run / "figures/depth.svg").exists()


def test_csv_of_the_scan(scanned):
    write_report(scanned)
    data = rows(scanned, "depth")
    for name, wanted in {"loss": LOSS, "accuracy": ACCURACY}.items():
        found = [row for row in data if row["criterion"] == name]
        assert {(int(r["first"]), int(r["last"])): float(r["value"]) for r in found} == wanted
        assert [int(r["layers_dropped"]) for r in found] == [last - first + 1 for first, last in wanted]
    assert len(data) == len(LOSS) + len(ACCURACY)


def test_lines_and_the_baseline(scanned):
    """Read off matplotlib's own objects: a line for each size, in the order of layers; the baseline dashed."""
    from matplotlib.figure import Figure

    figure = Figure()
    importance_figures.depth(read_run(scanned)).draw(figure)
    loss, accuracy = figure.axes
    lines = {line.get_label(): line for line in loss.lines}
    assert lines["1 layer dropped"].get_xydata().tolist() == [[0, 9.0], [1, 2.2], [2, 2.5], [3, 2.4]]
    assert lines["2 layers dropped"].get_xydata().tolist() == [[0, 9.5], [1, 3.0], [2, 4.0]]
    assert set(lines["nothing dropped"].get_ydata()) == {2.0}
    assert lines["nothing dropped"].get_linestyle() == "--"
    assert (loss.get_yscale(), accuracy.get_yscale()) == ("log", "linear")
    assert accuracy.get_xlabel() == "first dropped layer"


def test_the_plan_is_marked_and_the_report_shows_it(scanned):
    PrunePlan(SOURCE, SOURCE.replace(num_layers=2), {"layers": [0, 3]}).save(scanned / "plan.json")
    shown = page(scanned)
    assert "Dropped layers" in shown.words
    assert "The plan cuts layers 1 to 2" in " ".join(shown.words)
    assert "the plan's block" in (scanned / "figures/depth.svg").read_text()
    PrunePlan(SOURCE, SOURCE.replace(num_layers=2), {"layers": [0, 2]}).save(scanned / "plan.json")
    write_report(scanned)
    assert "the plan's block" not in (scanned / "figures/depth.svg").read_text()
