"""The stage that distils: in one piece, or in parts between which the student is measured."""

from __future__ import annotations

import dataclasses

from nemo_minitron.artifacts.files import file_digest
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.logit_cache import CacheHeader
from nemo_minitron.artifacts.run_folder import RunFolder, TrainingFolder
from nemo_minitron.commands.distill import left_by_training, run_training, training_identity
from nemo_minitron.data import Tokens
from nemo_minitron.job.fitted import fitted_distillation
from nemo_minitron.job.lineage import learned_from, plan_of_learned
from nemo_minitron.job.run import Run, Stage
from nemo_minitron.job.stages import corpora
from nemo_minitron.job.stages.generate import trained_on
from nemo_minitron.job.stages.trajectory import train_along
from nemo_minitron.settings.evaluation import ALONG
from nemo_minitron.sources.open import open_source

LAST = f"{RunFolder.distilled}/{TrainingFolder.last}"


def distill_stage(after: tuple[str, ...]) -> Stage:
    """The stage; it comes after the text and the student."""
    return Stage("distill", distill, _inputs, after, (LAST,), _trained)


def _inputs(run: Run) -> object:
    cache = run.job.distillation.teacher_cache  # its content decides, not its place
    contents: JsonObject = {"teacher_cache": CacheHeader.load(cache).digest} if cache else {}
    if run.job.learns_from:
        contents["learned"] = [run.open(run.job.learns_from).identity, *map(file_digest, run.job.lineage)]
    if run.job.evaluation.every:  # the training ends in parts, and its checkpoints are gone afterwards
        contents["along"] = [getattr(run.job.evaluation, name) for name in ALONG]
    return dataclasses.asdict(run.job.distillation) | contents


def _trained(run: Run) -> list[str]:
    """Of a training's folder: the last checkpoint and the records, but not the index of the samples and the logs."""
    left = left_by_training(run.folder.distilled)
    return [f"{RunFolder.distilled}/{name}" for name in left] + [RunFolder.composed, RunFolder.trajectory]


def distill(run: Run) -> None:
    job, train = run.job, trained_on(run)
    student, learned = open_source(run.folder.pruned), run.open(learned_from(job))
    layout, why = job.layout.for_student(student.architecture, learned.architecture)
    if why:
        run.say(f"    {why}")
    held_out = corpora.prefix(run, "test") if job.distillation.validate_every else train
    fit = fitted_distillation(job, layout, Tokens(train), Tokens(held_out))
    if fit.remark:
        run.say(f"    remark: {fit.remark}")
    texts, cut = (train, held_out), plan_of_learned(job, run.folder)

    def train_to(step: int | None) -> None:
        run_training(
            student, learned, texts, run.folder.distilled, fit.settings, layout, run.folder.log, stop=step, plan=cut
        )

    if job.evaluation.every:
        identity = training_identity(student, learned, texts, fit.settings, cut)
        train_along(run, student, fit.settings, identity, train_to)
    else:
        train_to(None)
