"""From a space and a budget to the shapes that fit, best first."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Scores
from nemo_minitron.artifacts.blocks import BLOCK_INFLUENCE
from nemo_minitron.errors import InputError
from nemo_minitron.search.formula import Columns, Formula
from nemo_minitron.search.proxy import make_proxy
from nemo_minitron.search.space import Space
from nemo_minitron.search.targets import Target
from nemo_minitron.search.varied import length, resized

Measure = Callable[["Candidate"], float]
Check = Callable[[Architecture], None]  # raises InputError for a shape that cannot run
Guess = Callable[[Columns], np.ndarray]  # sizes -> a value above 0, larger for a better shape, NaN for an illegal one
RANKED = 2048  # most shapes that are ranked, of all that fit
TIMED = 64  # most shapes whose latency is measured


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A shape. `sizes`: size by axis, for the axes that the space varies; `kept`: the proxy (None without scores)."""

    sizes: Mapping[str, int]
    architecture: Architecture
    kept: float | None = None

    @property
    def name(self) -> str:
        """A name that is legal for a folder: `layers28-hidden512-ffn1280`."""
        return "-".join(f"{name}{size}" for name, size in self.sizes.items())

    def __str__(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.sizes.items())


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """`candidates`: the best shapes, best first; `front`: the shapes that no other beats in both cost and the share
    kept, by rising cost; `combinations`: the number of shapes tried; `fitting`: the number that meet the targets."""

    candidates: Sequence[Candidate]
    front: Sequence[Candidate]
    combinations: int
    fitting: int


@dataclasses.dataclass
class _Rows:
    """Shapes, one a row: sizes int64 [rows, axes], the cost of the first target, and the value they are ranked by."""

    sizes: np.ndarray
    cost: np.ndarray
    rank: np.ndarray

    def take(self, at: np.ndarray) -> _Rows:
        return _Rows(self.sizes[at], self.cost[at], self.rank[at])

    def join(self, other: _Rows) -> _Rows:
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))
        return _Rows(*(np.concatenate(pair) for pair in pairs))

    def best(self, count: int) -> _Rows:
        """The `count` rows of highest rank; of equal rows the earlier comes first."""
        return self.take(np.argsort(-self.rank, kind="stable")[:count])

    def with_better(self, rows: _Rows, count: int) -> _Rows:
        """The `count` best of these rows, which are sorted, and later ones; most of a large space are not looked at."""
        above = self.rank[-1] if len(self.rank) >= count else -np.inf
        return self.join(rows.take(rows.rank > above)).best(count)

    def front(self) -> _Rows:
        """The rows that keep more than every cheaper row, by rising cost."""
        order = np.lexsort((-self.rank, self.cost))
        rank = self.rank[order]
        before = np.concatenate([[-np.inf], np.maximum.accumulate(rank)[:-1]]) if len(rank) else rank
        return self.take(order[rank > before])

    def maximal(self) -> _Rows:
        """The rows that fit inside no other row; a shape fits inside another if no size of it is larger."""
        inside = (self.sizes[:, None] <= self.sizes[None]).all(axis=2)
        return self.take(inside.sum(axis=1) == 1)  # only itself


def search(
    space: Space,
    targets: Sequence[Target],
    scores: Scores | None = None,
    *,
    top: int = 12,
    maximal: bool = False,
    depth: str = BLOCK_INFLUENCE,
    contiguous: bool = True,
    latency: tuple[float, Measure] | None = None,
    proxy: Guess | None = None,
    check: Check | None = None,
) -> SearchResult:
    """Enumerates the whole space, keeps what meets every target, and ranks it by `proxy`, by default that of `scores`.

    Without either the shape closest to the first target comes first. `maximal` leaves out a shape that fits inside
    another one that meets the targets. `latency`: a limit and a function that measures a candidate (in the same
    unit); candidates are measured in the order of their rank, 64 at most, until `top` of them are within the limit.
    Layers are dropped by the criterion `depth`, as in `plan`. `check` refuses shapes that could not run, for example in
    the layout of a job; they are left out of the candidates.

    Raises InputError if there is no target, if no shape meets them (it then names the nearest shape), and as `check`
    if it refuses each of the best shapes.
    """
    if not targets:
        raise InputError("there is no target to search for; give the parameters, the memory or the FLOPs")
    if proxy is None and scores:
        proxy = make_proxy(scores, space.axes, depth, contiguous)
    formulas = [Formula(target.cost, space.source, space.axes) for target in targets]
    best = front = _Rows(np.empty((0, len(space.axes)), np.int64), np.empty(0, np.int64), np.empty(0))
    fitting, nearest = 0, None
    for columns in space.blocks():
        costs = [formula(columns) for formula in formulas]
        rank = proxy(columns) if proxy else -np.abs(costs[0] - targets[0].value).astype(np.float64)
        misses = np.max([target.misses(cost) for target, cost in zip(targets, costs, strict=True)], axis=0)
        misses = np.where(np.isnan(rank), np.inf, misses)
        nearest = _nearer(nearest, columns, misses)
        rows = _Rows(np.stack([*columns.values()], axis=1), costs[0], rank).take(misses == 0)
        fitting += len(rows.cost)
        best = best.with_better(rows, max(top, RANKED))
        front = front.join(rows).front() if proxy else front
    if not fitting:
        raise InputError(_none_fits(space, targets, nearest))
    if check is not None:
        best = _legal(space, best, check)
    ranked = _candidates(space, best.maximal() if maximal else best, proxy is not None)
    chosen = itertools.islice(ranked if latency is None else _fast_enough(ranked, *latency), top)
    return SearchResult(
        list(chosen), list(_candidates(space, front, True)) if proxy else [], space.combinations, fitting
    )


def _candidates(space: Space, rows: _Rows, scored: bool) -> Iterator[Candidate]:
    for sizes, rank in zip(rows.sizes.tolist(), rows.rank.tolist(), strict=True):
        named = dict(zip(space.axes, sizes, strict=True))
        yield Candidate(named, resized(space.source, named), rank if scored else None)


def _legal(space: Space, rows: _Rows, check: Check) -> _Rows:
    """The rows whose shapes `check` does not refuse. Raises the first refusal if it refuses all of them."""
    legal, refusal = [], None
    for at, candidate in enumerate(_candidates(space, rows, False)):
        try:
            check(candidate.architecture)
            legal.append(at)
        except InputError as error:
            refusal = refusal or error
    if refusal and not legal:
        raise refusal
    return rows.take(np.array(legal, np.int64))


def _fast_enough(candidates: Iterator[Candidate], limit: float, measure: Measure) -> Iterator[Candidate]:
    """Yields candidates within the limit; measures only as many as are consumed. Raises InputError if none is within
    it."""
    fastest: tuple[float, Candidate] | None = None
    for candidate in itertools.islice(candidates, TIMED):
        latency = measure(candidate)
        if fastest is None or latency < fastest[0]:
            fastest = latency, candidate
        if latency <= limit:
            yield candidate
    if fastest and fastest[0] > limit:
        nearest = f"the nearest is {fastest[1]} with {fastest[0]:.3g}"
        raise InputError(f"none of the best {TIMED} shapes takes at most {limit:g}; {nearest}")


def _nearer(
    nearest: tuple[float, dict[str, int]] | None, columns: Columns, misses: np.ndarray
) -> tuple[float, dict[str, int]] | None:
    """The nearest shape so far, and how far it misses."""
    if not len(misses):
        return nearest
    at = int(np.argmin(misses))
    if not np.isfinite(misses[at]) or (nearest is not None and misses[at] >= nearest[0]):
        return nearest
    return float(misses[at]), {name: int(sizes[at]) for name, sizes in columns.items()}


def _none_fits(space: Space, targets: Sequence[Target], nearest: tuple[float, dict[str, int]] | None) -> str:
    wanted = " and ".join(map(str, targets))
    if nearest is None:
        return f"no shape of the space is legal; its axes are {', '.join(space.axes)}: check divisors and query groups"
    shape = Candidate(nearest[1], resized(space.source, nearest[1]))
    costs = " and ".join(f"{t.cost(shape.architecture):,} {t.unit or t.name}" for t in targets)
    return f"none of {space.combinations:,} shapes has {wanted}; the nearest is {shape} with {costs}"


def cut_of(candidate: Candidate, source: Architecture) -> dict[str, int]:
    """The sizes to keep, as `plan` takes them, for the axes that get smaller."""
    return {name: size for name, size in candidate.sizes.items() if size < length(source, name)}
