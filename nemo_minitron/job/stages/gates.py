"""The stage of the gates: a wrong cut is stopped before matrices are re-fitted or anything is trained.

On a few held-out rows, in transformers, with plain slices of the teacher:
1. the teacher with all units in the order of their scores gives the teacher's logits;
2. a student that keeps everything gives the teacher's logits;
3. the units of the plan lose less than the first units of each axis, and these less than the units of least score;
4. the student gives the logits of the teacher in which the removed units write zeros, on the axes where that is exact.

A search checks its first candidate, before any candidate is measured. No later stage depends on the result: gates may
be left out, or run again, and all else stays.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil
from collections.abc import Callable
from typing import TYPE_CHECKING

from nemo_minitron.artifacts import PrunePlan, Scores, records
from nemo_minitron.artifacts.blocks import BLOCK_INFLUENCE, REMOVAL
from nemo_minitron.artifacts.files import read_json, write_json
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.errors import InputError
from nemo_minitron.families import family_of, to_hf
from nemo_minitron.job.gates import Gate, better, check_open, guesses, left_out, same
from nemo_minitron.job.run import Run, Stage
from nemo_minitron.job.stages import corpora
from nemo_minitron.job.stages.search import as_large_as
from nemo_minitron.job.teacher import clear_torn, uncut_folder
from nemo_minitron.pruning.convert import identity
from nemo_minitron.settings.derive import Fit
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.recipe import Job
from nemo_minitron.sources.tensors import ModelSource

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_minitron.evaluation import Answers

Ask = Callable[[ModelSource, PrunePlan], "Answers"]  # (a model, a plan) -> what the plan's student answers

ORDERED = "teacher in ranked order"
WHOLE = "student that keeps everything"
RANKED, FIRST = "ranked before first units", "first before least units"
SLICED = "slices are masks"


def gate_stage(job: Job) -> Stage:
    """The stage; it comes after the plan, or after the candidates of a search."""
    planned, guarded = ("candidates", "measure") if job.search.wanted else ("plan", "prune")
    return Stage("gates", check_cut, _inputs, ("data", planned), (RunFolder.gates,), guards=("compensate", guarded))


def _inputs(run: Run) -> object:
    return dataclasses.asdict(run.job.gates)


def check_cut(run: Run) -> None:
    """Raises GateError if a gate is shut; the run folder has the figures of all gates then, too."""
    from nemo_minitron.evaluation import answers

    settings, teacher, plan = run.job.gates, run.open(uncut_folder(run)), _plan(run)
    windows = _rows(run)
    read = functools.partial(answers, windows=windows, precision=settings.precision, batch_size=settings.batch_size)

    def ask(source: ModelSource, of: PrunePlan) -> Answers:
        from nemo_minitron.pruning import prune

        clear_torn(run.folder.gate)
        try:
            return read(prune(source, of, run.folder.gate, overwrite=True))
        finally:
            shutil.rmtree(run.folder.gate, ignore_errors=True)

    reference = read(teacher.folder)
    student = ask(teacher, plan)
    gates = [
        *_same_teacher(run, teacher, reference, ask),
        *_in_order(run, teacher, plan, reference, student, ask),
        _slices(run, teacher, plan, student, ask),
    ]
    rows = {"rows": len(windows), "sequence_length": windows.shape[1], "precision": settings.precision}
    write_json(run.folder.gates, {"plan": plan.digest, **rows, "gates": [gate.as_dict() for gate in gates]})
    for gate in gates:
        run.say(f"    {gate.describe()}")
    check_open(gates, run.folder.gates)


def _plan(run: Run) -> PrunePlan:
    if not run.job.search.wanted:
        return PrunePlan.load(run.folder.plan)
    first = read_json(run.folder.candidates, "the candidates", records.CANDIDATES)[0]
    return PrunePlan.load(run.folder.candidate(first["name"]).plan)


def _rows(run: Run) -> Tensor:
    """int64 [rows, sequence_length]: the first held-out rows, as many and as long as the text has."""
    from nemo_minitron.data import Tokens

    tokens = Tokens(corpora.prefix(run, "test"))
    fit = Fit(run.job.gates, Layout())
    fit.text(tokens)
    if fit.remark:
        run.say(f"    remark: {fit.remark}")
    length = fit.settings.sequence_length
    return tokens.windows(length, max(1, min(fit.settings.rows, tokens.samples(length))))


# -- the gates -----------------------------------------------------------------------------------------
def _same_teacher(run: Run, teacher: ModelSource, reference: Answers, ask: Ask) -> list[Gate]:
    from nemo_minitron.pruning.rearranged import Reordered
    from nemo_minitron.search import ranked_order

    whole, precision = identity(teacher.architecture), run.job.gates.precision
    ordered = Reordered(teacher, ranked_order(Scores.load(run.folder.scores)))
    return [
        same(ORDERED, reference, ask(ordered, whole), precision),
        same(WHOLE, reference, ask(teacher, whole), precision),
    ]


def _in_order(
    run: Run, teacher: ModelSource, plan: PrunePlan, reference: Answers, student: Answers, ask: Ask
) -> list[Gate]:
    """The same sizes with the first units, and with the units of least score."""
    if why := guesses(reference.windows, teacher.architecture.vocab_size):
        return [left_out(name, why) for name in (RANKED, FIRST)]
    try:
        first, least = _baselines(run, plan)
        for other in (first, least):
            to_hf(other.target, teacher.config, other.keep.get("layers"))
    except InputError as error:  # such as a config that cannot say which of other layers have windows
        return [left_out(name, str(error)) for name in (RANKED, FIRST)]
    if plan.keep in (first.keep, least.keep):
        return [left_out(name, "the sizes leave no choice of units") for name in (RANKED, FIRST)]
    of_first, of_least = ask(teacher, first), ask(teacher, least)
    ranked, first_units, least_units = (found.windows for found in (student, of_first, of_least))
    return [
        better(RANKED, ranked, first_units, reference.windows),
        better(FIRST, first_units, least_units, reference.windows),
    ]


def _baselines(run: Run, plan: PrunePlan) -> tuple[PrunePlan, PrunePlan]:
    from nemo_minitron.search import first_plan
    from nemo_minitron.search import plan as chosen

    scores, keep, depth = Scores.load(run.folder.scores), dict(as_large_as(plan, run.job.keep)), run.job.depth
    scanned = run.job.rounds > 1 and depth != BLOCK_INFLUENCE  # blocks of a round's size alone
    if "layers" in plan.keep and (scanned or depth == REMOVAL):  # removal knows no layers that matter most
        keep["layers"] = plan.kept_layers
    first, least = first_plan(plan.source, keep), chosen(scores, keep, least=True, depth=depth)
    if run.job.cutting.rotate and "hidden" in plan.keep:  # rotated channels come in the order of their energy
        first, least = (dataclasses.replace(p, keep=p.keep | {"hidden": plan.keep["hidden"]}) for p in (first, least))
    return first, least


def _slices(run: Run, teacher: ModelSource, plan: PrunePlan, student: Answers, ask: Ask) -> Gate:
    from nemo_minitron.pruning.rearranged import Masked
    from nemo_minitron.search import on_axes

    exact = on_axes(plan, family_of(teacher.config).exact_axes - {"vocab"})
    if exact is None:
        return left_out(SLICED, f"a cut of {' and '.join(plan.keep)} is not exact for masks, whatever is cut")
    cut = student if exact.keep == plan.keep else ask(teacher, exact)
    masked = ask(Masked(teacher, exact), identity(teacher.architecture))
    return same(SLICED, masked, cut, run.job.gates.precision)
