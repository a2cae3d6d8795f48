"""A job in rounds: the model cut so far is scored again, then cut further, without retraining in between.

`rounds/R/` has the model that round R starts from, as a plan of the teacher (`plan.json`), and the scores of that model
(`scores.safetensors`). The first round's scores are the run's own. The model itself exists only while it is scored.
"""

from __future__ import annotations

import dataclasses
import functools
import shutil

from nemo_minitron.architecture import Architecture
from nemo_minitron.artifacts import PrunePlan, Scores, compose
from nemo_minitron.artifacts.blocks import BLOCK_INFLUENCE
from nemo_minitron.artifacts.json_types import HfConfig
from nemo_minitron.artifacts.run_folder import RoundFolder, RunFolder
from nemo_minitron.commands.estimate import calibrate, describe_scores
from nemo_minitron.families import to_hf
from nemo_minitron.job.calibrations import calibration_of
from nemo_minitron.job.fitted import fitted_calibration
from nemo_minitron.job.run import Run, Stage
from nemo_minitron.job.stages import corpora
from nemo_minitron.job.teacher import clear_torn, uncut_folder
from nemo_minitron.search.rounds import round_sizes
from nemo_minitron.search.sizes import student_architecture
from nemo_minitron.settings.recipe import Job
from nemo_minitron.sources.open import open_source


def round_stages(job: Job) -> list[Stage]:
    """The stages of the rounds after the first one, in order. The plan comes after the last of them."""
    return [
        Stage(
            round_name(number), functools.partial(score_again, number=number), _inputs,
            ("estimate" if number == 2 else round_name(number - 1),),
            tuple(f"{RunFolder.rounds}/{number}/{name}" for name in (RoundFolder.plan, RoundFolder.scores)),
        )
        for number in range(2, job.rounds + 1)
    ]  # fmt: skip


def round_name(number: int) -> str:
    return f"round {number}"


def _inputs(run: Run) -> object:
    return [dict(run.job.keep), run.job.depth, run.job.rounds]


def models_of(job: Job, source: Architecture) -> list[Architecture]:
    """The models that the rounds score, the teacher first, then the student. Raises InputError as `round_sizes`."""
    sizes = round_sizes(source, job.keep, job.rounds)
    return [source, *(student_architecture(source, keep) for keep in sizes)]


def job_of(job: Job, source: Architecture, number: int) -> tuple[Job, Architecture]:
    """(round `number`, counted from 1, as a job of its own, the model that it scores).

    Its layout is the nearest one in which this model runs. If the round drops no layers, it needs no criterion for
    them.
    """
    models = models_of(job, source)
    model, after = models[number - 1], models[number]
    drops = model.num_layers > after.num_layers or source.num_layers == models[-1].num_layers
    layout = job.layout if number == 1 else job.layout.for_student(model, model)[0]
    keep = round_sizes(source, job.keep, job.rounds)[number - 1]
    depth = job.depth if drops else BLOCK_INFLUENCE
    return dataclasses.replace(job, keep=keep, rounds=1, depth=depth, layout=layout), model


def check_rounds(job: Job, source: Architecture, config: HfConfig) -> None:
    """Raises InputError for a round whose model cannot be written or scored. `config`: the teacher's."""
    for number in range(2, job.rounds + 1):
        of_round, model = job_of(job, source, number)
        to_hf(model, config)
        of_round.layout.check(model)
        calibration_of(of_round, model)


def words_of_rounds(job: Job, source: Architecture) -> list[str]:
    """A line with the sizes of each round; no line for a single round."""
    if job.rounds == 1:
        return []
    lines = []
    for number, keep in enumerate(round_sizes(source, job.keep, job.rounds), 1):
        sizes = ", ".join(f"{name} {size}" for name, size in keep.items())
        model = student_architecture(source, keep)
        lines.append(f"round {number} of {job.rounds}: {sizes}, {model.parameters():,} parameters")
    return lines


def score_again(run: Run, number: int) -> None:
    """The stage of a round: the model that the earlier rounds leave is cut from the teacher at once, and scored."""
    from nemo_minitron.data import Tokens
    from nemo_minitron.pruning import prune

    files, teacher = run.folder.round(number), run.open(uncut_folder(run))
    plan = cut_of(run, number - 1)[0]
    plan.save(files.plan)
    run.say(f"    {plan.source.parameters():,} -> {plan.target.parameters():,} parameters, to be scored again")
    clear_torn(files.model)
    model = prune(teacher, plan, files.model, overwrite=True)
    job, _ = job_of(run.job, teacher.architecture, number)
    tokens, log = Tokens(corpora.prefix(run, "calibration")), run.folder.log
    calibration = fitted_calibration(job, plan.target, tokens).settings
    scores = calibrate(open_source(model), tokens, files.calibration, calibration, job.layout, log)
    scores.save(files.scores)
    shutil.rmtree(model)  # the plan makes it again, and the space check counts on its room
    for line in describe_scores(scores):
        run.say(f"    {line}")


def cut_of(run: Run, number: int) -> tuple[PrunePlan, PrunePlan, Scores]:
    """(the teacher's plan after round `number`, the plan of that round alone, the scores that it uses)."""
    from nemo_minitron.search import plan

    files = run.folder.round(number) if number > 1 else run.folder
    scores, before = Scores.load(files.scores), [PrunePlan.load(files.plan)] if number > 1 else []
    source = before[0].source if before else scores.architecture
    job, _ = job_of(run.job, source, number)
    this_round = plan(scores, dict(job.keep), depth=job.depth)
    return compose(*before, this_round), this_round, scores
