"""The stage between plan and prune of a job that compensates its cut."""

from __future__ import annotations

from typing import Any

from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.job.commands.compensate import solve_for
from nemo_minitron.job.commands.prune import Extras, compensation_of
from nemo_minitron.job.run import Run, Stage
from nemo_minitron.job.settings.calibration import calibration_of
from nemo_minitron.job.stages import corpora
from nemo_minitron.nemo.sources import open_source
from nemo_minitron.pruning.compensation import solvable

SOLVED = "compensation.safetensors"  # in the run folder


def compensate(run: Run) -> None:
    """The stage: leaves a Compensation in the run folder, an empty one where the plan cuts neither ffn nor heads."""
    job, plan, out = run.job, run.path("plan.json"), run.path(SOLVED)
    if not list(solvable(PrunePlan.load(plan))):
        Compensation(PrunePlan.load(plan).digest, {}).save(out)
        run.say("    the plan cuts neither ffn nor heads: there is nothing to solve")
        return
    calibration = calibration_of(job, open_source(job.teacher).architecture)
    rows = corpora.prefix(run, "calibration")
    solve_for(job.teacher, plan, rows, out, calibration, job.layout, ridge=job.cutting.ridge, log=run.path("log.txt"))
    run.say(f"    {len(Compensation.load(out).tensors)} matrices solved anew")


SOLVE = Stage("compensate", compensate, lambda run: run.job.cutting.ridge, ("plan",), (SOLVED,))


def compensation_of_run(run: Run, source: Any, plan: PrunePlan) -> Compensation | None:
    """All that the job's `cutting` asks for."""
    cutting = run.job.cutting
    scores = run.path("scores.safetensors") if cutting.head_residual else None
    solved = run.path(SOLVED) if cutting.compensate else None
    return compensation_of(source, plan, Extras(solved, cutting.fold_norms, cutting.head_residual or None, scores))
