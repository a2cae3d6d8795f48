"""A model, a plan and a corpus -> the re-fitted matrices that lose inputs to a cut of neurons or heads."""

from __future__ import annotations

import glob
import math
import shutil
from collections.abc import Mapping
from pathlib import Path

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.commands.corpus import begin, say, tokenise
from nemo_minitron.commands.passes import fit_pass
from nemo_minitron.commands.place import check_file, working
from nemo_minitron.errors import InputError
from nemo_minitron.hosts import check_model, host_of
from nemo_minitron.launch.torchrun import launch
from nemo_minitron.pruning.compensation import solvable
from nemo_minitron.pruning.cut import check_plan
from nemo_minitron.pruning.defaults import AUTO, RIDGE
from nemo_minitron.pruning.gaps import gaps
from nemo_minitron.pruning.reconstruction import check_reconstruction, cut_blocks
from nemo_minitron.settings.calibration import Calibration
from nemo_minitron.settings.cutting import MEMORY
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.orders import CompensateOrder
from nemo_minitron.settings.reconstruction import SOLVED, START, rows_of_step
from nemo_minitron.sources.tensors import ModelSource

BYTES = int(MEMORY * 1e9)


def run_compensate(
    model: str, plan: Path, data: str, out: Path, calibration: Calibration, layout: Layout, *,
    ridge: float | str = RIDGE, memory: int = BYTES, reconstruct: int = 0, reconstruct_batch: int = 1,
    fill_gaps: bool = False, skip_bad_lines: bool = False, overwrite: bool = False,
) -> Compensation:  # fmt: skip
    """`minitron compensate`: leaves the file `out`, for `minitron prune --compensation`. `calibration` says which rows
    are read. `memory`: bytes of Gram matrices on a rank. A file `out` that exists is replaced only under `overwrite`.

    Raises InputError for what cannot run, before a model is loaded.
    """
    from nemo_minitron.sources.open import open_source

    check_file(out, overwrite)
    source = open_source(model)
    loaded = PrunePlan.load(plan)
    check_model(source.config, "compensate")
    check_plan(loaded, source)
    check_solvable(loaded, ridge, memory, reconstruct, fill_gaps)
    fit = fit_pass(source, calibration, layout, calibration.batch_size)
    check_reconstruct(loaded, reconstruct, fit.settings.samples, reconstruct_batch, layout)
    begin(f"re-fitting matrices of {model} on {data}")
    with working(out) as work:
        tokens = tokenise(data, source.folder, work / "calibration", source.architecture.vocab_size, skip_bad_lines)
        fit.text(tokens)
        say(fit.remark)
        batch = check_reconstruct(loaded, reconstruct, fit.settings.samples, reconstruct_batch, layout)
        solve_for(
            source, {plan: out}, tokens.prefix, fit.settings, layout, ridge=ridge, memory=memory,
            reconstruct=reconstruct, reconstruct_batch=batch, fill_gaps=fill_gaps,
        )  # fmt: skip
    return Compensation.load(out)


def solve_for(
    model: ModelSource, plans: Mapping[Path, Path], data: Path, calibration: Calibration, layout: Layout, *,
    ridge: float | str = RIDGE, memory: int = BYTES, reconstruct: int = 0, reconstruct_batch: int = 1,
    fill_gaps: bool = False, log: Path | None = None,
) -> None:  # fmt: skip
    """Re-fits matrices for several plans, in the processes of the layout. `plans`: the file of each plan -> the file of
    its Compensation. `data`: a .bin/.idx prefix; the sizes of `calibration` fit it. `reconstruct`: passes in which
    cut sub-blocks are fitted as a whole, by steps of `reconstruct_batch` rows. `fill_gaps`: the matrices in front of
    dropped layers learn to write what these wrote.

    Raises InputError if the stage refuses, and RuntimeError if a process fails.
    """
    order = CompensateOrder(
        model.path, plans, data, ridge, memory, calibration, layout, reconstruct, reconstruct_batch, fill_gaps
    )  # fmt: skip
    try:
        launch(order, host_of().worker, log)
    except InputError:  # a refusal leaves nothing half-written
        for out in plans.values():
            for parts in out.parent.glob(f"{glob.escape(out.name)}*.parts"):
                shutil.rmtree(parts, ignore_errors=True)
            for begun in (out.with_name(f"{out.name}{end}") for end in (SOLVED, START)):
                begun.unlink(missing_ok=True)
        raise


def check_reconstruct(plan: PrunePlan, passes: int, samples: int, batch: int, layout: Layout) -> int:
    """The rows of a step. Raises InputError if `passes` are asked for and the plan has no sub-block to fit, or if the
    rows do not serve."""
    if not passes:
        return batch
    check_reconstruction(plan.source, plan.target)
    return rows_of_step(samples, batch, layout.dp)


def leaves_fits(plan: PrunePlan, passes: int, fill_gaps: bool) -> bool:
    """Whether a plan leaves a matrix to re-fit, a sub-block to fit as a whole in `passes`, or a gap to fill."""
    blocks = passes and cut_blocks(plan.source, plan.target)
    return bool(list(solvable(plan)) or blocks or (fill_gaps and gaps(plan)))


def check_solvable(
    plan: PrunePlan, ridge: float | str = RIDGE, memory: int = BYTES, passes: int = 0, fill_gaps: bool = False
) -> None:
    """Raises InputError if a plan leaves nothing to fit, and for settings out of range."""
    if fill_gaps and not gaps(plan):
        raise InputError("the plan drops no layers, so there is no gap to fill; leave --fill-gaps out")
    if not leaves_fits(plan, passes, fill_gaps):
        raise InputError(
            "the plan cuts no neurons and no heads, so there is nothing to re-fit; cut without a compensation, or give "
            "--fill-gaps where it drops layers"
        )
    for name, value in (("ridge", ridge), ("memory", memory)):
        if value != AUTO and not (float(value) > 0 and math.isfinite(float(value))):
            raise InputError(f"{name} is {value}; it must be above 0 and finite")
