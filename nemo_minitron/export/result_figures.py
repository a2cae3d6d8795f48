"""Figures of the results: the curve of distillation, and the perplexity of each stage."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.export import formatting
from nemo_minitron.export.plot import CUT, KEPT, MUTED, STAGE_COLOURS, Plot, log_axis, thousands
from nemo_minitron.export.run import RunFiles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

IN_NATS = ("forward_kl", "reverse_kl", "jensen_shannon", "top_k_kl")


def distillation(run: RunFiles) -> Plot | str:
    """Loss against tokens, each step and smoothed."""
    curve = [row for row in run.curve if math.isfinite(row["loss"])]
    if not curve:
        return "The run has no distillation curve."
    tokens, loss = (np.array([row[key] for row in curve]) for key in ("tokens", "loss"))
    held_out = np.array([(row["tokens"], row["loss"]) for row in run.validation if math.isfinite(row["loss"])])
    width, unit = len(loss) // 40, " (nats a token)" * (_loss_of(run) in IN_NATS)
    smooth = smoothed(loss, width)

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        if loss.min() > 0 and loss.max() > 10 * loss.min():
            log_axis(axes, "y", loss.min() / 1.1, loss.max() * 1.1)
        axes.plot(tokens, loss, "." if len(loss) == 1 else "-", color=MUTED, linewidth=0.7, label="each step")
        if width:
            axes.plot(tokens, smooth, color=KEPT, linewidth=2.2, label=f"mean of {2 * width + 1} steps")
        if len(held_out):
            axes.plot(*held_out.T, "o-", color=CUT, linewidth=1.4, markersize=4, label="held-out text")
        axes.set(xlabel="tokens", ylabel=f"distillation loss{unit}")
        thousands(axes.xaxis)
        axes.grid(axis="y", color=MUTED, alpha=0.25, linewidth=0.6)
        axes.legend()

    rows = [(int(row["step"]), int(row["tokens"]), row["loss"], s) for row, s in zip(curve, smooth, strict=True)]
    caption = f"{formatting.count(tokens[-1])} tokens in all; {formatting.count(len(loss))} steps are logged."
    if lost := len(run.curve) - len(curve):
        caption += f" Steps without a finite loss: {lost}; the training went wrong there."
    return Plot("distillation", caption, ("step", "tokens", "loss", "smoothed"), rows, draw)


def _loss_of(run: RunFiles) -> object:
    """The name of the loss in the recipe; the default is not written there by every version."""
    distillation = (run.recipe or {}).get("distillation")
    return distillation.get("loss", "forward_kl") if isinstance(distillation, dict) else ""


def smoothed(values: np.ndarray, width: int) -> np.ndarray:
    """The mean over each value and `width` values on either side, fewer at the ends."""
    total = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    index = np.arange(len(values))
    first, last = np.maximum(index - width, 0), np.minimum(index + width + 1, len(values))
    return (total[last] - total[first]) / (last - first)


def perplexity(run: RunFiles) -> Plot | str:
    """A panel for each corpus, a point for each stage but the cut at random, which is a note: its perplexity may be a
    hundred times larger, and would take the room from what differs."""
    if not run.numbers:
        return "The run has no numbers."
    corpora = {row["corpus"]: stages_of(run.numbers, row["corpus"]) for row in run.numbers}
    drawn = {corpus: [row for row in rows if row["stage"] != "random"] or rows for corpus, rows in corpora.items()}
    values = [row["perplexity"] for rows in drawn.values() for row in rows]

    def draw(figure: Figure) -> None:
        ratios = [len(rows) for rows in drawn.values()]
        panels = figure.subplots(len(drawn), 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0]
        reach = max(values) / min(values)
        for axes, (corpus, rows) in zip(panels, drawn.items(), strict=True):
            _points(axes, rows)
            axes.set_title(str(corpus))
        log_axis(panels[-1], "x", min(values) / (1.03 * reach**0.06), max(values) * 1.06 * reach**0.25)
        panels[-1].set(xlabel="perplexity (logarithmic)")

    rows = [(row["stage"], corpus, row["perplexity"]) for corpus in corpora for row in corpora[corpus]]
    height = 0.9 + 0.36 * len(values) + 0.3 * len(drawn)
    caption = "Further left is better; a line shows the distance from the teacher, on a logarithmic axis."
    caption += "".join(_gain(corpus, rows) for corpus, rows in corpora.items())
    caption += "".join(_note(corpus, rows) for corpus, rows in corpora.items() if drawn[corpus] != rows)
    return Plot("perplexity", caption, ("stage", "corpus", "perplexity"), rows, draw, height)


def _note(corpus: str, rows: Sequence[JsonObject]) -> str:
    """A sentence about the cut at random."""
    value = next(row["perplexity"] for row in rows if row["stage"] == "random")
    return f" Cut at random to the same sizes: {formatting.number(value, 1)} on {corpus}, not drawn."


def _gain(corpus: str, rows: Sequence[JsonObject]) -> str:
    """A sentence about what re-fitted matrices, scaled norms and merged experts gained; nothing if there are none."""
    of = {row["stage"]: row["perplexity"] for row in rows}
    if not {"sliced", "pruned"} <= of.keys():
        return ""
    before, after = (formatting.number(of[stage], 1) for stage in ("sliced", "pruned"))
    return (
        f" On {corpus} the cut alone has {before}; matrices fitted again, norms scaled or experts merged, without any "
        f"training, make it {after}."
    )


def _points(axes: Axes, rows: Sequence[JsonObject]) -> None:
    teacher = next((row["perplexity"] for row in rows if row["stage"] == "teacher"), None)
    for position, row in enumerate(rows):
        value, colour = row["perplexity"], STAGE_COLOURS.get(row["stage"], MUTED)
        if teacher is not None:
            axes.plot([teacher, value], [position] * 2, color=colour, linewidth=3, solid_capstyle="butt", alpha=0.5)
        axes.plot(value, position, "o", color=colour, markersize=9)
        axes.annotate(formatting.number(value, 1), (value, position), (9, 0), textcoords="offset points", va="center")
    if teacher is not None:
        axes.axvline(teacher, color=MUTED, linewidth=0.8, linestyle=":", zorder=0)
    axes.set_yticks(range(len(rows)), [formatting.STAGES.get(row["stage"], str(row["stage"])) for row in rows])
    axes.tick_params(axis="y", left=False)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(len(rows) - 0.5, -0.5)


def stages_of(numbers: Sequence[JsonObject], corpus: str) -> list[JsonObject]:
    """Rows of one corpus, teacher first."""
    return sorted(
        (row for row in numbers if row["corpus"] == corpus), key=lambda row: formatting.stage_order(row["stage"])
    )
