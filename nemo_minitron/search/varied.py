"""What a search varies: the axes of a model and, of a hybrid, the number of its layers of each kind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from nemo_minitron.architecture import Architecture
from nemo_minitron.axes import AXES, axis
from nemo_minitron.errors import InputError
from nemo_minitron.hybrid import COUNTS
from nemo_minitron.search.sizes import check_one_kind, layers_by_kind

VARIED = ("layers", *COUNTS, *(name for name in AXES if name != "layers"))  # in the order of a shape's columns


def length(source: Architecture, name: str) -> int:
    """The size of an axis, or the number of layers of a kind; 0 in a model that lacks it. Raises InputError for an
    unknown name."""
    return len(layers_by_kind(source).get(name, ())) if name in COUNTS else axis(name).length(source)


def varied_by(source: Architecture) -> list[str]:
    """The names of what can be cut. Where layers are not all of one kind, their mere number is none of them."""
    return [name for name in VARIED if length(source, name) and not (name == "layers" and source.layers_differ)]


def check_varied(source: Architecture, name: str) -> int:
    """The `length`. Raises InputError for what a search of this model cannot vary."""
    size = length(source, name)
    if not size:
        raise InputError(f"the model has no '{name}' to cut; it has {', '.join(varied_by(source))}")
    if name == "layers":
        check_one_kind(source)
    if name not in COUNTS and not axis(name).ranked:
        raise InputError(f"'{name}' cannot vary in a search, since no score ranks its sizes; give one in --keep")
    return size


def resized(source: Architecture, sizes: Mapping[str, int]) -> Architecture:
    """The source with other sizes. Of a kind of layers the first ones stay; those that it lacks come last. Which ones
    stay changes no cost."""
    fields = {axis(name).size: size for name, size in sizes.items() if name not in COUNTS}
    counts = {COUNTS[name]: size for name, size in sizes.items() if name in COUNTS}
    if not counts:
        return source.replace(**fields)
    pattern, taken = "", Counter[str]()
    for symbol in source.hybrid_pattern or "":
        if taken[symbol] < counts.get(symbol, source.num_layers):
            pattern += symbol
            taken[symbol] += 1
    pattern += "".join(symbol * (count - taken[symbol]) for symbol, count in counts.items())
    return source.replace(**fields, hybrid_pattern=pattern, num_layers=len(pattern))
