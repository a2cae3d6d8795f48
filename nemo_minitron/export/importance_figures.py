"""Figures of importance: layers, neurons of each layer, hidden channels, heads; kept and cut units are marked.

Each function returns a Plot, or a sentence that says why there is none.
Shapes: L layers, F neurons of a layer, H hidden channels, N heads, C columns of the heat map.
"""

from __future__ import annotations

from functools import partial

import numpy as np

from nemo_minitron.artifacts.blocks import size_of
from nemo_minitron.export import importance_drawing as drawing
from nemo_minitron.export.plot import Plot
from nemo_minitron.export.run import RunFiles

DEPTH = {"loss": "loss (nats)", "perplexity": "perplexity", "accuracy": "accuracy"}  # criterion that is drawn -> label
COLUMNS = 256  # most columns of the heat map
Kept = dict[int, list[int]]  # source layer -> kept indices


def layers(run: RunFiles) -> Plot | str:
    """Block influence of each layer."""
    if run.scores is None or "layers" not in run.scores:
        return "The run has no scores of layers (block influence)."
    score_L = run.scores["layers"]
    kept_L = kept_mask(run.plan.keep.get("layers") if run.plan else None, len(score_L))
    caption = "How much a layer turns the residual stream: 1 − cosine of its input and its output."
    if run.plan:
        cut = np.flatnonzero(~kept_L).tolist()
        caption += f" The plan cuts {describe_layers(cut)}." if cut else " The plan keeps every layer."
    rows = [(i, score_L[i], kept_L[i]) for i in range(len(score_L))]
    draw = partial(drawing.layers, score_L=score_L, kept_L=kept_L, planned=run.plan is not None)
    return Plot("layers", caption, ("layer", "block_influence", "kept"), rows, draw)


def depth(run: RunFiles) -> Plot | str:
    """The model without each contiguous block of layers: one panel for each criterion, one line for each size of
    block."""
    scans = {name: run.scores.depth[name] for name in DEPTH if run.scores and run.scores.depth.get(name)}
    if not scans:
        return "The run has no scan of dropped layers."
    rows = [(name, *block, size_of(block), value) for name, blocks in scans.items() for block, value in blocks.items()]
    caption = "The model without a block of layers, by the first of them; nothing is retrained."
    dropped = None
    if run.plan and run.cuts("layers"):
        cut = sorted(set(range(run.plan.source.num_layers)) - set(run.plan.keep["layers"]))
        dropped = (cut[0], cut[-1]) if len(cut) == cut[-1] - cut[0] + 1 else None
        caption += f" The plan cuts {describe_layers(cut)}."
    draw = partial(drawing.depth, panels={DEPTH[name]: blocks for name, blocks in scans.items()}, dropped=dropped)
    columns = ("criterion", "first", "last", "layers_dropped", "value")
    return Plot("depth", caption, columns, rows, draw, 0.6 + 2.7 * len(scans))


def neurons(run: RunFiles) -> Plot | str:
    """Heat map of the FFN neurons of each layer, sorted by score within the layer."""
    score_LF, why_not = _scores(run, "ffn", "FFN width")
    if score_LF is None:
        return why_not
    kept: Kept = run.plan.keep.get("ffn", {}) if run.plan else {}
    order_LF = np.argsort(-score_LF, axis=1, kind="stable")
    width = score_LF.shape[1]
    edges = np.linspace(0, width, min(COLUMNS, width) + 1).round().astype(int)
    mean_LC = in_columns(np.take_along_axis(score_LF, order_LF, axis=1), edges) / np.diff(edges)
    mask_LF = np.array([kept_mask(kept.get(i, []), width) for i in range(len(score_LF))])
    kept_LC = in_columns(np.take_along_axis(mask_LF, order_LF, axis=1), edges).astype(int)
    share = {i: _share(score_LF[i], indices) for i, indices in kept.items()}
    rows = [
        (i, edges[c], edges[c + 1] - 1, mean_LC[i, c], *([kept_LC[i, c]] if kept else []))
        for i, c in np.ndindex(*mean_LC.shape)
    ]
    columns = ("layer", "first_rank", "last_rank", "mean_score", *(["kept"] if kept else []))
    counts = {i: len(indices) for i, indices in kept.items()}
    draw = partial(drawing.neurons, edges=edges, mean_LC=mean_LC, counts=counts, share=share)
    height = float(np.clip(1.8 + 0.11 * len(mean_LC), 3, 7))
    return Plot(
        "ffn", _neuron_caption(order_LF, kept, share) + _uncut(run, "ffn", "FFN width"), columns, rows, draw, height
    )


def _neuron_caption(order_LF: np.ndarray, kept: Kept, share: dict[int, float]) -> str:
    text = "Each row is a layer, its neurons sorted by score."
    if not kept:
        return text
    size = len(next(iter(kept.values())))
    low, high = (f"{100 * value:.1f}" for value in (min(share.values()), max(share.values())))
    text += f" The plan keeps {size:,} of {order_LF.shape[1]:,} neurons in each layer"
    text += f", which hold {low} to {high} % of a layer's score"
    inside = min(np.isin(indices, order_LF[i, :size]).mean() for i, indices in kept.items())
    if inside == 1:
        return text + ": those left of the line."
    return text + f". They are not this score's best: {100 * inside:.0f} % or more of them lie left of the line."


def hidden(run: RunFiles) -> Plot | str:
    """Hidden channels, sorted by score."""
    score_H, why_not = _scores(run, "hidden", "hidden size")
    if score_H is None:
        return why_not
    kept = run.plan.keep.get("hidden") if run.plan else None
    kept_H = kept_mask(kept, len(score_H))
    order_H = np.argsort(-score_H, kind="stable")
    caption = "One bar for each channel of the residual stream; the same channels stay in the whole model."
    if kept is not None:
        caption += f" The kept ones hold {100 * _share(score_H, kept):.1f} % of the score."
    caption += _uncut(run, "hidden", "hidden size")
    rows = [(rank, i, score_H[i], kept_H[i]) for rank, i in enumerate(order_H)]
    draw = partial(drawing.hidden, score_H=score_H[order_H], kept_H=kept_H[order_H], planned=kept is not None)
    return Plot("hidden", caption, ("rank", "channel", "score", "kept"), rows, draw)


def heads(run: RunFiles) -> Plot | str:
    """Attention heads of each layer; cut ones are crossed out."""
    return _grid(run, "heads", "head", "attention heads")


def query_groups(run: RunFiles) -> Plot | str:
    """Query groups (heads of keys and values) of each layer; cut ones are crossed out."""
    return _grid(run, "query_groups", "query_group", "query groups")


def _grid(run: RunFiles, axis: str, one: str, many: str) -> Plot | str:
    score_LN, why_not = _scores(run, axis, f"number of {many}")
    if score_LN is None:
        return why_not
    kept: Kept | None = run.plan.keep.get(axis) if run.plan else None
    indices = [None if kept is None else kept.get(i, []) for i in range(len(score_LN))]
    kept_LN = np.array([kept_mask(i, score_LN.shape[1]) for i in indices])
    rows = [(i, j, score_LN[i, j], kept_LN[i, j]) for i, j in np.ndindex(*score_LN.shape)]
    draw = partial(drawing.grid, score_LN=score_LN, kept_LN=kept_LN, one=one.replace("_", " "))
    height = float(np.clip(1.5 + 0.13 * len(score_LN), 2.5, 8))
    caption = f"Each row is a layer, each cell one of its {many}" + ("; × is cut." if kept else ".")
    caption += _uncut(run, axis, f"number of {many}")
    return Plot(axis, caption, ("layer", one, "score", "kept"), rows, draw, height)


# -- parts -------------------------------------------------------------------------------------------
def _scores(run: RunFiles, axis: str, what: str) -> tuple[np.ndarray | None, str]:
    """The scores of an axis, whether it is cut or not, or the reason why there is no figure."""
    if run.scores is None or axis not in run.scores:
        return None, f"The run has no scores for the {what}."
    return run.scores[axis], ""


def _uncut(run: RunFiles, axis: str, what: str) -> str:
    """A sentence for the caption of an axis that the plan leaves whole."""
    return f" The plan does not cut the {what}." if run.plan is not None and axis not in run.plan.keep else ""


def in_columns(values_LF: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Sums over the columns between `edges`: [L, F] -> [L, C], float64."""
    return np.add.reduceat(values_LF.astype(np.float64), edges[:-1], axis=1)


def _share(score: np.ndarray, kept: list[int]) -> float:
    """The share of the whole score that the kept indices hold."""
    total = score.sum(dtype=np.float64)
    return float(score[kept].sum(dtype=np.float64) / total) if total else 0.0


def kept_mask(kept: list[int] | None, size: int) -> np.ndarray:
    """True for a kept index; all True if `kept` is None, because the axis is not cut."""
    return np.ones(size, bool) if kept is None else np.isin(np.arange(size), kept)


def describe_layers(layers: list[int]) -> str:
    """[12] -> layer 12; [12, 13, 14] -> layers 12 to 14; else a list."""
    if len(layers) == 1:
        return f"layer {layers[0]}"
    if layers[-1] - layers[0] == len(layers) - 1:
        return f"layers {layers[0]} to {layers[-1]}"
    return f"layers {', '.join(map(str, layers))}"
