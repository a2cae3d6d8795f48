"""A model, a plan and a corpus -> the matrices that a cut of neurons or heads changes, solved anew."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.commands.corpus import cache_of, positions_of, say, tokenise
from nemo_minitron.errors import InputError
from nemo_minitron.families import check_host
from nemo_minitron.hosts import host_of
from nemo_minitron.launch.lock import locked
from nemo_minitron.launch.torchrun import launch
from nemo_minitron.pruning.compensation import solvable
from nemo_minitron.pruning.cut import check_plan
from nemo_minitron.pruning.defaults import RIDGE
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.cutting import MEMORY
from nemo_minitron.settings.derive import Fit
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.orders import CompensateOrder
from nemo_minitron.sources.tensors import ModelSource

BYTES = int(MEMORY * 1e9)


def run_compensate(
    model: str, plan: Path, data: str, out: Path, calibration: Calibration, layout: Layout, *,
    ridge: float = RIDGE, memory: int = BYTES, skip_bad_lines: bool = False,
) -> Compensation:  # fmt: skip
    """`minitron compensate`: leaves `out`, for `minitron prune --compensation`. Of `calibration` it takes the rows.

    Raises InputError for what cannot run, before a model is loaded.
    """
    from nemo_minitron.sources.open import open_source

    source = open_source(model)
    made = PrunePlan.load(plan)
    check_plan(made, source)
    check_solvable(made, ridge, memory)
    check_host(source.config)
    fit = Fit(calibration, layout)
    fit.model(positions_of(source.config))
    say(fit.remark)
    layout.check(source.architecture)
    layout.check_sequence(fit.settings.sequence_length)
    with locked(cache_of(out)):
        tokens = tokenise(
            data, source.folder, cache_of(out) / "calibration", source.architecture.vocab_size, skip_bad_lines
        )
        solve_for(source, {plan: out}, tokens.prefix, fit.settings, layout, ridge=ridge, memory=memory)
    return Compensation.load(out)


def solve_for(
    model: ModelSource, plans: Mapping[Path, Path], data: Path, calibration: Calibration, layout: Layout, *,
    ridge: float = RIDGE, memory: int = BYTES, log: Path | None = None,
) -> None:  # fmt: skip
    """The processes of the layout, on a corpus of tokens (a .bin/.idx prefix); `plans`: the file of each, and where
    what is solved for it goes."""
    from nemo_minitron.data import Tokens

    fit = Fit(calibration, layout)
    fit.text(Tokens(data))
    say(fit.remark)
    order = CompensateOrder(model.path, plans, data, ridge, memory, fit.settings, layout)
    launch(order, host_of().worker, log)


def check_solvable(plan: PrunePlan, ridge: float = RIDGE, memory: int = BYTES) -> None:
    """Raises InputError where there is nothing to solve, or for settings out of range."""
    if not list(solvable(plan)):
        raise InputError("the plan cuts no neurons and no heads, so there is nothing to solve anew; cut without it")
    for name, value in (("ridge", ridge), ("memory", memory)):
        if not (value > 0 and math.isfinite(value)):
            raise InputError(f"{name} is {value}; it must be above 0 and finite")
