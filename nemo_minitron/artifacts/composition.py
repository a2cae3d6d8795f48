"""Several cuts, made one after another, as one plan in the indices of the first model."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from nemo_minitron.artifacts.plan import Keep, PrunePlan
from nemo_minitron.axes import AXES, Axis
from nemo_minitron.errors import InputError

Indices = Sequence[int] | None  # None: all stay


def compose(first: PrunePlan, *others: PrunePlan) -> PrunePlan:
    """One plan that cuts `first.source` as all the plans do in turn; each plan is numbered as in the model before it.

    It is exact: a selection of a selection is a selection, so one cut gives the bytes of the successive cuts. The
    model digest is the first plan's. The notes are the last plan's; those of the others stand under `earlier`.

    Raises InputError if a plan does not start from the sizes that the plan before it leaves.
    """
    return functools.reduce(_two, others, first)


def _two(first: PrunePlan, second: PrunePlan) -> PrunePlan:
    if first.target != second.source:
        raise InputError(
            f"the plans do not follow each other: one leaves {first.target.parameters():,} parameters, the next starts "
            f"from a model of other sizes with {second.source.parameters():,}; give plans in the order of the cuts"
        )
    keep: Keep = {}
    for name, cut in AXES.items():
        if name in first.keep or name in second.keep:
            each = cut.per_layer
            keep[name] = _layers(first, second, cut) if each else _select(first.indices(name), second.indices(name))
    # an axis is left out if all its layers were dropped
    keep = {name: kept for name, kept in keep.items() if kept and AXES[name].length(second.target)}
    first_notes = {name: note for name, note in first.notes.items() if name != "earlier"}
    earlier = [*first.notes.get("earlier", []), first_notes]
    return PrunePlan(first.source, second.target, keep, first.model_digest, {**second.notes, "earlier": earlier})


def _layers(first: PrunePlan, second: PrunePlan, cut: Axis) -> dict[int, Any]:
    """Layer of the first source -> kept indices of the axis; for an axis of experts, source expert -> kept indices."""
    layers_with_axis, compose_layer = set(cut.layers_of(second.source)), _experts if cut.per_expert else _units
    layers = [layer for layer in second.kept_layers if layer in layers_with_axis]
    return {first.kept_layers[layer]: compose_layer(first, second, cut.name, layer) for layer in layers}


def _units(first: PrunePlan, second: PrunePlan, name: str, layer: int) -> list[int] | None:
    """Kept indices of one layer; `layer` is numbered as in the second source."""
    return _select(first.indices(name, first.kept_layers[layer]), second.indices(name, layer))


def _experts(first: PrunePlan, second: PrunePlan, name: str, layer: int) -> dict[int, list[int] | None]:
    origin, count = first.kept_layers[layer], second.source.num_moe_experts or 0
    origins = first.indices("experts", origin) or range(count)
    stay = second.indices("experts", layer) or range(count)
    return {origins[e]: _select(first.indices(name, origin, origins[e]), second.indices(name, layer, e)) for e in stay}


def _select(kept: Indices, of_those: Indices) -> list[int] | None:
    if kept is None or of_those is None:
        chosen = of_those if kept is None else kept
        return None if chosen is None else list(chosen)
    return [kept[i] for i in of_those]
