"""Ranks a few candidates by brief distillation, and stops the worse half after each round.

The papers train every candidate equally long (2407.14679, section 3: 400 steps, ranks settle after about 300). Here
training goes in rounds; after each round the worse half of the running candidates stops (successive halving), but at
least two go on. It is likely, not certain, that a stopped candidate could not have won: the recorded ranks over steps
show whether they had settled.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from nemo_minitron.errors import InputError

Curve = Sequence[tuple[int, float]]  # (step, loss), every step so far
Measure = Callable[
    [str, int], Curve
]  # (candidate, steps) -> its curve up to that step; training resumes where it stopped


@dataclasses.dataclass(frozen=True)
class Standing:
    """A candidate at a step: its loss, averaged over the last part of the round, and its rank among the candidates that
    reached the step; 1 is the best."""

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
        """The first recorded step after which no two of the remaining candidates change places."""
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
    """Trains candidates by `measure` and ranks them. All candidates must see the same batches in the same order.

    `steps` are divided into `rounds` equal parts; after each but the last, the better half goes on (rounded up, at
    least two). `marks`: the number of steps, at least one a round, at which candidates are ranked; a loss is the mean
    over the steps since the mark before. Of equal losses the earlier candidate is ahead. `stop` is called with each
    candidate that is stopped.

    Raises InputError if there is no candidate, if a curve lacks a step, and if all candidates have diverged.
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
    """The number of candidates that go on after a round: the better half, rounded up, but at least two."""
    return min(running, max(2, -(-running // 2)))


def _between(places: Sequence[int], first: int, last: int) -> list[tuple[int, int]]:
    """(mark before, mark) for each mark after `first` up to `last`."""
    within = [place for place in places if first < place <= last]
    return list(zip([first, *within[:-1]], within, strict=True))


def _stand(curves: dict[str, dict[int, float]], begin: int, place: int) -> list[Standing]:
    losses = {}
    for name, curve in curves.items():
        missing = [step for step in range(begin + 1, place + 1) if step not in curve]
        if missing:
            raise InputError(f"the distillation of '{name}' has no loss for step {missing[0]}; run it again")
        loss = sum(curve[step] for step in range(begin + 1, place + 1)) / (place - begin)
        losses[name] = math.inf if math.isnan(loss) else loss  # a diverged candidate ranks behind all others
    if not any(math.isfinite(loss) for loss in losses.values()):
        raise InputError(f"no candidate's distillation gives a finite loss at step {place}; lower the learning rate")
    order = sorted(losses, key=lambda name: losses[name])
    return [Standing(place, name, losses[name], at) for at, name in enumerate(order, 1)]
