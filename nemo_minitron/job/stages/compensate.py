"""The stage that re-fits the matrices that lose inputs to the cut, of a job's plan or of a search's candidates."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_minitron import hybrid
from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import Compensation, PrunePlan
from nemo_minitron.artifacts.files import file_digest
from nemo_minitron.artifacts.run_folder import CutFolder, RunFolder
from nemo_minitron.commands.compensate import leaves_fits, solve_for
from nemo_minitron.commands.prune import Extras, compensation_of
from nemo_minitron.job.fitted import fitted_calibration
from nemo_minitron.job.run import Run, Stage
from nemo_minitron.job.stages import corpora
from nemo_minitron.job.teacher import clear_torn, scored_model
from nemo_minitron.pruning.compensation import follows_a_cut
from nemo_minitron.pruning.reconstruction import SUB_BLOCKS
from nemo_minitron.settings.recipe import Job
from nemo_minitron.sources.tensors import ModelSource

LEAVE_MATRICES = {"ffn", "expert_ffn", "heads", "query_groups"}  # a cut of these axes leaves matrices to re-fit
LAYERS = {"layers", *hybrid.COUNTS}
LEAVE_BLOCKS = {name for block in SUB_BLOCKS for name in block.axes}  # of these, sub-blocks to reconstruct


def solves(job: Job) -> bool:
    """Whether the job has this stage. The candidates of a search may still cut none of these axes."""
    axes = LEAVE_MATRICES | (LEAVE_BLOCKS if job.cutting.reconstruct else set())
    axes |= LAYERS if job.cutting.fill_gaps else set()
    return job.cutting.compensate and (job.search.wanted or not axes.isdisjoint(job.keep))


def solved_bytes(student: Architecture) -> int:
    """Bytes of a student's Compensation, in fp32, at most."""
    shapes = [shape for name, shape in student.shapes().items() if follows_a_cut(name)]
    return 4 * sum(map(math.prod, shapes))


def compensate(run: Run) -> None:
    """The stage after the plan: it leaves the plan's Compensation beside it."""
    solve_cuts(run, [run.folder])


SOLVE = Stage("compensate", compensate, lambda run: run.job.cutting.fitting(), ("plan",), (RunFolder.compensation,))


def solve_cuts(run: Run, cuts: Sequence[CutFolder]) -> None:
    """Leaves a Compensation beside each plan, all from one pass. It is empty if a plan leaves nothing to fit."""
    from nemo_minitron.data import Tokens

    job, outputs = run.job, {}  # the file of each plan -> the file of its Compensation
    for cut in cuts:
        plan = PrunePlan.load(cut.plan)
        if leaves_fits(plan, job.cutting.reconstruct, job.cutting.fill_gaps):
            outputs[cut.plan] = cut.compensation
        else:
            Compensation(plan.digest, {}).save(cut.compensation)
    if outputs:
        teacher = scored_model(run)
        tokens = Tokens(corpora.prefix(run, "calibration"))
        calibration = fitted_calibration(job, teacher.architecture, tokens).settings
        solve_for(
            teacher, outputs, tokens.prefix, calibration, job.layout,
            ridge=job.cutting.ridge, memory=int(job.cutting.memory * 1e9), reconstruct=job.cutting.reconstruct,
            reconstruct_batch=job.cutting.rows_of_step(calibration.samples, job.layout.dp),
            fill_gaps=job.cutting.fill_gaps, log=run.folder.log,
        )  # fmt: skip
    count = sum(len(Compensation.load(out).tensors) for out in outputs.values())
    run.say(f"    {count} matrices re-fitted")


def cut_identity(job: Job, cut: CutFolder) -> list[object]:
    """Plain values that decide the weights of the cut model."""
    file, plan = solved_of(job, cut), PrunePlan.load(cut.plan)
    folded = job.cutting.folds(plan.source, plan.target)
    merged = ["merged experts"] if job.cutting.merges(plan.source, plan.target) else []
    return [plan.as_dict(), folded, file_digest(file) if file else None, _scales(job, plan), *merged]


def _scales(job: Job, plan: PrunePlan) -> bool:
    """Whether this cut is scaled behind dropped layers. The plan comes from the scores, so it stands for them."""
    return job.cutting.scales(plan.source, plan.target, job.calibration.scores_stream)


def unscaled(job: Job, plan: PrunePlan) -> str:
    """Why a cut of layers is not scaled, although the job asks for it; "" if it is, or if there is nothing to scale."""
    if _scales(job, plan) or not job.cutting.scales(plan.source, plan.target, True):
        return ""
    return "nothing is scaled behind dropped layers: this calibration does not score the stream's length"


def solved_of(job: Job, cut: CutFolder) -> Path | None:
    """The file of a plan's Compensation; None if the plan needs none. Raises InputError if it is missing or damaged."""
    cutting = job.cutting
    if not (cutting.compensate and leaves_fits(PrunePlan.load(cut.plan), cutting.reconstruct, cutting.fill_gaps)):
        return None
    Compensation.load(cut.compensation)
    return cut.compensation


@contextlib.contextmanager
def sliced(run: Run, source: ModelSource, cut: CutFolder) -> Iterator[Path | None]:
    """The teacher's plain slices; None if the pruned student has nothing else, or if the job does not measure them. The
    folder goes afterwards, so that it takes no more of the disk than the training, which comes later."""
    if not (run.job.evaluation.slices_baseline and _extras(run, PrunePlan.load(cut.plan), cut) != Extras()):
        yield None
        return
    from nemo_minitron.pruning import prune

    clear_torn(run.folder.sliced)
    try:
        yield prune(source, PrunePlan.load(cut.plan), run.folder.sliced, overwrite=True)
    finally:
        shutil.rmtree(run.folder.sliced, ignore_errors=True)


def compensation_of_run(run: Run, source: ModelSource, cut: CutFolder) -> Compensation | None:
    """Everything that the job's `cutting` asks for, together; None if it asks for nothing. Raises InputError for
    damaged files."""
    plan = PrunePlan.load(cut.plan)
    return compensation_of(source, plan, _extras(run, plan, cut))


def _extras(run: Run, plan: PrunePlan, cut: CutFolder) -> Extras:
    """What this student gets beyond slices. Norms are folded only if the plan cuts hidden channels, writers scaled only
    if it drops layers, and experts merged only if it drops some, which not every candidate of a search does."""
    cutting = run.job.cutting
    folded, scaled = cutting.folds(plan.source, plan.target), _scales(run.job, plan)
    merged = cutting.merges(plan.source, plan.target)
    scores = run.folder.scores if cutting.head_residual or scaled or merged else None
    return Extras(solved_of(run.job, cut), folded, cutting.head_residual or None, scores, scaled, merged)
