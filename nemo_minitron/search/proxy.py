"""Estimates the share of importance that a shape keeps, cheaply enough to order millions of shapes before any is cut.

It is a heuristic. For each axis it takes the share of importance that the kept units hold (of the sum in their layer or
query group, averaged over layers; for layers, the share of block influence, of all kinds of a hybrid together). It
multiplies the shares, each to the power of WEIGHTS. The best few shapes are measured afterwards: `rank` distils them.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np

from nemo_minitron.artifacts import Scores
from nemo_minitron.artifacts.blocks import BLOCK_INFLUENCE
from nemo_minitron.axes import axis
from nemo_minitron.errors import InputError
from nemo_minitron.hybrid import COUNTS
from nemo_minitron.search.depth import layers_to_drop
from nemo_minitron.search.formula import Columns
from nemo_minitron.search.plans import scores_of
from nemo_minitron.search.sizes import layers_by_kind

# Exponents of the shares, measured once, on SmolLM2-135M without retraining: along each axis the rise of the loss was
# in proportion to the logarithm of the share kept, by 3.6 to 4.3 for ffn (1280 to 768 of 1536), 12.8 to 14.4 for
# hidden (512, 448 of 576), 12.9 to 14.9 for layers (24, 20 of 30) and 7.9 for heads (6 of 9). Of 17 combinations at
# 80 to 85 million parameters the rise was guessed to 16% in 14; two at 18 layers were worse than guessed (8.1 for 2.6),
# one with fewer heads better; Spearman 0.68 over all. So the best few are cut and measured before any is trained.
WEIGHTS = {"hidden": 3.5, "layers": 3.5, "heads": 2.0}
OTHERS = 1.0
# The rise of the loss is guessed as a multiple of -log(share kept). Of the 29 largest shapes of SmolLM2 at 84 million
# parameters two thirds were guessed to 15% (docs/benchmarks.md, "A search").
ERROR = 0.15


@dataclasses.dataclass(frozen=True)
class Proxy:
    """`shares[axis][size]`: share of importance in [0, 1], NaN for an impossible size; for heads, size is that of a
    group. `kinds[kind][count]`: the part of all block influence in the layers of that kind that stay; `others`: the
    part of the kinds that do not vary."""

    shares: Mapping[str, np.ndarray]
    groups: int
    kinds: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    others: float = 0.0

    def __call__(self, sizes: Columns) -> np.ndarray:
        """The share of importance that is kept, float64 [shapes]; NaN for an impossible size."""
        kept = np.ones(len(next(iter(sizes.values()))))
        for name, shares in self.shares.items():
            at = sizes[name]
            if name == "heads":
                at = at // sizes.get("query_groups", self.groups)
            kept *= shares[at] ** WEIGHTS.get(name, OTHERS)
        if self.kinds:
            influence = sum(parts[sizes[name]] for name, parts in self.kinds.items())
            kept *= (self.others + influence) ** WEIGHTS["layers"]
        return kept


def near(kept: float | None, best: float | None) -> bool | None:
    """Whether the proxy cannot tell a shape from the best one: the rises that it guesses differ by no more than ERROR
    of the best one's. None without scores."""
    if kept is None or best is None:
        return None
    return math.log(best) - math.log(kept) <= -ERROR * math.log(best)


def make_proxy(scores: Scores, axes: tuple[str, ...], depth: str = BLOCK_INFLUENCE, contiguous: bool = True) -> Proxy:
    """The shares along `axes`; layers are dropped by the criterion `depth`, as in `plan`.

    Raises InputError for an axis that was not scored.
    """
    counted = [name for name in axes if name in COUNTS]
    shares = {n: _shares(scores, n) for n in axes if n not in ("layers", *counted) and axis(n).ranked}
    if "layers" in axes:
        shares["layers"] = _layers(scores, depth, contiguous)
    kinds = _kinds(scores, counted) if counted else {}
    others = 1 - sum(parts[-1] for parts in kinds.values()) if counted else 0.0
    return Proxy(shares, scores.architecture.num_query_groups, kinds, others)


def _kinds(scores: Scores, counted: Sequence[str]) -> dict[str, np.ndarray]:
    """The part of all block influence in the n most important layers of each kind, for n = 0 to all of them."""
    influence, layers_of = scores["layers"].astype(np.float64), layers_by_kind(scores.architecture)
    return {n: _kept(influence[layers_of[n]]) * influence[layers_of[n]].sum() / influence.sum() for n in counted}


def _shares(scores: Scores, name: str) -> np.ndarray:
    """The share kept at each size, float64 [size + 1], averaged over the layers that have the axis."""
    if not axis(name).per_layer:
        return _kept(scores_of(scores, name, None))
    shares_of_layers = []
    for layer in axis(name).layers_of(scores.architecture):
        values = scores_of(scores, name, layer)
        if name == "heads":
            values = values.reshape(scores.architecture.num_query_groups, -1)
        shares_of_layers.append(_kept(values))
    return np.mean(shares_of_layers, axis=0)


def _kept(values: np.ndarray) -> np.ndarray:
    """Scores [..., units] -> share of their sum in the n largest, for n = 0 to all, averaged over the rows."""
    ranked = -np.sort(-values.astype(np.float64), axis=-1)
    ranked = ranked.reshape(-1, ranked.shape[-1])
    total = ranked.sum(axis=1, keepdims=True)
    even = np.full_like(ranked, 1 / ranked.shape[1])  # for a row of zeros, such as an expert that got no token
    share = np.divide(ranked, total, out=even, where=total > 0).cumsum(axis=1).mean(axis=0)
    return np.concatenate([[0.0], share])


def _layers(scores: Scores, depth: str, contiguous: bool) -> np.ndarray:
    """The share of block influence in the layers that stay; NaN if the criterion cannot tell which ones stay."""
    influence = scores["layers"].astype(np.float64)
    if depth == BLOCK_INFLUENCE:
        return _kept(influence)
    shares = np.full(len(influence) + 1, np.nan)
    shares[-1], known = 1.0, None
    for count in range(1, len(influence)):
        try:
            dropped = layers_to_drop(scores, count, depth, contiguous=contiguous)
        except InputError as error:
            known = known or error
            continue
        shares[len(influence) - count] = 1 - influence[dropped].sum() / influence.sum()
    if known is not None and np.isnan(shares[1:-1]).all():
        raise known
    return shares
