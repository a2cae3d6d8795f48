"""What looks wrong in a calibration: numbers that are not finite, dead units, idle layers, too few tokens."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from nemo_minitron.artifacts import Scores, criteria
from nemo_minitron.axes import AXES
from nemo_minitron.errors import InputError

STABLE = 0.9
"""A ranking is called stable if the rank correlation of two halves is at least this."""
NORM_ROWS, STREAM_LOGS = ("norms",), "stream_logs"
PER_EXPERT = ("experts", "expert_ffn")
UNITS = {
    "ffn": "neurons", "heads": "heads", "experts": "experts", "expert_ffn": "neurons of its experts",
    "shared_expert_ffn": "neurons of its shared expert",
}  # fmt: skip
RANKED = ("ffn", "heads", "query_groups", "hidden", "layers", "experts", "expert_ffn", "shared_expert_ffn")


def check_finite(states: Mapping[str, np.ndarray]) -> None:
    """Raises InputError if a statistic is NaN or infinite. It names the first such layer, and the statistic."""
    failures = []
    for key, array in states.items():
        statistic, bad = key.split("/")[0], ~np.isfinite(array)
        rows = np.flatnonzero(bad.reshape(len(bad), -1).any(axis=1))
        for row in rows[:1]:
            order, where = _place(statistic, int(row), len(array))
            if statistic in PER_EXPERT:  # [L, Z, E, ...]: rows, halves, experts
                experts = bad[row].swapaxes(0, 1).reshape(bad.shape[2], -1).any(axis=1)
                where += f", expert {np.flatnonzero(experts)[0]},"
            failures.append(((order, where), statistic))
    if failures:
        (_, where), statistic = min(failures)
        raise InputError(
            f"the activations behind '{statistic}' are not finite from {where} on; check the model's weights, or "
            f"calibrate in fp32"
        )


def _place(statistic: str, row: int, rows: int) -> tuple[float, str]:
    if statistic == STREAM_LOGS:  # whatever stands in front of it or reads it names a closer place
        where = "the last layer's output" if row == rows - 1 else f"layer {row}'s input"
        return row + 0.9, where
    if statistic not in NORM_ROWS:
        return row, f"layer {row}"
    if row == rows - 1:
        return row / 2, "the final norm"
    return row / 2, f"layer {row // 2}'s {'pre-MLP' if row % 2 else 'input'} norm"


def remarks(scores: Scores) -> list[str]:
    """Sentences about what looks wrong: dead units, layers whose output is their input, an unstable ranking."""
    return [*_dead(scores), *_idle(scores), *_unstable(scores)]


def _dead(scores: Scores) -> list[str]:
    sentences = []
    for name, unit in UNITS.items():
        for layer in AXES[name].layers_of(scores.architecture) if name in scores else ():
            dead = int((scores[name][layer] == 0).sum())
            if dead:
                sentences.append(f"layer {layer}: {dead} of {scores[name][layer].size} {unit} were never active")
    return sentences


def _idle(scores: Scores) -> list[str]:
    if "layers" not in scores:
        return []
    idle = np.flatnonzero(np.abs(scores["layers"]) < 1e-6)
    return [f"layer {layer}: its output equals its input" for layer in idle]


def _unstable(scores: Scores) -> list[str]:
    return [
        f"{name}: the rankings of two halves of the samples correlate by {value:.3f} only; give more tokens"
        for name, value in split_half(scores).items()
        if value < STABLE
    ]


def split_half(scores: Scores) -> dict[str, float]:
    """Axis -> Spearman's rank correlation of the scores of two halves of the samples, the mean over layers.

    The halves are disjoint. The content of a sample decides its half, so they are the same in every layout. Empty if a
    half has no sample. `hidden` and `layers` have one ranking; the neurons of experts have one for each expert.
    """
    if not scores.states:
        return {}
    halves = []
    for half in (0, 1):
        numbers = criteria.finish(scores.states, scores.criterion, half)
        if not any(array.any() for array in numbers.values()):
            return {}
        if "experts" in scores.notes:
            numbers["experts"] = criteria.experts_by(scores.states, scores.notes["experts"], half)
        halves.append(criteria.derive(numbers, scores.architecture, scores.norms))
    names = [name for name in RANKED if name in halves[0]]
    return {name: _correlation(halves[0][name], halves[1][name]) for name in names}


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr

    rows = zip(*(np.reshape(x, (-1, x.shape[-1])) for x in (a, b)), strict=True)
    return float(np.mean([spearmanr(x, y).statistic for x, y in rows if np.ptp(x) and np.ptp(y)] or [1.0]))
