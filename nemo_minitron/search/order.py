"""Every unit of a model in the order of its score, and a plan's part that cuts some of its axes alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from nemo_minitron.artifacts import PrunePlan, Scores
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.axes import AXES
from nemo_minitron.search.plans import scores_of
from nemo_minitron.search.sizes import student_architecture

Order = dict[str, Any]  # axis -> all units: [unit], {layer: [unit]} or {layer: {expert: [unit]}}
IN_GROUPS = ("experts", "heads", "query_groups", "mamba_heads")  # units of a group stay together


def ranked_order(scores: Scores) -> Order:
    """Axis -> every unit, the most important first; of equal scores the lower index first.

    Query groups move with their heads, and heads within their group; Mamba heads and experts move within their group.
    Layers and the vocabulary keep their order, and so does an axis that was not scored.
    """
    source, order = scores.architecture, Order()
    for name, cut in AXES.items():
        if name not in scores or not cut.ranked or name in (*IN_GROUPS, "layers", "vocab"):
            continue
        layers = cut.layers_of(source)
        if cut.per_expert:
            order[name] = {n: dict(enumerate(map(_best_first, scores[name][n]))) for n in layers}
        elif cut.per_layer:
            order[name] = {n: _best_first(scores[name][n]) for n in layers}
        else:
            order[name] = _best_first(scores[name])
    inside = {"experts": source.moe_router_num_groups or 1, "mamba_heads": source.mamba_num_groups or 1}
    for name in inside.keys() & scores.tensors.keys():
        values = scores[name]
        order[name] = {n: _inside(values[n].reshape(inside[name], -1)) for n in AXES[name].layers_of(source)}
    return order | _of_attention(scores)


def _of_attention(scores: Scores) -> Order:
    source, order = scores.architecture, Order()
    size, groups = source.heads_per_group, source.num_query_groups
    if "heads" not in scores and "query_groups" not in scores:
        return order
    order = {"query_groups": {}, "heads": {}}
    for layer in source.attention_layers:
        ranked = _best_first(scores_of(scores, "query_groups", layer))
        values = scores["heads"][layer] if "heads" in scores else np.zeros(groups * size)
        inside = [_best_first(of_group) for of_group in values.reshape(groups, size)]
        order["query_groups"][layer] = ranked
        order["heads"][layer] = [group * size + head for group in ranked for head in inside[group]]
    return order


def _inside(values: np.ndarray) -> list[int]:
    """[groups, units of a group] -> all units, best first within each group; the groups stay where they are."""
    groups, size = values.shape
    return [group * size + unit for group in range(groups) for unit in _best_first(values[group])]


def _best_first(values: np.ndarray) -> list[int]:
    return np.argsort(-values, kind="stable").tolist()


def on_axes(plan: PrunePlan, axes: Collection[str]) -> PrunePlan | None:
    """The part of a plan that cuts these axes, and leaves all others whole; None if it cuts none of them.

    If the plan drops experts, they come back, and each keeps the first so many neurons.
    """
    keep = {name: kept for name, kept in plan.keep.items() if name in axes}
    if not keep:
        return None
    sizes: JsonObject = {name: AXES[name].length(plan.target) for name in keep}
    if "layers" in keep:
        sizes["layers"] = keep["layers"]
    if "expert_ffn" in keep and "experts" in plan.keep:
        first = {e: list(range(sizes["expert_ffn"])) for e in range(plan.source.num_moe_experts or 0)}
        keep["expert_ffn"] = {layer: first | kept for layer, kept in keep["expert_ffn"].items()}
    return PrunePlan(plan.source, student_architecture(plan.source, sizes), keep, plan.model_digest)
