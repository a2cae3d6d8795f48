"""Draws the figures of importance; `importance_figures.py` decides what they show.

Shapes: L layers, H hidden channels, N heads, C columns of the heat map.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from nemo_minitron.artifacts.blocks import NOTHING, Block, size_of
from nemo_minitron.export.plot import (
    CUT,
    INK,
    KEPT,
    MUTED,
    is_narrow,
    layer_ticks,
    log_axis,
    log_ticks,
    plain_number,
    thousands,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

FLOOR = 1e-3  # relative to a layer's largest score; anything below has the palest colour


def layers(figure: Figure, *, score_L: np.ndarray, kept_L: np.ndarray, planned: bool) -> None:
    """Draws stems, on a logarithmic axis, since the first layer's influence is many times that of the others."""
    axes = figure.subplots()
    index_L = np.arange(len(score_L))
    positive = bool((score_L > 0).all())
    base = score_L.min() / 1.5 if positive else min(0, score_L.min())
    if positive:
        log_axis(axes, "y", base, score_L.max() * 1.4)
    for mask, colour, label, marker in ((kept_L, KEPT, "kept", "o"), (~kept_L, CUT, "cut", "X")):
        if mask.any():
            axes.vlines(index_L[mask], base, score_L[mask], color=colour, linewidth=2, alpha=0.45)
            axes.plot(index_L[mask], score_L[mask], marker, color=colour, markersize=6, label=label)
    axes.set(xlabel="layer", ylabel="block influence (1 − cosine)", xlim=(-0.8, len(score_L) - 0.2))
    layer_ticks(axes.xaxis)
    if planned:
        axes.legend(ncols=2)


def depth(figure: Figure, *, panels: dict[str, dict[Block, float]], dropped: Block | None) -> None:
    """Draws one panel a criterion. `panels`: label of the y axis -> values of the blocks; `dropped`: the plan's block,
    or None."""
    every = figure.subplots(len(panels), squeeze=False, sharex=True)[:, 0]
    for axes, (label, values) in zip(every, panels.items(), strict=True):
        _scan(axes, values)
        if dropped is not None and dropped in values:
            axes.plot(dropped[0], values[dropped], "X", color=CUT, markersize=9, label="the plan's block")
        low, high = min(values.values()), max(values.values())
        if low > 0 and high > 2 * low and label != "accuracy":
            log_axis(axes, "y", low / 1.08, high * 1.1)
            if high < 20 * low:  # a loss spans about one decade, where ticks at 2 and 5 alone are too few
                decade = 10.0 ** np.floor(np.log10(low))
                axes.set_yticks(
                    [t for t in np.outer((decade, 10 * decade), (1, 2, 3, 4, 6, 8)).flat if low <= t <= high]
                )
        axes.set(ylabel=label)
        layer_ticks(axes.xaxis)
    every[-1].set(xlabel="first dropped layer")
    shown = {name: handle for axes in every for handle, name in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(list(shown.values()), list(shown), loc="outside right upper")


def _scan(axes: Axes, values: dict[Block, float]) -> None:
    """Draws a line for each size of block; a darker line means more dropped layers."""
    from matplotlib import colormaps

    sizes = sorted({size_of(block) for block in values} - {size_of(NOTHING)})
    for size, shade in zip(sizes, np.linspace(0.4, 0.95, len(sizes) + 1)[1:], strict=True):
        line = sorted((block[0], value) for block, value in values.items() if size_of(block) == size)
        label = f"{size} layer{'s' if size > 1 else ''} dropped"
        first, value = zip(*line, strict=True)
        axes.plot(first, value, "o-", color=colormaps["YlGnBu"](shade), markersize=3.5, linewidth=1.6, label=label)
    if NOTHING in values:
        axes.axhline(values[NOTHING], color=INK, linestyle="--", linewidth=1.2, label="nothing dropped")


def neurons(
    figure: Figure,
    *,
    edges: np.ndarray,
    mean_LC: np.ndarray,
    counts: dict[int, int],
    share: dict[int, float],
) -> None:
    """Draws a heat map with the line between kept and cut, and beside it the share of each layer's score that stays."""
    shares = bool(counts) and not is_narrow(figure)  # a phone has no room beside the map
    panels = figure.subplots(1, 2 if shares else 1, width_ratios=(5, 1) if shares else None, squeeze=False)[0]
    main = panels[0]
    image = _heat_map(main, edges, mean_LC)
    main.set(xlabel="neurons of the layer, most important first", ylabel="layer")
    thousands(main.xaxis)
    _colour_bar(figure, image, main, location="top", aspect=45, pad=0.02, shrink=0.8)
    if counts:
        _thresholds(main, counts)
    if shares:
        _shares(panels[1], share, main.get_ylim())


def hidden(figure: Figure, *, score_H: np.ndarray, kept_H: np.ndarray, planned: bool) -> None:
    """Draws bars in the given order, as two outlines, so that the SVG stays small with thousands of channels."""
    axes = figure.subplots()
    positive = score_H[score_H > 0]
    base = positive.min() / 1.3 if len(positive) else 0
    many = len(score_H) > 1000  # an outline costs 100 bytes a channel
    for mask, colour, label in ((kept_H, KEPT, "kept"), (~kept_H, CUT, "cut")):
        if mask.any():
            heights = np.where(mask, np.maximum(score_H, base), base)
            label = f"{label} ({mask.sum():,})"
            axes.stairs(heights, baseline=base, fill=True, color=colour, label=label, rasterized=many)
    if base:
        log_axis(axes, "y", base, score_H.max() * 1.4)
    axes.set(xlabel="hidden channels, most important first", ylabel="score (sum over the norms)")
    axes.set_xlim(0, len(score_H))
    thousands(axes.xaxis)
    if planned:
        axes.legend()


def grid(figure: Figure, *, score_LN: np.ndarray, kept_LN: np.ndarray, one: str) -> None:
    """Draws a heat map of few columns, with each cut cell crossed out."""
    axes = figure.subplots()
    image = _heat_map(axes, np.arange(score_LN.shape[1] + 1) - 0.5, score_LN)
    whole_L = ~kept_LN.any(axis=1)
    _veil(axes, np.flatnonzero(whole_L).tolist())
    layer, column = np.nonzero(~kept_LN & ~whole_L[:, None])
    axes.plot(column, layer, "x", color=CUT, markersize=6, markeredgewidth=1.8)
    axes.set(xlabel=one, ylabel="layer")
    layer_ticks(axes.xaxis)
    _colour_bar(figure, image, axes)


def _heat_map(axes: Axes, edges: np.ndarray, score_LC: np.ndarray) -> QuadMesh:
    """Draws each row relative to its largest value, on a logarithmic scale, layer 0 on top; rasterised, to keep the SVG
    small."""
    from matplotlib.colors import LogNorm

    relative_LC = score_LC / np.maximum(score_LC.max(axis=1, keepdims=True), np.finfo(np.float32).tiny)
    relative_LC = np.clip(relative_LC, FLOOR, 1)
    norm = LogNorm(min(0.5, float(relative_LC.min())), 1)
    rows = np.arange(len(score_LC) + 1) - 0.5
    image = axes.pcolormesh(edges, rows, relative_LC, norm=norm, cmap="YlGnBu", rasterized=True)
    axes.set_ylim(len(score_LC) - 0.5, -0.5)
    layer_ticks(axes.yaxis)
    return image


def _colour_bar(figure: Figure, image: Any, axes: Axes, **place: Any) -> None:
    ticks = log_ticks(image.norm.vmin, image.norm.vmax)
    bar = figure.colorbar(image, ax=axes, ticks=ticks, format=plain_number, **place)
    bar.minorticks_off()
    bar.set_label("score, as a part of the layer's largest")


def _thresholds(axes: Axes, counts: dict[int, int]) -> None:
    """Draws a line in each kept layer between the kept and the cut neurons."""
    layers = sorted(counts)
    ends = [layer - 0.5 for layer in layers], [layer + 0.5 for layer in layers]
    axes.vlines([counts[layer] for layer in layers], *ends, color=CUT, linewidth=2)
    _veil(axes, [layer for layer in range(round(max(axes.get_ylim()) + 0.5)) if layer not in counts])


def _veil(axes: Axes, layers: list[int]) -> None:
    """Covers the layers that are dropped entirely."""
    middle = sum(axes.get_xlim()) / 2
    for layer in layers:
        axes.axhspan(layer - 0.5, layer + 0.5, color="white", alpha=0.8, linewidth=0)
        axes.text(middle, layer, "layer cut", ha="center", va="center_baseline", fontsize=7, color=INK)


def _shares(axes: Axes, share: dict[int, float], limits: tuple[float, float]) -> None:
    axes.barh(list(share), [100 * value for value in share.values()], height=0.7, color=KEPT, alpha=0.85)
    axes.axvline(100, color=MUTED, linewidth=0.8)
    axes.set(xlim=(0, 103), xlabel="score kept (%)", xticks=(0, 50, 100), ylim=limits, yticks=())
