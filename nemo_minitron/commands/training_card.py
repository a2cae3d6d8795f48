"""The card and the figures of a student that `minitron distill` trained by itself, without a job around it."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.artifacts.records import read_curve
from nemo_minitron.artifacts.run_folder import TrainingFolder
from nemo_minitron.commands.versions import versions
from nemo_minitron.families import from_hf
from nemo_minitron.pruning.cut import PLAN
from nemo_minitron.settings.recipe import Distillation
from nemo_minitron.sources.tensors import ModelSource

if TYPE_CHECKING:
    from nemo_minitron.export.run import RunFiles

SHOWN = ("loss", "steps", "precision", "learning_rate")


def write_training_card(
    out: Path, student: str, teacher: str | None, taught: ModelSource | None, data: str, recipe: Distillation
) -> None:
    """Writes README.md and figures/ into the student's folder `out`. `taught`: the opened teacher; None: the student
    learned from a cache, and the card compares it with the model of its plan, or with itself."""
    from nemo_minitron.export import CardFacts, write_card, write_card_figures
    from nemo_minitron.export.folder import dtype_of, has_chat_template

    plan = PrunePlan.load(out / PLAN) if (out / PLAN).is_file() else None
    target, base = from_hf(out), teacher or student
    tokens = recipe.steps * recipe.tokens_per_step
    limits = ["It was not evaluated by the command that made it."]
    if taught and (theirs := taught.architecture.vocab_size) != target.vocab_size:
        limits.append(f"It learned the {min(theirs, target.vocab_size):,} tokens that its teacher has, too.")
    facts = CardFacts(
        name=out.resolve().name,
        base_model=Path(base).name if Path(base).exists() else base,
        base_folder=taught.folder if taught else None,
        source=taught.architecture if taught else plan.source if plan else target,
        target=target,
        plan_digest=plan.digest if plan else "",
        dtype=dtype_of(out),
        chats=has_chat_template(out),
        figures=write_card_figures(out, _records(out, recipe)),
        command=_command(out, student, teacher, data, recipe, tokens),
        data=[{"name": data, "license": "unknown", "use": "distillation"}],
        distillation={"tokens": tokens, **{name: getattr(recipe, name) for name in SHOWN}},
        versions=versions(),
        language=None,
        limits=limits,
    )
    write_card(out, facts)


def _records(out: Path, recipe: Distillation) -> RunFiles:
    """What a figure reads of a training: its losses, on the text and on held-out text."""
    from nemo_minitron.export.run import RunFiles

    files, keys = TrainingFolder(out), ("step", "tokens", "loss")
    curve, validation = (read_curve(f, keys) if f.is_file() else [] for f in (files.losses, files.validation))
    return RunFiles(out, recipe={"distillation": {"loss": recipe.loss}}, curve=curve, validation=validation)


def _command(out: Path, student: str, teacher: str | None, data: str, recipe: Distillation, tokens: int) -> str:
    taught = ["--teacher", teacher] if teacher else ["--teacher-cache", recipe.teacher_cache]
    words = ["minitron", "distill", student, *taught, "--data", data, "--tokens", str(tokens), "--out", str(out)]
    return shlex.join(words)
