"""The figure of the held-out loss along a distillation: errors by window, and when more tokens stopped to pay."""

import numpy as np
import pytest
from run_folder import page, rows, write

from nemo_minitron.errors import InputError
from nemo_minitron.export.run import RunFiles, read_run
from nemo_minitron.export.trajectory_figures import stopped_paying, task_rows, trajectory

HARD = np.arange(8) * 2.0  # how hard each window is: no noise of a difference
NOISE = np.array([0.02, -0.02, 0.01, -0.01, 0.02, -0.02, 0.01, -0.01])


def mark(step, gap, text="wiki", noise=NOISE):
    losses = (3 + HARD + gap + noise).tolist()
    error = float(np.std(losses, ddof=1) / 8**0.5)
    return {"step": step, "tokens": 512 * step, "text": text, "loss": float(np.mean(losses)), "loss_error": error,
            "losses": losses}  # fmt: skip


def teacher(text="wiki"):
    return {"text": text, "loss": 3.0, "loss_error": 1.0, "losses": (3 + HARD).tolist()}


def files(tmp_path, marks, *teachers, tasks=()):
    found = {"identity": "x", "teacher": teachers or [teacher()], "rows": marks, "tasks": list(tasks)}
    return RunFiles(tmp_path, trajectory=found)


FALLING = [mark(0, 1.0), mark(10, 0.5, noise=-NOISE), mark(20, 0.3)]
FLAT = [*FALLING, mark(30, 0.299), mark(40, 0.298, noise=-NOISE)]


def test_the_gap_and_its_error_are_of_the_same_windows(tmp_path):
    plot = trajectory(files(tmp_path, FALLING))
    assert [row[:3] for row in plot.rows] == [("wiki", 0, 0), ("wiki", 10, 5120), ("wiki", 20, 10240)]
    for row, gap in zip(plot.rows, (1.0, 0.5, 0.3), strict=True):
        assert row[5] == pytest.approx(gap)
        assert row[6] == pytest.approx(NOISE.std(ddof=1) / 8**0.5)
        assert row[4] > 100 * row[6]  # the error of the loss itself counts how the windows differ


def test_while_it_falls_more_tokens_pay(tmp_path):
    assert stopped_paying(FALLING) is None
    caption = trajectory(files(tmp_path, FALLING)).caption
    assert (
        "On wiki the loss fell by 0.2000 ± 0.0120 nats from 5,120 to 10,240 tokens: more tokens still paid." in caption
    )


def test_where_the_rest_gained_nothing_they_stopped_to_pay(tmp_path):
    assert stopped_paying(FLAT)["step"] == 20
    caption = trajectory(files(tmp_path, FLAT)).caption
    assert "from 10,240 to 20,480 tokens: more tokens no longer paid." in caption


def test_a_rise_does_not_pay_either():
    assert stopped_paying([*FALLING, mark(30, 0.6)])["step"] == 10


def test_two_texts_each_have_a_line_and_a_verdict(tmp_path):
    marks = [*FLAT, *(mark(row["step"], 2 / (1 + row["step"]), "fiction") for row in FLAT)]
    plot = trajectory(files(tmp_path, marks, teacher(), teacher("fiction")))
    assert [row[0] for row in plot.rows] == ["wiki"] * 5 + ["fiction"] * 5
    assert "On wiki" in plot.caption
    assert "On fiction the loss fell by" in plot.caption


def test_a_single_window_has_no_error_and_no_verdict(tmp_path):
    short = [row | {"losses": row["losses"][:1], "loss_error": None} for row in FALLING]
    plot = trajectory(files(tmp_path, short, teacher() | {"losses": teacher()["losses"][:1]}))
    assert plot.rows[0][6] is None
    assert "paid" not in plot.caption


def test_tasks_with_their_errors(tmp_path):
    at = {"step": 10, "tokens": 5120}
    tasks = [
        at | {"task": "arc", "metric": "acc,none", "value": 0.25, "error": 0.0123},
        at | {"task": "gsm", "metric": "em,strict", "value": 0.5, "error": None},
    ]
    found = task_rows(files(tmp_path, FALLING, tasks=tasks))
    assert found == [["5,120", "arc", "acc", "0.250 ± 0.012"], ["5,120", "gsm", "em", "0.500"]]


def test_the_report_draws_it(tmp_path):
    write(tmp_path, "recipe.json", {"name": "r"})
    assert "Held-out loss along the distillation" not in page(tmp_path).words
    write(tmp_path, "trajectory.json", {"identity": "x", "teacher": [teacher()], "rows": FLAT, "tasks": []})
    assert "Held-out loss along the distillation" in page(tmp_path).words
    assert [row["tokens"] for row in rows(tmp_path, "trajectory")] == ["0", "5120", "10240", "15360", "20480"]
    write(tmp_path, "trajectory.json", {"identity": "x", "teacher": [teacher()], "rows": [{"step": 1}], "tasks": []})
    with pytest.raises(InputError, match="the trajectory"):
        read_run(tmp_path)
