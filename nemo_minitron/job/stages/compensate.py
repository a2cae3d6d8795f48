"""The stage that solves anew what follows a cut of neurons or heads: of a job's plan, or of a search's candidates."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.artifacts.files import file_digest
from nemo_minitron.artifacts.run_folder import CutFolder, RunFolder
from nemo_minitron.commands.compensate import solve_for
from nemo_minitron.commands.prune import Extras, compensation_of
from nemo_minitron.job.calibrations import calibration_of
from nemo_minitron.job.run import Run, Stage
from nemo_minitron.job.stages import corpora
from nemo_minitron.pruning.compensation import follows_a_cut, solvable
from nemo_minitron.settings.recipe import Job
from nemo_minitron.sources.tensors import ModelSource

LEAVE_MATRICES = {"ffn", "expert_ffn", "heads", "query_groups"}  # cuts of these axes leave something to solve


def solves(job: Job) -> bool:
    """Whether the job has this stage; a search may find that its candidates cut none of these."""
    return job.cutting.compensate and (job.search.wanted or not LEAVE_MATRICES.isdisjoint(job.keep))


def solved_bytes(student: Architecture) -> int:
    """Of its Compensation, at most."""
    solved = [shape for name, shape in student.shapes().items() if follows_a_cut(name)]
    return 4 * sum(map(math.prod, solved))


def compensate(run: Run) -> None:
    """After the plan: leaves its Compensation beside it."""
    solve_cuts(run, [run.folder])


SOLVE = Stage("compensate", compensate, lambda run: run.job.cutting.ridge, ("plan",), (RunFolder.compensation,))


def solve_cuts(run: Run, cuts: Sequence[CutFolder]) -> None:
    """One pass for all; beside a plan that cuts no neurons or heads lies an empty Compensation."""
    job, wanted = run.job, {}
    for cut in cuts:
        plan = PrunePlan.load(cut.plan)
        if list(solvable(plan)):
            wanted[cut.plan] = cut.compensation
        else:
            Compensation(plan.digest, {}).save(cut.compensation)
    if wanted:
        teacher = run.open(job.teacher)
        calibration = calibration_of(job, teacher.architecture)
        solve_for(
            teacher, wanted, corpora.prefix(run, "calibration"), calibration, job.layout,
            ridge=job.cutting.ridge, memory=int(job.cutting.memory * 1e9), log=run.folder.log,
        )  # fmt: skip
    solved = sum(len(Compensation.load(out).tensors) for out in wanted.values())
    run.say(f"    {solved} matrices solved anew")


def cut_identity(job: Job, cut: CutFolder) -> list[object]:
    """What decides the weights of a model as cut, as plain values."""
    solved = solved_of(job, cut)
    return [PrunePlan.load(cut.plan).as_dict(), job.cutting.fold_norms, file_digest(solved) if solved else None]


def solved_of(job: Job, cut: CutFolder) -> Path | None:
    """The file of what was solved for a plan, None where nothing is. Raises InputError where it is gone, or damaged."""
    if not (job.cutting.compensate and list(solvable(PrunePlan.load(cut.plan)))):
        return None
    Compensation.load(cut.compensation)
    return cut.compensation


def compensation_of_run(run: Run, source: ModelSource, cut: CutFolder) -> Compensation | None:
    """All that the job's `cutting` asks for; norms are folded where the plan of a search's candidate cuts hidden."""
    cutting, made = run.job.cutting, PrunePlan.load(cut.plan)
    scores = run.folder.scores if cutting.head_residual else None
    folded = cutting.fold_norms and made.source.hidden_size != made.target.hidden_size
    extras = Extras(solved_of(run.job, cut), folded, cutting.head_residual or None, scores)
    return compensation_of(source, made, extras)
