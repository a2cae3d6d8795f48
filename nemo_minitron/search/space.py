"""The shapes that a search tries: the legal sizes of each axis, in every combination."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.axes import AXES, axis
from nemo_minitron.errors import InputError
from nemo_minitron.hybrid import COUNTS
from nemo_minitron.search.sizes import Keep, given_layers, student_architecture
from nemo_minitron.search.varied import VARIED, check_varied, length, varied_by

DEFAULT_AXES = (
    "layers", *COUNTS, "hidden", "ffn", "mamba_heads", "experts", "expert_ffn", "shared_expert_ffn",
)  # fmt: skip
WIDTHS = ("hidden", "ffn", "expert_ffn", "shared_expert_ffn")
IN_STEPS = (*WIDTHS, "experts", "mamba_head_dim")  # the others have few sizes, and each legal one is tried
HEADS = ("heads", "query_groups", "mamba_heads")
STEP = 64  # multiple that tensor cores need in 16 bits
MOST = 200_000_000  # shapes; a hundred million take about ten seconds
ROWS = 1 << 20  # shapes in memory at a time

Sizes = Sequence[int] | Sequence[Fraction]  # sizes of an axis; fractions are multiples of the hidden size
Bounds = Mapping[str, tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class Divisors:
    """The numbers that sizes must be multiples of; if several apply, their least common multiple.

    `every`: for each dimension of a matrix that is cut, where a head counts with its dimension (0: any size is legal,
    see `step`), a Mamba head with its own in each shape; tensor cores need 64 or 128. `tp`: for dimensions that tensor
    parallelism divides. `local`: `every` applies to the share of each tensor-parallel rank; 16 then makes all matrices
    legal in FP8. `of`: for single axes.
    """

    every: int = 0
    tp: int = 1
    of: Mapping[str, int] = dataclasses.field(default_factory=dict)
    local: bool = False

    def __post_init__(self) -> None:
        for name, value in (("every", self.every or 1), ("tp", self.tp), *self.of.items()):
            if value < 1:
                raise InputError(f"the divisor {name}={value} is not legal; the nearest is 1")

    def hard(self, source: Architecture, name: str) -> int:
        """The number that a size of this axis must be a multiple of."""
        every = self.every or 1
        if name in ("heads", "query_groups"):
            every //= math.gcd(every, source.head_dim)
        elif name == "experts":
            every = source.moe_router_num_groups or 1
        elif name == "mamba_heads":
            every = source.mamba_num_groups or 1
        elif name not in WIDTHS:
            every = 1
        sharded = name in (*HEADS, *WIDTHS[1:])
        if sharded:
            every = every * self.tp if self.local else math.lcm(every, self.tp)
        return math.lcm(every, self.of.get(name, 1))

    def step(self, source: Architecture, name: str, multiple: int = 1) -> int:
        """The step from one size to the next between bounds; sizes are also multiples of `multiple`.

        Unless divisors say otherwise, the step is near 64, chosen so that an axis of widths or experts has between
        eight and a hundred odd steps."""
        hard, whole = math.lcm(self.hard(source, name), multiple), length(source, name)
        if name not in IN_STEPS or self.every or name in self.of:
            return hard
        least, most = _power_of_two(whole // 64), _power_of_two(whole // 8)
        step = max(min(STEP, most), least)
        while step > 1 and multiple > 1 and math.lcm(step, multiple) > whole // 8:
            step //= 2  # heads are seldom a power of two
        return math.lcm(step, hard)


@dataclasses.dataclass(frozen=True)
class Space:
    """`source`: the model, if layers are listed with these alone; `sizes`: the legal sizes of each axis that varies, of
    a hybrid also the numbers of layers of a kind; `multiples`: sizes given as multiples of the hidden size; `loads`:
    axis -> a number, or another axis, that its sizes must be multiples of, so that the student loads everywhere."""

    source: Architecture
    sizes: Mapping[str, tuple[int, ...]]
    multiples: Mapping[str, tuple[Fraction, ...]]
    divisors: Divisors
    loads: Mapping[str, int | str] = dataclasses.field(default_factory=dict)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that have a column, in the order of VARIED; query groups bring the heads with them."""
        named = {*self.sizes, *self.multiples}
        return tuple(name for name in VARIED if name in named or (name == "heads" and "query_groups" in named))

    @property
    def combinations(self) -> int:
        return math.prod(len(values) for values in (*self.sizes.values(), *self.multiples.values()))

    def blocks(self, rows: int = ROWS) -> Iterator[dict[str, np.ndarray]]:
        """All legal shapes, at most `rows` at a time: axis -> sizes, int64 [shapes]."""
        grid: dict[str, tuple[int, ...] | tuple[Fraction, ...]] = {**self.sizes, **self.multiples}
        lengths = tuple(len(values) for values in grid.values())
        for start in range(0, self.combinations, rows):
            at = np.unravel_index(np.arange(start, min(start + rows, self.combinations)), lengths)
            places = dict(zip(grid, at, strict=True))
            columns = {name: np.array(values, np.int64)[places[name]] for name, values in self.sizes.items()}
            legal = np.ones(len(at[0]), bool)
            hidden = columns.get("hidden", np.full(len(legal), self.source.hidden_size))
            for name, values in self.multiples.items():
                over, under = (np.array([getattr(v, p) for v in values])[places[name]] for p in _PARTS)
                columns[name] = hidden * over // under
                legal &= (hidden * over % under == 0) & self._within(name, columns[name])
            legal &= self._whole_groups(columns) & self._whole_matrices(columns)
            for name, of in self.loads.items():
                legal &= self._column(columns, name) % (self._column(columns, of) if isinstance(of, str) else of) == 0
            yield {name: columns[name][legal] for name in self.axes}

    def _column(self, columns: Mapping[str, np.ndarray], name: str) -> np.ndarray:
        return columns.get(name, np.array([axis(name).length(self.source)]))

    def _within(self, name: str, sizes: np.ndarray) -> np.ndarray:
        return (sizes <= axis(name).length(self.source)) & (sizes % self.divisors.hard(self.source, name) == 0)

    def _whole_groups(self, columns: dict[str, np.ndarray]) -> np.ndarray | bool:
        """Whether each query group keeps the same number of heads; heads that do not vary are cut with their groups."""
        size = self.source.heads_per_group
        if "query_groups" in columns and "heads" not in columns:
            columns["heads"] = columns["query_groups"] * size
        if "heads" not in columns:
            return True
        groups = columns.get("query_groups", np.full(1, self.source.num_query_groups))
        return (columns["heads"] % groups == 0) & (columns["heads"] <= groups * size)

    def _whole_matrices(self, columns: Mapping[str, np.ndarray]) -> np.ndarray | bool:
        """Whether all channels of all Mamba heads are legal as a dimension of a matrix."""
        if columns.keys().isdisjoint(("mamba_heads", "mamba_head_dim")):
            return True
        inner = self._column(columns, "mamba_heads") * self._column(columns, "mamba_head_dim")
        every = (self.divisors.every or 1) * (self.divisors.tp if self.divisors.local else 1)
        return inner % every == 0


_PARTS = ("numerator", "denominator")


def make_space(
    source: Architecture,
    *,
    lists: Mapping[str, Sizes] | None = None,
    bounds: Bounds | None = None,
    divisors: Divisors | None = None,
    keep: Keep | None = None,
    loads: Mapping[str, int | str] | None = None,
) -> Space:
    """The space of a search. `lists`: the sizes to try, as in the papers; then only these axes and those of `bounds`
    vary.

    Without lists, layers (of a hybrid those of each kind), hidden, ffn, Mamba heads and experts vary between half and
    all of the source's size. Each axis of `bounds` varies between its two ends, which are included. Heads, query
    groups, the channels of a Mamba head and the vocabulary vary only if they are named.
    `divisors` decide the steps and the legal sizes; illegal sizes in a list are left out. `keep` fixes an axis. `loads`
    (a family's `multiples`, by fields of Architecture) leaves out sizes that some version of transformers does not
    load, if other sizes remain; it does not apply to axes that are listed or kept by name.

    Raises InputError for an axis that the model lacks, a size out of range, an axis without a legal size, and a number
    of layers that does not say which ones stay.
    """
    lists, bounds, divisors, keep = lists or {}, bounds or {}, divisors or Divisors(), keep or {}
    _check_names(source, {*lists}, {*bounds}, keep)
    for name in divisors.of:
        check_varied(source, name)
    student_architecture(source, keep)
    if (listed := given_layers(source, keep)) is not None:  # they are known, and no number of layers is needed
        source, keep = source.keep_layers(listed), {name: size for name, size in keep.items() if name != "layers"}
    everywhere = _everywhere(loads or {}, {*lists, *keep})
    sizes: dict[str, tuple[int, ...]] = {name: (int(value),) for name, value in keep.items()}  # type: ignore[arg-type]
    multiples: dict[str, tuple[Fraction, ...]] = {}
    for name, values in lists.items():
        if all(isinstance(value, Fraction) for value in values):
            multiples[name] = _multiples(source, name, values)
        else:
            sizes[name] = _listed(source, name, values, divisors.hard(source, name))
    for name in bounds if lists else {**dict.fromkeys(_default_axes(source, listed is not None)), **bounds}:
        if name not in keep:
            sizes[name] = _between(source, name, bounds.get(name), divisors, everywhere.get(name, 1))
    for name, of in tuple(everywhere.items()):
        every = axis(of).length(source) if isinstance(of, str) else of
        if name in sizes and of not in sizes and all(size % every for size in sizes[name]):
            del everywhere[name]  # no size within the bounds fits, so the rule is dropped
    space = Space(source, {n: sizes[n] for n in VARIED if n in sizes}, multiples, divisors, everywhere)
    if space.combinations > MOST:
        raise InputError(f"the space has {space.combinations:,} shapes; narrow it to at most {MOST:,}")
    return space


def _everywhere(loads: Mapping[str, int | str], named: set[str]) -> dict[str, int | str]:
    """`loads` keyed by axis, without the axes whose sizes the user named."""
    by_size = {cut.size: name for name, cut in AXES.items()}
    return {
        by_size[field]: by_size[of] if isinstance(of, str) else of
        for field, of in loads.items()
        if by_size[field] not in named
    }


def _check_names(source: Architecture, lists: set[str], bounds: set[str], keep: Keep) -> None:
    """Raises InputError for what cannot vary, or is given twice."""
    for name in sorted(lists | bounds):
        check_varied(source, name)
    twice = sorted((lists & bounds) | ((lists | bounds) & {*keep}))
    if twice:
        raise InputError(f"'{twice[0]}' is given twice; give it in one of --space, --bounds and --keep")
    kinds = sorted((lists | bounds) & {*COUNTS})
    if kinds and "layers" in keep:
        raise InputError(f"layers and {kinds[0]} are both given; give the list or the numbers of each kind")


def _default_axes(source: Architecture, listed: bool) -> list[str]:
    """The axes that vary by default: without layers where their number does not say which ones stay, or where they are
    listed."""
    return [n for n in varied_by(source) if n in DEFAULT_AXES and not (listed and n in ("layers", *COUNTS))]


def _power_of_two(value: int) -> int:
    """The largest power of two up to `value`, at least 1."""
    return 1 << max(0, value.bit_length() - 1)


def _least(source: Architecture, name: str) -> int:
    return source.moe_router_topk if name == "experts" else 1


def _listed(source: Architecture, name: str, values: Sizes, divisor: int) -> tuple[int, ...]:
    most, least = length(source, name), _least(source, name)
    for value in values:
        if isinstance(value, Fraction):
            raise InputError(f"'{name}' mixes sizes with multiples of hidden; write all of one kind")
        if not least <= value <= most:
            near = min(max(value, least), most)
            raise InputError(f"{name}={value} is not legal; legal are {least} to {most}, the nearest is {near}")
    legal = sorted({int(value) for value in values if value % divisor == 0})
    return tuple(legal) if legal else _no_legal_size(name, divisor, list(map(int, values)))


def _multiples(source: Architecture, name: str, values: Sizes) -> tuple[Fraction, ...]:
    if name not in WIDTHS or name == "hidden":
        raise InputError(f"'{name}' cannot be a multiple of hidden; {', '.join(WIDTHS[1:])} can")
    fractions = tuple(sorted({Fraction(value) for value in values}))
    if fractions[0] <= 0:
        raise InputError(f"{name}={float(fractions[0]):g}x is not legal; multiples are above 0")
    return fractions


def _between(
    source: Architecture, name: str, bounds: tuple[int, int] | None, divisors: Divisors, multiple: int | str = 1
) -> tuple[int, ...]:
    most, least = length(source, name), _least(source, name)
    low, high = bounds or (max(least, -(-most // 2)), most)
    if not least <= low <= high <= most:
        raise InputError(f"{name}={low}:{high} is not legal; bounds lie within {least}:{most}, the lower one first")
    every = axis(multiple).length(source) if isinstance(multiple, str) else multiple
    step, hard = divisors.step(source, name, every), divisors.hard(source, name)
    legal = {*range(-(-low // step) * step, high + 1, step)} or {*range(-(-low // hard) * hard, high + 1, hard)}
    legal |= {size for size in {low, high} if size % hard == 0 and (bounds or size == most)}
    return tuple(sorted(legal)) if legal else _no_legal_size(name, hard, [low, high])


def _no_legal_size(name: str, divisor: int, given: Sequence[int]) -> tuple[int, ...]:
    near = max(1, round(given[-1] / divisor)) * divisor
    raise InputError(
        f"no size of '{name}' from {min(given)} to {max(given)} is a multiple of {divisor}; the nearest is {near}"
    )
