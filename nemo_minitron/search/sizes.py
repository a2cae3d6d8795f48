"""From a user's `keep` to the student's Architecture; a refusal is one sentence that says what is legal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral
from typing import Any

from nemo_minitron import hybrid
from nemo_minitron.architecture import Architecture
from nemo_minitron.axes import AXES, axis
from nemo_minitron.errors import InputError

# Axis -> size that stays. For layers also a list of those that stay; a hybrid has a number for each of `hybrid.COUNTS`.
Keep = Mapping[str, int | Sequence[int]]
Choose = Callable[[Sequence[int], int], Sequence[int]]  # (layers of one kind, how many stay) -> the ones that stay
VOCAB = "a job keeps the vocabulary, since the student learns the teacher's tokens; cut it with minitron plan and prune"


def target_of(source: Architecture, keep: Keep) -> Architecture:
    """The student's Architecture. Raises InputError for an illegal size, or a cut of the vocabulary."""
    if not keep:
        raise InputError("the recipe cuts nothing; set keep, for example keep.ffn=1024")
    if "vocab" in keep:
        raise InputError(VOCAB)
    return student_architecture(source, keep)


def student_architecture(source: Architecture, keep: Keep) -> Architecture:
    """The Architecture that `keep` leaves of `source`; if query groups are cut, their heads are cut with them.

    A number of layers of each kind of a hybrid leaves the first ones of each kind here: which ones stay changes no
    count.

    Raises InputError for an unknown axis, an axis that the source lacks, a size above the source's, heads that do not
    divide into the query groups, and a mere number of layers if these are not all of one kind.
    """
    keep = with_layers(source, keep, lambda layers, count: layers[:count])
    listed = given_layers(source, keep)
    if "layers" in keep and listed is None:
        check_one_kind(source)
    chosen = keep.get("experts_per_token", source.moe_router_topk)  # experts that a token goes to
    sizes = {axis(name).size: _size(source, name, value, chosen) for name, value in keep.items()}
    groups = sizes.get("num_query_groups", source.num_query_groups)
    heads = sizes.setdefault("num_attention_heads", groups * source.heads_per_group)
    if heads % groups or heads > groups * source.heads_per_group:
        legal = range(groups, groups * source.heads_per_group + 1, groups)
        raise InputError(
            f"heads={heads} is not legal with {groups} query groups of {source.heads_per_group} heads; "
            f"legal are multiples of {groups} up to {legal[-1]}, the nearest is {_nearest(heads, legal)}"
        )
    return (source if listed is None else source.keep_layers(listed)).replace(**sizes)


def check_one_kind(source: Architecture) -> None:
    """Raises InputError if the layers are not all of one kind, so that a mere number does not say which ones stay."""
    if source.layers_differ:
        counts = ", ".join(f"{name}={len(layers)}" for name, layers in layers_by_kind(source).items())
        raise InputError(
            "this model's layers are not all of one kind; list the layers that stay, for example layers=0+1+3-7"
            + f", or give numbers of each kind; it has {counts}" * bool(counts)
        )


def given_layers(source: Architecture, keep: Keep) -> list[int] | None:
    """The layers to keep, sorted, if `keep` lists them; else None. Raises InputError for an illegal list."""
    layers = keep.get("layers")
    if layers is None or not isinstance(layers, Sequence):
        return None
    most = source.num_layers - 1
    if isinstance(layers, str) or not all(_whole(layer) and 0 <= layer <= most for layer in layers):
        raise InputError(f"layers={layers!r} is not legal; legal are layer numbers from 0 to {most}")
    if not layers or len(set(layers)) != len(layers):
        raise InputError(f"layers={list(layers)} is not legal; give at least one layer, and none twice")
    return sorted(int(layer) for layer in layers)


def layers_by_kind(source: Architecture) -> dict[str, list[int]]:
    """A hybrid's layers of each kind that it has, by the names of `hybrid.COUNTS`; nothing for another model."""
    pattern = source.hybrid_pattern or ""
    of_kinds = {
        name: [layer for layer, found in enumerate(pattern) if found == symbol]
        for name, symbol in hybrid.COUNTS.items()
    }
    return {name: layers for name, layers in of_kinds.items() if layers}


def with_layers(source: Architecture, keep: Keep, choose: Choose) -> dict[str, int | Sequence[int]]:
    """`keep` with a list of layers in the place of numbers of layers of each kind; a kind without a number stays whole.

    Raises InputError for a kind that the source lacks, a number out of range, and a list beside numbers.
    """
    counts = {name: value for name, value in keep.items() if name in hybrid.COUNTS}
    if not counts:
        return dict(keep)
    of_kinds = layers_by_kind(source)
    for name, value in counts.items():
        most = len(of_kinds.get(name, ()))
        if not most:
            has = f"it has {', '.join(of_kinds)}" if of_kinds else "it is no hybrid; give layers"
            raise InputError(f"the model has no '{name}' to cut; {has}")
        if not _whole(value) or not 1 <= value <= most:  # type: ignore[operator]
            raise InputError(f"{name}={value!r} is not legal; legal are whole numbers from 1 to {most}")
    if "layers" in keep:
        raise InputError(f"layers and {next(iter(counts))} are both given; give the list or the numbers of each kind")
    numbers: dict[str, Any] = {name: counts.get(name, len(layers)) for name, layers in of_kinds.items()}
    kept = [layer for name, layers in of_kinds.items() for layer in choose(layers, numbers[name])]
    others = {name: value for name, value in keep.items() if name not in hybrid.COUNTS}
    return {**others, "layers": sorted(kept)}


def _size(source: Architecture, name: str, value: Any, chosen: Any) -> int:
    listed = given_layers(source, {name: value})
    if listed is not None:
        return len(listed)
    most = axis(name).length(source)
    if not most:
        axes_of_model = ", ".join(other for other, cut in AXES.items() if cut.length(source))
        raise InputError(f"the model has no '{name}' to cut; it has {axes_of_model}")
    least = chosen if name == "experts" and _whole(chosen) else 1
    if not _whole(value):
        raise InputError(f"{name}={value!r} is not legal; legal are whole numbers from {least} to {most}")
    if not least <= value <= most:
        near = min(max(value, least), most)
        raise InputError(f"{name}={value} is not legal; legal are {least} to {most}, the nearest is {near}")
    return int(value)


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _nearest(value: int, legal: Sequence[int]) -> int:
    return min(legal, key=lambda size: abs(size - value))
