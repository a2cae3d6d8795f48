"""The sizes of a student after each round, if it is scored and cut in several rounds (2407.14679, iterative
importance)."""

from __future__ import annotations

import math
from typing import Any

from nemo_minitron import hybrid
from nemo_minitron.architecture import Architecture
from nemo_minitron.axes import axis
from nemo_minitron.errors import InputError
from nemo_minitron.search.sizes import Keep, given_layers, layers_by_kind, student_architecture

UNIT = 64  # multiple for tensor cores; the usual parallel sizes divide it
# small numbers; each one is legal
COUNTED = ("layers", *hybrid.COUNTS, "heads", "query_groups", "experts_per_token")


def round_sizes(source: Architecture, keep: Keep, rounds: int) -> list[dict[str, Any]]:
    """The sizes (by axis) after each of `rounds` rounds: equal steps from the source's sizes to those of `keep`.

    Widths are rounded to multiples of the largest power of two up to 64 that divides both ends and is no larger than
    a step; layers and query groups to whole numbers; heads to the same number in each group; halves are rounded up.
    The result depends on no layout. The last entry is `keep` itself.

    Raises InputError as `student_architecture` does, for a list of layers, and for more rounds than there are steps.
    """
    if rounds == 1:
        return [dict(keep)]
    if given_layers(source, keep) is not None:
        raise InputError("the layers that stay are listed, so no round can choose them; give their number, or rounds=1")
    target = student_architecture(source, keep)
    ends = [_ends(name, source, target) for name in keep]
    most = max([1, *(before - after for before, after in ends)])
    if rounds > most:
        raise InputError(f"rounds={rounds} leaves some round nothing to cut; the nearest legal number is {most}")
    return [_between(source, target, keep, number, rounds) for number in range(1, rounds)] + [dict(keep)]


def _ends(name: str, source: Architecture, target: Architecture) -> tuple[int, int]:
    """The sizes of an axis before and after; heads are counted per group."""
    if name == "heads":
        return source.heads_per_group, target.heads_per_group
    if name in hybrid.COUNTS:
        return tuple(len(layers_by_kind(model)[name]) for model in (source, target))  # type: ignore[return-value]
    return axis(name).length(source), axis(name).length(target)


def _between(source: Architecture, target: Architecture, keep: Keep, number: int, rounds: int) -> dict[str, int]:
    """The sizes after round `number` of the axes in `keep`."""

    def step(before: int, after: int, unit: int) -> int:
        """The multiple of `unit` nearest to before + (after - before) number / rounds."""
        return unit * ((2 * (before * rounds + (after - before) * number) + unit * rounds) // (2 * unit * rounds))

    sizes = {}
    for name in keep:
        before, after = _ends(name, source, target)
        sizes[name] = step(before, after, 1 if name in COUNTED else _unit(before, after, rounds))
    if "heads" in sizes:
        sizes["heads"] *= sizes.get("query_groups", source.num_query_groups)
    return sizes


def _unit(before: int, after: int, rounds: int) -> int:
    """The multiple that sizes are rounded to; 1 if a round cuts less than any larger unit."""
    unit = math.gcd(before, after, UNIT)
    while unit > 1 and unit * rounds > before - after:
        unit //= 2
    return unit
