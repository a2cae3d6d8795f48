"""The held-out loss of a student along its distillation, and from which token on more of them gained nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nemo_minitron.artifacts.json_types import JsonFields
from nemo_minitron.export import formatting
from nemo_minitron.export.plot import CUT, INK, KEPT, MUTED, Plot, thousands
from nemo_minitron.export.run import RunFiles

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ERRORS = 2.0  # standard errors within which a gain may be noise
COLOURS, MARKERS = (KEPT, CUT, MUTED, INK), ("o", "s", "^", "D")
COLUMNS = ("text", "step", "tokens", "loss", "loss_error", "gap", "gap_error")


def trajectory(run: RunFiles) -> Plot | str:
    """The loss above the teacher's against tokens, a line a text, with standard errors over windows. Gap and gain are
    taken window by window, so that what is hard in a text does not count as noise."""
    teachers = {row["text"]: row["losses"] for row in run.trajectory.get("teacher", ())}
    texts = {name: [row for row in run.trajectory["rows"] if row["text"] == name] for name in teachers}
    if not any(texts.values()):
        return "The student was not measured along its distillation (evaluation.every)."
    gaps = {name: [(row, *_difference(row["losses"], teachers[name])) for row in rows] for name, rows in texts.items()}

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for number, (name, points) in enumerate(gaps.items()):
            tokens, gap, error = zip(*((row["tokens"], gap, error or 0.0) for row, gap, error in points), strict=True)
            colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
            axes.errorbar(
                tokens, gap, error, color=colour, marker=marker, linewidth=1.4, markersize=4, capsize=3, label=str(name)
            )
        axes.set(xlabel="tokens", ylabel="loss above the teacher's (nats)")
        thousands(axes.xaxis)
        axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.6)
        axes.legend()

    rows = [
        (name, row["step"], row["tokens"], row["loss"], row["loss_error"], gap, error)
        for name, points in gaps.items()
        for row, gap, error in points
    ]
    caption = "Bars are standard errors over rows of the text." + "".join(map(_paid, texts, texts.values()))
    return Plot("trajectory", caption, COLUMNS, rows, draw)


def _difference(one: Sequence[float], other: Sequence[float]) -> tuple[float, float | None]:
    """(mean of one less the other, its standard error; None for a single window). NaN for other windows."""
    if len(one) != len(other):
        return math.nan, None
    by_window = np.asarray(one) - np.asarray(other)
    error = float(by_window.std(ddof=1) / math.sqrt(len(by_window))) if len(by_window) > 1 else None
    return float(by_window.mean()), error


def stopped_paying(rows: Sequence[JsonFields]) -> JsonFields | None:
    """The first mark after which all further tokens together gained no more than two standard errors; None if the last
    part still gained, or if noise is not known."""
    for row in rows[:-1]:
        gain, error = _difference(row["losses"], rows[-1]["losses"])
        if error is not None and gain <= ERRORS * error:
            return row
    return None


def _paid(name: str, rows: Sequence[JsonFields]) -> str:
    """A sentence about the last part, or about the mark from which on nothing was gained."""
    if len(rows) < 2:
        return ""
    since = stopped_paying(rows) or rows[-2]
    gain, error = _difference(since["losses"], rows[-1]["losses"])
    from_on = f"from {formatting.count(since['tokens'])} to {formatting.count(rows[-1]['tokens'])} tokens"
    margin = "" if error is None else f" ± {error:.4f}"
    found = f" On {name} the loss fell by {gain:.4f}{margin} nats {from_on}"
    if error is None:
        return f"{found}."
    return f"{found}: " + ("more tokens no longer paid." if gain <= ERRORS * error else "more tokens still paid.")


def task_rows(run: RunFiles) -> list[list[str]]:
    """(tokens, task, metric, value with its standard error) of lm-eval's tasks."""
    return [
        [
            formatting.count(row["tokens"]), row["task"], row["metric"].partition(",")[0],
            formatting.number(row["value"]) + ("" if row["error"] is None else f" ± {row['error']:.3f}"),
        ]
        for row in run.trajectory.get("tasks", ())
    ]  # fmt: skip
