"""Brief distillation as the judge: a few candidates are trained a little, ranked, and the worse half stops.

The papers train every candidate for as long (2407.14679, section 3: 400 steps, ranks settle after about 300). Here
training goes in rounds, and after each the worse half of those still running stops (successive halving), but for the
last two. That one stopped could not have won is likely, not certain: the ranks over steps, which are recorded, show
whether they had settled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from nemo_minitron.errors import InputError

Curve = Sequence[tuple[int, float]]  # (step, loss), every step so far
Measure = Callable[[str, int], Curve]  # (candidate, steps) -> its curve up to that step, going on from where it was


@dataclasses.dataclass(frozen=True)
class Standing:
    """A candidate at a step: its loss, averaged over the last part of the round, and its rank from 1 among those
    that got as far."""

    step: int
    candidate: str
    loss: float
    rank: int


@dataclasses.dataclass(frozen=True)
class Ranking:
    """`standings`: at every recorded step, best first; `stopped`: candidate -> the step after which it stopped."""

    standings: Sequence[Standing]
    stopped: dict[str, int]
    winner: str

    @property
    def settled(self) -> int:
        """The first recorded step from which on no two candidates change places any more, among those that go on."""
        steps = sorted({row.step for row in self.standings})
        for i in range(len(steps) - 1, 0, -1):
            before, after = self.order(steps[i - 1]), self.order(steps[i])
            if [name for name in before if name in after] != after:
                return steps[i]
        return steps[0]

    def order(self, step: int) -> list[str]:
        """Candidates at a recorded step, best first."""
        return [row.candidate for row in self.standings if row.step == step]


def rank(
    candidates: Sequence[str],
    measure: Measure,
    *,
    steps: int,
    rounds: int = 3,
    marks: int = 12,
    stop: Callable[[str], None] | None = None,
) -> Ranking:
    """Trains by `measure` and returns who won. All candidates must see the same batches in the same order.

    `rounds` equal parts of `steps`; after each but the last, the better half, rounded up, but at least two, go on.
    A loss is the mean over the steps since the mark before; `marks`: how many such marks there are in `steps`, at
    least one a round. Of equal losses the earlier candidate is ahead. `stop` is told of each that is stopped.

    Raises InputError for no candidate, for a curve that lacks a step, and where all have diverged.
    """
    if not candidates:
        raise InputError("there is no candidate to rank")
    ends = [round(steps * (i + 1) / rounds) for i in range(rounds)]
    places = sorted({*ends, *(max(1, round(steps * (i + 1) / marks)) for i in range(marks))})
    standings: list[Standing] = []
    running, first = list(candidates), 0
    stopped: dict[str, int] = {}
    for end in ends:
        curves = {name: dict(measure(name, end)) for name in running}
        for begin, place in _between(places, first, end):
            standings += _stand(curves, begin, place)
        order = [row.candidate for row in standings if row.step == end]
        running = order[: going_on(len(order))] if end != steps else order
        for name in order[len(running) :]:
            stopped[name] = end
            if stop is not None:
                stop(name)
        first = end
    return Ranking(standings, stopped, running[0])


def going_on(running: int) -> int:
    """How many of so many candidates train on after a round: the better half, rounded up, but at least two."""
    return min(running, max(2, -(-running // 2)))


def _between(places: Sequence[int], first: int, last: int) -> list[tuple[int, int]]:
    """Marks after `first` up to `last`, each with the one before it."""
    within = [place for place in places if first < place <= last]
    return list(zip([first, *within[:-1]], within, strict=True))


def _stand(curves: dict[str, dict[int, float]], begin: int, place: int) -> list[Standing]:
    losses = {}
    for name, curve in curves.items():
        missing = [step for step in range(begin + 1, place + 1) if step not in curve]
        if missing:
            raise InputError(f"the distillation of '{name}' has no loss for step {missing[0]}; run it again")
        loss = sum(curve[step] for step in range(begin + 1, place + 1)) / (place - begin)
        losses[name] = math.inf if math.isnan(loss) else loss  # diverged: behind all others
    if not any(math.isfinite(loss) for loss in losses.values()):
        raise InputError(f"no candidate's distillation gives a finite loss at step {place}; lower the learning rate")
    order = sorted(losses, key=lambda name: losses[name])
    return [Standing(place, name, losses[name], at) for at, name in enumerate(order, 1)]
