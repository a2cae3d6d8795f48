"""When a gate opens: two models are the same, or one is better than the other, as far as rounding and noise allow."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.errors import GateError

if TYPE_CHECKING:
    from nemo_minitron.evaluation import Answers, Windows

PASSED, FAILED, OPEN, LEFT_OUT = "passed", "failed", "undecided", "not checked"

# The largest difference of logits, as a share of their standard deviation, that rounding explains.
# fp32: sums of thousands of terms in another order, over all layers, are right to about 1e-5; a near tie of two experts
# may fall otherwise at single tokens. bf16 rounds what passes between layers to 2**-9 of itself, and layers add up to a
# few hundredths. A unit in a wrong place gives some tenths or more. (Seen on SmolLM2: 2e-6, and 0.018 in bf16.)
LIMITS = {"fp32": 1e-3, "bf16": 0.1}
# Losses are in the wrong order only if they are so by more than all three. Of eight rows, four standard errors come by
# chance in one of 400 cases. Below a hundredth of a nat the order of units would hardly matter. And scores only guess
# what a unit is worth: where units are nearly alike, as the heads of a group, other ones may well be a little better,
# but a rank that is upside down costs a large part of all that the cut costs.
ERRORS, MARGIN, SHARE = 4.0, 0.01, 0.2
CERTAIN = 2.0  # standard errors from which a difference in the right order is more than noise
KNOWS = 1.0  # nats by which a teacher is better than guessing, at least; a trained one is by several


@dataclasses.dataclass(frozen=True)
class Gate:
    """What a gate found. `figure`: a share of the logits' spread with its `limit`, or nats a token with their standard
    `error`; None if nothing was compared. `note`: one clause for the reader."""

    name: str
    state: str
    note: str
    figure: float | None = None
    limit: float | None = None
    error: float | None = None

    def as_dict(self) -> JsonObject:
        return dataclasses.asdict(self)

    def describe(self) -> str:
        """A line for the log."""
        return f"{self.name}: {self.state}; {self.note}"


def left_out(name: str, why: str) -> Gate:
    """A gate with nothing to compare in this job."""
    return Gate(name, LEFT_OUT, why)


def same(name: str, one: Answers, other: Answers, precision: str) -> Gate:
    """Passes if two models give the same logits, up to the rounding of the precision."""
    apart, limit = one.apart(other), LIMITS[precision]
    note = f"logits differ by {apart:.2g} of their spread, of {limit:g} that rounding in {precision} explains"
    return Gate(name, PASSED if apart <= limit else FAILED, note, apart, limit)


def better(name: str, good: Windows, bad: Windows, teacher: Windows) -> Gate:
    """Passes if the first model has the smaller loss on the same rows, row by row. It fails only if the order is wrong
    by more than noise and by more than matters, beside what the cut costs. A single row has no standard error, so it
    decides nothing."""
    from nemo_minitron.evaluation.windows import standard_error

    gap_N = bad.losses_N - good.losses_N
    gap, error = float(gap_N.mean()), standard_error(gap_N)
    if error is None:
        return Gate(name, OPEN, f"the loss is smaller by {gap:.4f} nats on a single row, without an error", gap)
    cost = float(np.mean(good.losses_N - teacher.losses_N))
    wrong = gap < -max(ERRORS * error, MARGIN, SHARE * cost)
    state = FAILED if wrong else PASSED if gap > CERTAIN * error else OPEN
    note = f"the loss is smaller by {gap:.4f} nats, standard error {error:.4f}; the cut costs {cost:.4f}"
    return Gate(name, state, note, gap, error=error)


def guesses(teacher: Windows, vocab_size: int) -> str:
    """Why losses have no order that means anything; "" for a teacher that knows the text better than by guessing."""
    loss, blind = float(teacher.losses_N.mean()), math.log(vocab_size)
    if loss < blind - KNOWS:
        return ""
    return f"the teacher hardly knows the text: its loss is {loss:.2f} nats, and that of guessing a token {blind:.2f}"


def check_open(gates: Iterable[Gate], file: Path) -> None:
    """Raises GateError, which names what failed, if a gate is shut. `file`: where the figures are."""
    shut: Sequence[Gate] = [gate for gate in gates if gate.state == FAILED]
    if shut:
        faults = "; ".join(f"gate '{gate.name}' failed: {gate.note}" for gate in shut)
        raise GateError(
            f"{faults}. Nothing was trained; '{file}' has the figures; mend the cut, or go on all the same with "
            "--skip-gates (gates.run=false)"
        )
