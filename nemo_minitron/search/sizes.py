"""From a user's `keep` to the student's Architecture; a refusal is one sentence that says what is legal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

from nemo_minitron.architecture import Architecture
from nemo_minitron.axes import AXES, axis
from nemo_minitron.errors import InputError

Keep = Mapping[str, int | Sequence[int]]  # axis -> size that stays; for layers also the list of layers that stay
VOCAB = "a job keeps the vocabulary, since the student learns the teacher's tokens; cut it with minitron plan and prune"


def target_of(source: Architecture, keep: Mapping[str, int]) -> Architecture:
    """The student's Architecture. Raises InputError for an illegal size, or a cut of the vocabulary."""
    if not keep:
        raise InputError("the recipe cuts nothing; set keep, for example keep.ffn=1024")
    if "vocab" in keep:
        raise InputError(VOCAB)
    return student_architecture(source, keep)


def student_architecture(source: Architecture, keep: Keep) -> Architecture:
    """The Architecture that `keep` leaves of `source`; if query groups are cut, their heads are cut with them.

    Raises InputError for an unknown axis, an axis that the source lacks, a size above the source's, heads that do not
    divide into the query groups, and a mere number of layers if only some layers are mixtures of experts.
    """
    listed = given_layers(source, keep)
    if "layers" in keep and listed is None and isinstance(source.moe_layer_freq, tuple):
        raise InputError("some layers are mixtures of experts and some are not; list the layers that stay")
    sizes = {axis(name).size: _size(source, name, value) for name, value in keep.items()}
    groups = sizes.get("num_query_groups", source.num_query_groups)
    heads = sizes.setdefault("num_attention_heads", groups * source.heads_per_group)
    if heads % groups or heads > groups * source.heads_per_group:
        legal = range(groups, groups * source.heads_per_group + 1, groups)
        raise InputError(
            f"heads={heads} is not legal with {groups} query groups of {source.heads_per_group} heads; "
            f"legal are multiples of {groups} up to {legal[-1]}, the nearest is {_nearest(heads, legal)}"
        )
    return (source if listed is None else source.keep_layers(listed)).replace(**sizes)


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


def _size(source: Architecture, name: str, value: Any) -> int:
    listed = given_layers(source, {name: value})
    if listed is not None:
        return len(listed)
    most = axis(name).length(source)
    if not most:
        axes_of_model = ", ".join(other for other, cut in AXES.items() if cut.length(source))
        raise InputError(f"the model has no '{name}' to cut; it has {axes_of_model}")
    least = source.moe_router_topk if name == "experts" else 1  # a token goes to so many experts
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
