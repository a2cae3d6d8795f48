"""Chooses the units that stay: the most important ones, or for a baseline the least important or random ones.

Everything is numbered as in the source: a plan that drops layers lists the kept layers by their source numbers, and the
units of a layer are ranked by the scores of that layer in the uncut model (2407.14679, section 2: units are ranked once
and cut in one shot).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.artifacts.blocks import BLOCK_INFLUENCE
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.axes import AXES, axis
from nemo_minitron.errors import InputError
from nemo_minitron.hybrid import COUNTS
from nemo_minitron.search.depth import layers_to_drop
from nemo_minitron.search.sizes import Keep, given_layers, student_architecture, with_layers

Values = Callable[[str, int | None], np.ndarray]  # (axis, source layer) -> a score for each unit (of each expert)


def plan(
    scores: Scores,
    keep: Keep,
    *,
    least: bool = False,
    depth: str = BLOCK_INFLUENCE,
    contiguous: bool = True,
) -> PrunePlan:
    """Keeps the most important units: `keep` maps an axis to the size that stays (for layers also a list; of a hybrid
    also numbers of `mamba_layers`, `attention_layers` and `mlp_layers`, each ranked among its kind by block influence).

    ffn and experts are ranked within their layer, the neurons of an expert within the expert, heads within their
    query group, Mamba heads within their group, and the channels of a Mamba head within their layer, for all heads
    at once. Of a token's experts those that its router ranks first stay.
    Query groups are ranked within their layer, by their own score or else by the sum of their heads'
    scores. hidden is ranked over the whole model. Layers are ranked by block influence, or by the criterion `depth`
    of `scores.depth`: the best contiguous block or, with `contiguous=False`, the best single layers (see
    `layers_to_drop`). Of units with equal scores the one with the lower index stays. `least=True` keeps the least
    important units instead, with the same rule for ties. An axis that keeps its size is absent from the plan.

    Raises InputError for an illegal size, and for an axis, or a size of block, that was not scored.
    """
    kept, notes = "least" if least else "most", {}
    if depth != BLOCK_INFLUENCE and (counted := next((name for name in keep if name in COUNTS), None)):
        raise InputError(f"{counted} is ranked by {BLOCK_INFLUENCE} alone, not by '{depth}'; leave the criterion out")
    gone = scores.architecture.num_layers - student_architecture(scores.architecture, keep).num_layers
    if depth != BLOCK_INFLUENCE and gone and given_layers(scores.architecture, keep) is None:
        dropped = layers_to_drop(scores, gone, depth, contiguous=contiguous, least=least)
        keep = {**keep, "layers": sorted(set(range(scores.architecture.num_layers)) - set(dropped))}
        notes = {"depth": depth, "contiguous": contiguous}
    selection = _select(scores.architecture, keep, lambda name, layer: scores_of(scores, name, layer), least)
    selection.model_digest = scores.model_digest
    selection.notes = {"kept": f"{kept} important", "scores": scores.digest, "criterion": scores.criterion} | notes
    return selection


def random_plan(architecture: Architecture, keep: Keep, *, seed: int = 0) -> PrunePlan:
    """Keeps random units, as a baseline; sizes as in `plan`.

    Each axis and source layer draws from its own PCG64 generator, seeded by (seed, axis, layer), so that the choice
    does not depend on what else is cut. Raises InputError as `plan` does.
    """
    if not 0 <= seed < 1 << 64:
        near = 0 if seed < 0 else (1 << 64) - 1
        raise InputError(f"seed={seed} is not legal; legal are whole numbers of 64 bits from 0, the nearest is {near}")

    def draw(name: str, layer: int | None) -> np.ndarray:
        entropy = [seed, zlib.crc32(name.encode()), 0 if layer is None else layer + 1]
        units = (axis(name).length(architecture),)
        shape = (architecture.num_moe_experts or 0, *units) if axis(name).per_expert else units
        return np.random.Generator(np.random.PCG64(entropy)).random(shape)

    selection = _select(architecture, keep, draw, least=False)
    selection.notes = {"kept": "random", "seed": seed}
    return selection


def first_plan(architecture: Architecture, keep: Keep) -> PrunePlan:
    """Keeps the first units of each axis, as a baseline; sizes as in `plan`. Raises InputError as `plan` does."""

    def in_place(name: str, layer: int | None) -> np.ndarray:
        units = axis(name).length(architecture)
        values = -np.arange(units, dtype=np.float64)
        return np.tile(values, (architecture.num_moe_experts or 0, 1)) if axis(name).per_expert else values

    selection = _select(architecture, keep, in_place, least=False)
    selection.notes = {"kept": "first"}
    return selection


def scores_of(scores: Scores, name: str, layer: int | None) -> np.ndarray:
    """The scores of an axis' units, [units] or [experts, units]; `layer`: the source layer, if the axis is per layer.

    Raises InputError for an axis that was not scored.
    """
    if name == "query_groups" and name not in scores:
        heads = scores["heads"][layer].astype(np.float64)
        return heads.reshape(scores.architecture.num_query_groups, -1).sum(axis=1)
    return scores[name][layer] if axis(name).per_layer else scores[name]


def _select(source: Architecture, keep: Keep, values: Values, least: bool) -> PrunePlan:
    def best_of_kind(layers: Sequence[int], count: int) -> list[int]:
        if count == len(layers):
            return list(layers)
        return [layers[place] for place in _best(values("layers", None)[list(layers)], count, least)]

    keep = with_layers(source, keep, best_of_kind)
    target = student_architecture(source, keep)
    sizes = {name: a.length(target) for name, a in AXES.items() if a.length(source) != a.length(target)}
    layers = _layers(source, target, keep, values, least)
    if len(layers) != source.num_layers:  # now it is known which ones stay
        target = student_architecture(source, {**keep, "layers": layers})
    chosen: JsonObject = {}
    for name, size in sizes.items():  # experts before the neurons of each
        if name in ("layers", "heads"):
            continue
        layers_with_axis = [layer for layer in axis(name).layers_of(source) if layer in layers]
        if axis(name).per_expert:
            experts = chosen.get("experts") or dict.fromkeys(layers_with_axis, range(source.num_moe_experts or 0))
            chosen[name] = {
                n: {e: _best(values(name, n)[e], size, least) for e in experts[n]} for n in layers_with_axis
            }
        elif name == "mamba_heads":
            groups = source.mamba_num_groups or 1
            chosen[name] = {n: _in_groups(values(name, n), groups, size // groups, least) for n in layers_with_axis}
        elif name == "experts":
            groups = source.moe_router_num_groups or 1
            chosen[name] = {n: _in_groups(values(name, n), groups, size // groups, least) for n in layers_with_axis}
        elif not axis(name).ranked:
            chosen |= {name: list(range(size))} if size else {}
        elif axis(name).per_layer:
            chosen[name] = {layer: _best(values(name, layer), size, least) for layer in layers_with_axis}
        else:
            chosen[name] = _best(values(name, None), size, least)
    if "layers" in sizes:
        chosen["layers"] = layers
    if "heads" in sizes or "query_groups" in sizes:
        groups, all_groups = chosen.get("query_groups", {}), list(range(source.num_query_groups))
        with_heads = [layer for layer in source.attention_layers if layer in layers]
        chosen["heads"] = {n: _heads(source, target, groups.get(n, all_groups), n, values, least) for n in with_heads}
    ordered = {name: chosen[name] for name in AXES if name in chosen}
    return PrunePlan(source=source, target=target, keep=ordered)


def _layers(source: Architecture, target: Architecture, keep: Keep, values: Values, least: bool) -> list[int]:
    listed = given_layers(source, keep)
    if listed is None and target.num_layers != source.num_layers:
        return _best(values("layers", None), target.num_layers, least)
    return listed or list(range(source.num_layers))


def _heads(
    source: Architecture, target: Architecture, groups: list[int], layer: int, values: Values, least: bool
) -> list[int]:
    """The heads that stay in a layer: the same number in each kept query group, ranked within it (2407.14679, section
    2)."""
    size, kept = source.heads_per_group, target.heads_per_group
    if size == kept:  # only complete groups are cut, so heads need no scores
        return [group * size + head for group in groups for head in range(size)]
    ranked = values("heads", layer).reshape(-1, size)
    return [group * size + head for group in groups for head in _best(ranked[group], kept, least)]


def _in_groups(values: np.ndarray, groups: int, count: int, least: bool) -> list[int]:
    """The best `count` units of each group of consecutive ones."""
    ranked = values.reshape(groups, -1)
    return [g * ranked.shape[1] + unit for g in range(groups) for unit in _best(ranked[g], count, least)]


def _best(values: np.ndarray, count: int, least: bool) -> list[int]:
    """Sorted indices of the `count` largest (`least`: smallest) values; of equal values the lower index."""
    order = np.argsort(values if least else -values, kind="stable")
    return sorted(order[:count].tolist())
