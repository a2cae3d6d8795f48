"""One candidate of a search: its student, cut when it is asked for, and its loss on held-out text, measured once."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.artifacts.files import digest_of, write_json
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.parse import Kind, anything, mapped, number
from nemo_minitron.artifacts.records import read_known
from nemo_minitron.artifacts.seals import damaged, sealed
from nemo_minitron.commands.corpus import corpus_identity
from nemo_minitron.commands.evaluate import measure
from nemo_minitron.errors import InputError
from nemo_minitron.job.run import Run
from nemo_minitron.job.stages import corpora
from nemo_minitron.job.stages.compensate import compensation_of_run, cut_identity
from nemo_minitron.job.teacher import clear_torn, uncut_folder
from nemo_minitron.settings.recipe import Evaluation


def evaluation_of(run: Run) -> Evaluation:
    """How every candidate is measured."""
    return dataclasses.replace(run.job.evaluation, tokens=run.job.search.tokens, prompts=())


def loss_of(run: Run, name: str) -> float:
    """The cut model's loss on held-out text, in nats a token. It is read from its file if it was measured before."""
    from nemo_minitron.data import Tokens

    files, test = run.folder.candidate(name), corpora.prefix(run, "test")
    settings = evaluation_of(run)
    identity = digest_of([identity_of(run, name), dataclasses.asdict(settings), corpus_identity(test)])
    known = known_of(files.numbers, identity, loss=number())
    if known is None:
        known = {"identity": identity, **measure(student_of(run, name), Tokens(test), settings)}
        write_json(files.numbers, known)
    return known["loss"]


def known_of(path: Path, identity: str, **fields: Kind) -> JsonObject | None:
    """The content of a file if it was made from the same things; None for another or a damaged one, which is remade."""
    try:
        return read_known(path, identity, **fields)
    except InputError:
        return None


def plan_of(run: Run, name: str) -> PrunePlan:
    """The candidate's plan. Raises InputError if it is missing or damaged."""
    return PrunePlan.load(run.folder.candidate(name).plan)


def identity_of(run: Run, name: str) -> list[object]:
    """Plain values that decide the candidate's weights."""
    return cut_identity(run.job, run.folder.candidate(name))


def student_of(run: Run, name: str) -> Path:
    """The candidate as a Hugging Face folder. It is cut if the folder is missing, damaged or of another plan."""
    from nemo_minitron.pruning import prune

    files, identity = run.folder.candidate(name), digest_of(identity_of(run, name))
    teacher = run.open(uncut_folder(run))
    known = known_of(files.cut, identity, files=mapped(anything()))
    if known is None or not files.student.is_dir() or damaged(files.student, known["files"]):
        clear_torn(files.student)
        compensation = compensation_of_run(run, teacher, files)
        prune(teacher, plan_of(run, name), files.student, compensation=compensation, overwrite=True)
        write_json(files.cut, {"identity": identity, "files": sealed(files.student, ["."])})
    return files.student
