"""A distillation in parts: between two of them the student is exported and measured, always on the same held-out rows.

Each part ends at a checkpoint, from which the next one resumes with the bits of a training in one piece, in every
layout and on either host. `trajectory.json` grows by one mark after each part, so that a killed job measures none
twice.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts.files import digest_of, read_json, write_json
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.records import TRAJECTORY
from nemo_minitron.commands.corpus import corpus_identity
from nemo_minitron.commands.distill import export_student, trained_steps
from nemo_minitron.commands.evaluate import measured
from nemo_minitron.errors import InputError
from nemo_minitron.job.run import Run
from nemo_minitron.job.stages import corpora
from nemo_minitron.job.teacher import teacher_folder
from nemo_minitron.settings.distillation import Distillation
from nemo_minitron.settings.evaluation import ALONG, Evaluation
from nemo_minitron.sources.tensors import ModelSource

if TYPE_CHECKING:
    from nemo_minitron.data import Tokens

Train = Callable[[int], None]  # trains as far as a step


def marks(settings: Distillation, evaluation: Evaluation) -> list[int]:
    """The steps after which the student is measured: from the start, every so many tokens, and at the end."""
    apart = max(1, evaluation.every // settings.tokens_per_step)
    first = [0] if settings.start == "pruned" else []
    return [*first, *range(apart, settings.steps, apart), settings.steps]


def check_marks(settings: Distillation, evaluation: Evaluation) -> None:
    """Raises InputError for marks that lie closer than two steps of the training."""
    if 0 < evaluation.every < settings.tokens_per_step:
        raise InputError(
            f"evaluation.every is {evaluation.every:,} tokens, but a step of the distillation has "
            f"{settings.tokens_per_step:,}; the nearest legal value is {settings.tokens_per_step}"
        )


def describe_marks(settings: Distillation, evaluation: Evaluation) -> str:
    """Where the student is measured, in one line."""
    steps = marks(settings, evaluation)
    tokens = [f"{step * settings.tokens_per_step:,}" for step in steps]
    listed = ", ".join(tokens if len(tokens) < 6 else [*tokens[:3], "...", tokens[-1]])
    return f"trajectory: measured {len(steps)} times, after {listed} tokens, on {1 + len(evaluation.texts)} texts"


def train_along(run: Run, student: ModelSource, settings: Distillation, training: str, train: Train) -> None:
    """Trains to the end, and measures at each mark that has not been measured yet. `training`: the identity of the
    training; marks of another one are forgotten."""
    texts = _texts(run)
    known = _known(
        run, digest_of([training, _settings(run), [corpus_identity(text.prefix) for text in texts.values()]])
    )
    if not known["teacher"]:
        known["teacher"] = [_losses(run, teacher_folder(run), name, text) for name, text in texts.items()]
    for step in marks(settings, run.job.evaluation):
        if step in {row["step"] for row in known["rows"]}:
            continue
        if step:
            train(step)
        reached = trained_steps(run.folder.distilled) if step else 0
        if reached > step:
            run.say(
                f"    step {step} was passed before it was measured; for the whole trajectory remove "
                f"{run.folder.distilled} and run the same command again, which trains anew"
            )
            continue
        with_step = {"step": reached, "tokens": reached * settings.tokens_per_step}
        _measure(run, student, texts, known, with_step)
        if reached < step:  # it ended early
            break
    train(settings.steps)


def _settings(run: Run) -> JsonObject:
    """What decides the numbers of a mark."""
    return {name: getattr(run.job.evaluation, name) for name in ("tokens", "sequence_length", "precision", *ALONG)}


def _texts(run: Run) -> dict[str, Tokens]:
    """Name -> held-out text: the job's own, and those of `evaluation.texts`, tokenised like it."""
    from nemo_minitron.data import Tokens, build, load_tokenizer

    texts = {run.job.data.name: Tokens(corpora.prefix(run, "test"))}
    tokenizer = load_tokenizer(teacher_folder(run))
    rows = run.open(run.job.teacher).architecture.vocab_size
    for number, source in enumerate(run.job.evaluation.texts, 1):
        texts[source] = build(source, tokenizer, run.folder.texts / str(number), vocab_size=rows)
    return texts


def _known(run: Run, identity: str) -> JsonObject:
    """What was measured before in this training; empty for another one."""
    if run.folder.trajectory.is_file():
        known = read_json(run.folder.trajectory, "the trajectory", TRAJECTORY)
        if known["identity"] == identity:
            return known
    return {"identity": identity, "teacher": [], "rows": [], "tasks": []}


def _measure(run: Run, student: ModelSource, texts: dict[str, Tokens], known: JsonObject, mark: JsonObject) -> None:
    folder = run.folder.along if mark["step"] else run.folder.pruned
    try:
        if mark["step"]:
            shutil.rmtree(folder, ignore_errors=True)
            export_student(run.folder.distilled, student, folder)
        known["rows"] += [mark | _losses(run, folder, name, text) for name, text in texts.items()]
        known["tasks"] += [mark | row for row in _tasks(run, folder)]
    finally:
        shutil.rmtree(run.folder.along, ignore_errors=True)
    known["rows"].sort(key=lambda row: row["step"])
    write_json(run.folder.trajectory, known)
    losses = ", ".join(f"{row['loss']:.4f} on {row['text']}" for row in known["rows"] if row["step"] == mark["step"])
    run.say(f"    after {mark['tokens']:,} tokens: held-out loss {losses}")


def _losses(run: Run, folder: Path, name: str, text: Tokens) -> JsonObject:
    numbers = measured(folder, text, run.job.evaluation, run.progress)
    assert numbers.windows is not None  # `evaluate` always gives them
    losses = numbers.windows.losses_N.tolist()
    return {"text": name, "loss": numbers.loss, "loss_error": numbers.loss_error, "losses": losses}


def _tasks(run: Run, folder: Path) -> list[JsonObject]:
    """lm-eval's metrics, each with its standard error if it has one."""
    settings = run.job.evaluation
    if not settings.every_benchmarks:
        return []
    from nemo_minitron.evaluation import run_tasks

    found = run_tasks(folder, settings.every_benchmarks, precision=settings.precision, batch_size=settings.batch_size)
    return [
        {"task": task, "metric": metric, "value": value, "error": row.get(metric.replace(",", "_stderr,"))}
        for task, row in found.items()
        for metric, value in row.items()
        if "," in metric and "_stderr" not in metric
    ]
