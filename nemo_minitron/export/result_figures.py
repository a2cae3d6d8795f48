"""Figures of the results: the curve of distillation, and the perplexity of each stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.export import formatting
from nemo_minitron.export.plot import KEPT, MUTED, STAGE_COLOURS, Plot, log_axis, thousands
from nemo_minitron.export.run import RunFiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def distillation(run: RunFiles) -> Plot | str:
    """Loss against tokens, each step and smoothed."""
    curve = [row for row in run.curve if math.isfinite(row["loss"])]
    if not curve:
        return "The run has no distillation curve."
    tokens, loss = (np.array([row[key] for row in curve]) for key in ("tokens", "loss"))
    width = len(loss) // 40
    smooth = smoothed(loss, width)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        if loss.min() > 0 and loss.max() > 10 * loss.min():
            log_axis(axes, "y", loss.min() / 1.1, loss.max() * 1.1)
        axes.plot(tokens, loss, "." if len(loss) == 1 else "-", color=MUTED, linewidth=0.7, label="each step")
        if width:
            axes.plot(tokens, smooth, color=KEPT, linewidth=2.2, label=f"mean of {2 * width + 1} steps")
        axes.set(xlabel="tokens", ylabel="distillation loss")
        thousands(axes.xaxis)
        axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.6)
        axes.legend()

    rows = [(int(row["step"]), int(row["tokens"]), row["loss"], s) for row, s in zip(curve, smooth, strict=True)]
    caption = f"{formatting.count(tokens[-1])} tokens in all; {formatting.count(len(loss))} steps are logged."
    if lost := len(run.curve) - len(curve):
        caption += f" Steps without a finite loss: {lost}; the training went wrong there."
    return Plot("distillation", caption, ("step", "tokens", "loss", "smoothed"), rows, draw)


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over each value and `width` values on either side, fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    index = np.arange(len(values))
    first, last = np.maximum(index - width, 0), np.minimum(index + width + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def perplexity(run: RunFiles) -> Plot | str:
    """One group of bars for each corpus, one bar for each stage."""
    if not run.numbers:
        return "The run has no numbers."
    corpora = {row["corpus"]: stages_of(run.numbers, row["corpus"]) for row in run.numbers}
    largest = max(row["perplexity"] for row in run.numbers)

    def draw(figure: Figure) -> None:
        ratios = [len(rows) for rows in corpora.values()]
        panels = figure.subplots(len(corpora), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        for axes, (corpus, rows) in zip(panels, corpora.items(), strict=True):
            _bars(axes, rows)
            axes.set_title(str(corpus))
        log_axis(panels[-1], "x", 1, largest**1.18 + 1)
        panels[-1].set(xlabel="perplexity (logarithmic)")

    rows = [(row["stage"], corpus, row["perplexity"]) for corpus in corpora for row in corpora[corpus]]
    height = 0.9 + 0.32 * len(run.numbers) + 0.3 * len(corpora)
    caption = "A bar's length is the loss: the axis is logarithmic and starts at 1. Shorter is better."
    return Plot("perplexity", caption, ("stage", "corpus", "perplexity"), rows, draw, height)


def _bars(axes: Axes, rows: Sequence[JsonObject]) -> None:
    for position, row in enumerate(rows):
        value = row["perplexity"]
        axes.barh(position, value - 1, left=1, height=0.68, color=STAGE_COLOURS.get(row["stage"], MUTED))
        axes.annotate(formatting.number(value, 1), (value, position), (4, 0), textcoords="offset points", va="center")
    axes.set_yticks(range(len(rows)), [formatting.STAGES.get(row["stage"], str(row["stage"])) for row in rows])
    axes.tick_params(axis="y", left=False)
    axes.invert_yaxis()


def stages_of(numbers: Sequence[JsonObject], corpus: str) -> list[JsonObject]:
    """Rows of one corpus, teacher first."""
    return sorted(
        (row for row in numbers if row["corpus"] == corpus), key=lambda row: formatting.stage_order(row["stage"])
    )
