"""The stages of a job that searches: candidates are cut and measured, and the best are distilled briefly and ranked.

Each candidate has a folder `search/NAME`: its plan, its re-fitted matrices, its numbers, its losses, and its student
while it may still win. Existing files are kept, so that a killed search resumes.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts import PrunePlan, Scores, records
from nemo_minitron.artifacts.files import digest_of, read_json, write_json
from nemo_minitron.artifacts.json_types import HfConfig, JsonObject
from nemo_minitron.artifacts.parse import anything, listed
from nemo_minitron.artifacts.records import read_curve
from nemo_minitron.artifacts.run_folder import CandidateFolder, RunFolder, TrainingFolder
from nemo_minitron.axes import AXES
from nemo_minitron.commands.corpus import corpus_identity
from nemo_minitron.commands.distill import run_training
from nemo_minitron.errors import DivergedError
from nemo_minitron.families import multiples_of, to_hf
from nemo_minitron.hybrid import COUNTS
from nemo_minitron.job.fitted import fitted_distillation
from nemo_minitron.job.lineage import learned_from, plan_of_learned
from nemo_minitron.job.run import Run, Stage
from nemo_minitron.job.stages import corpora
from nemo_minitron.job.stages.candidate import evaluation_of, identity_of, known_of, loss_of, student_of
from nemo_minitron.job.stages.compensate import solve_cuts, solves
from nemo_minitron.job.stages.marginals import MARGINALS, marginals_of
from nemo_minitron.search.sizes import Keep, layers_by_kind
from nemo_minitron.settings.recipe import Distillation, Job
from nemo_minitron.settings.search import LOSSES, Search
from nemo_minitron.sources.open import config_of, open_source

if TYPE_CHECKING:
    from nemo_minitron.search.rank import Curve


def search_stages(job: Job) -> tuple[list[Stage], list[Stage]]:
    """The stages between `estimate` and `plan`, in order: those that choose candidates, and those that try them."""
    names, each = RunFolder, CandidateFolder
    guessed = [MARGINALS] if job.search.proxy == LOSSES else []
    known = guessed[0].name if guessed else "estimate"
    choosing = [
        *guessed,
        Stage("candidates", candidates, _candidates_inputs, (known,), (names.candidates,), _each(each.plan)),
    ]
    solve = Stage(
        "compensate", solve_all, lambda run: run.job.cutting.fitting(), ("candidates",), also=_each(each.compensation)
    )
    solving = [solve] if solves(job) else []
    before = solving[0].name if solving else "candidates"
    return choosing, [
        *solving,
        Stage("measure", measure_all, _measure_inputs, ("data", before), (names.measured,), _each(each.numbers)),
        Stage("rank", rank_all, _rank_inputs, ("data", "measure"), (names.ranks,), _each(each.curve)),
    ]


def _each(name: str) -> Callable[[Run], list[str]]:
    """What a stage leaves: a file of that name for each candidate, or for those that it chose."""
    return lambda run: [
        f"{RunFolder.search}/{row['name']}/{name}" for row in read_json(run.folder.candidates, "the candidates")
    ]  # fmt: skip


def _candidates_inputs(run: Run) -> object:
    later = {"distil", "steps", "rounds", "tokens"}  # only later stages read these
    budget = {name: value for name, value in dataclasses.asdict(run.job.search).items() if name not in later}
    return [budget, dict(run.job.keep), run.job.depth]


def _measure_inputs(run: Run) -> object:
    return [evaluation_of(run).deciding(), run.job.search.distil, run.job.cutting.deciding()]


def _rank_inputs(run: Run) -> object:
    return [
        dataclasses.asdict(_brief(run.job.distillation, run.job.search)),
        run.job.search.rounds,
        run.job.search.distil,
    ]


def _brief(settings: Distillation, search: Search) -> Distillation:
    """A job's distillation, but brief: `search.steps` long and saved at the end of each round. The teacher is not
    corrected, and nothing ends it early."""
    return dataclasses.replace(
        settings, tokens=search.steps * settings.tokens_per_step, save_every=search.steps // search.rounds,
        correction_tokens=0, validate_every=0, patience=0,
    )  # fmt: skip


# -- the stages ----------------------------------------------------------------------------------------
def candidates(run: Run) -> None:
    """The stage: the shapes that the proxy ranks highest, and a plan for each."""
    from nemo_minitron.search import plan
    from nemo_minitron.search.candidates import cut_of
    from nemo_minitron.search.table import rows_of

    job, scores = run.job, Scores.load(run.folder.scores)
    config = config_of(job.teacher)
    if remark := job.search.remark(scores.architecture):
        run.say(f"    remark: {remark}")
    result = job.search.run(
        scores.architecture, job.keep, scores, measure=lambda shape: _latency(run, to_hf(shape.architecture, config)),
        loads=multiples_of(config), depth=job.depth, proxy=marginals_of(run) if job.search.proxy == LOSSES else None,
        check=lambda shape: job.layout.check_student(shape, scores.architecture),
    )  # fmt: skip
    run.say(
        f"    {result.combinations:,} shapes, {result.fitting:,} within the budget, {len(result.candidates)} chosen"
    )
    for candidate in result.candidates:
        to_hf(candidate.architecture, config)
        keep = {**cut_of(candidate, scores.architecture), **job.keep}
        plan(scores, keep, depth=job.depth).save(run.folder.candidate(candidate.name).plan)
    rows = rows_of(result, **job.search.serving)
    write_json(run.folder.candidates, [row for row in rows if row["rank"] is not None])


def solve_all(run: Run) -> None:
    """The stage: the re-fitted matrices of every candidate, all from one pass."""
    rows = read_json(run.folder.candidates, "the candidates", records.CANDIDATES)
    solve_cuts(run, [run.folder.candidate(row["name"]) for row in rows])


def _latency(run: Run, config: HfConfig) -> float:
    """Seconds of a forward pass of a model of this config, measured on this machine."""
    from nemo_minitron.evaluation import forward_seconds

    search = run.job.search
    took = forward_seconds(config, batch=search.batch, context=search.context, precision=run.job.evaluation.precision)
    run.say(f"    {took * 1e3:8.1f} ms")
    return took


def measure_all(run: Run) -> None:
    """The stage: cuts and measures each candidate, and keeps the students that are among the best so far."""
    rows: list[JsonObject] = []
    for row in read_json(run.folder.candidates, "the candidates", records.CANDIDATES):
        rows.append(row | {"loss": loss_of(run, row["name"])})
        run.say(f"    {row['name']:40} {row['parameters']:>13,} parameters  loss {rows[-1]['loss']:.4f}")
        for other in _ordered(rows)[run.job.search.distil :]:
            shutil.rmtree(run.folder.candidate(other["name"]).student, ignore_errors=True)
    write_json(run.folder.measured, _ordered(rows))


def _ordered(rows: list[JsonObject]) -> list[JsonObject]:
    return sorted(rows, key=lambda row: row["loss"])


def rank_all(run: Run) -> None:
    """The stage: distils the best candidates briefly, ranks them after each round, and names the winner."""
    from nemo_minitron.search import rank

    search = run.job.search
    measured = read_json(run.folder.measured, "the measured candidates", records.MEASURED)
    chosen = [row["name"] for row in measured[: search.distil]]
    ranking = rank(
        chosen, lambda name, steps: _curve(run, name, steps), steps=search.steps, rounds=search.rounds,
        stop=lambda name: _clear(run, name),
    )  # fmt: skip
    for name in chosen:
        _clear(run, name)
    for name, step in ranking.stopped.items():
        run.say(f"    {name}: stopped after step {step}")
    run.say(f"    {ranking.winner} wins; ranks settled at step {ranking.settled} of {search.steps}")
    write_json(run.folder.ranks, [dataclasses.asdict(row) for row in ranking.standings])


def _curve(run: Run, name: str, steps: int) -> Curve:
    """(step, loss) of a candidate's brief distillation, as far as `steps`. The training resumes where it ended."""
    from nemo_minitron.data import Tokens

    files, train = run.folder.candidate(name), corpora.prefix(run, "train")
    brief = _brief(fitted_distillation(run.job, run.job.layout, Tokens(train)).settings, run.job.search)
    identity = digest_of([identity_of(run, name), dataclasses.asdict(brief), _texts(run, train)])
    known = known_of(files.curve, identity, losses=listed(anything()))
    if known is None or (len(known["losses"]) < steps and not known.get("diverged")):
        run.say(f"    {name}: to step {steps}")
        student, learned = open_source(student_of(run, name)), run.open(learned_from(run.job))
        layout, _ = run.job.layout.for_student(student.architecture, learned.architecture)
        known, diverged = {"identity": identity}, False
        try:
            run_training(
                student, learned, (train, train), files.training, brief, layout,
                run.folder.log, stop=steps, plan=plan_of_learned(run.job, files),
            )  # fmt: skip
        except DivergedError as error:  # this candidate has lost, and the others continue
            run.say(f"    {name}: {error}")
            diverged = True
        known |= {"losses": _losses(TrainingFolder(files.training).losses), "diverged": diverged}
        write_json(files.curve, known)
    # Infinity ranks a diverged candidate last from here on.
    losses = [*known["losses"], *[math.inf] * (steps - len(known["losses"]))]
    return list(enumerate(losses[:steps], 1))


def _texts(run: Run, train: Path) -> object:
    """Identity of the text, and of the model that the candidates learn from if it is not the teacher."""
    text = corpus_identity(train)
    return [text, run.open(run.job.learns_from).identity] if run.job.learns_from else text


def _losses(path: Path) -> list[float]:
    return [row["loss"] for row in read_curve(path, ("loss",))]


def _clear(run: Run, name: str) -> None:
    """Removes the checkpoints and the student of a candidate that is finished. Plan, numbers and losses stay."""
    files = run.folder.candidate(name)
    for part in (files.training, files.student):
        shutil.rmtree(part, ignore_errors=True)


def winner(run: Run) -> CandidateFolder:
    """The folder of the candidate that is first at the last step. Raises InputError for damaged ranks."""
    last = max(read_json(run.folder.ranks, "the ranks", records.RANKS), key=lambda row: (row["step"], -row["rank"]))
    return run.folder.candidate(last["candidate"])


def as_large_as(plan: PrunePlan, keep: Keep) -> Keep:
    """The sizes of a plan's student, for another choice of units; `keep` is the job's, and may list layers."""
    sizes = {**sizes_of(plan), **keep}
    return {name: size for name, size in sizes.items() if not ("layers" in keep and name in COUNTS)}


def sizes_of(plan: PrunePlan) -> Mapping[str, int]:
    """Axis -> the size that a plan keeps, for the axes that it cuts; of a hybrid's layers the number of each kind."""
    axes = [name for name in plan.keep if name != "heads" or _cuts_heads(plan)]
    sizes = {name: AXES[name].length(plan.target) for name in axes}
    kinds = layers_by_kind(plan.target) if "layers" in axes else {}
    return {n: size for n, size in sizes.items() if n != "layers" or not kinds} | {n: len(k) for n, k in kinds.items()}


def _cuts_heads(plan: PrunePlan) -> bool:
    """Whether a plan cuts more heads than those of the query groups that it cuts."""
    return plan.target.heads_per_group != plan.source.heads_per_group
