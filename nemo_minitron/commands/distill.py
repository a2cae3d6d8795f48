"""A student, its teacher and a corpus -> the distilled student."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

from nemo_minitron.artifacts import PrunePlan
from nemo_minitron.artifacts.files import atomic_folder, digest_of, read_json, write_json
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.logit_cache import CacheHeader
from nemo_minitron.artifacts.parse import anything, mapped
from nemo_minitron.artifacts.records import LAST, read_mark
from nemo_minitron.artifacts.run_folder import TrainingFolder
from nemo_minitron.artifacts.seals import damaged, sealed, take_away
from nemo_minitron.commands.cache import check_cache
from nemo_minitron.commands.corpus import begin, corpus_identity, positions_of, say, tokenise
from nemo_minitron.commands.place import check_writable, working
from nemo_minitron.commands.same_host import begin_on_this_host
from nemo_minitron.commands.training_card import write_training_card
from nemo_minitron.commands.vocabularies import shared_vocabulary
from nemo_minitron.distillation.layer_map import layer_map
from nemo_minitron.errors import InputError
from nemo_minitron.families import resolve, written_config
from nemo_minitron.families.side_files import RECORDS, SETTINGS, TERMS, TOKENIZER, copy_side_files
from nemo_minitron.hosts import check_model, host_of
from nemo_minitron.launch.torchrun import launch
from nemo_minitron.progress import Progress
from nemo_minitron.pruning.convert import identity
from nemo_minitron.settings.derive import Fit
from nemo_minitron.settings.fp8 import check_fp8
from nemo_minitron.settings.layout import Layout
from nemo_minitron.settings.orders import DistillOrder
from nemo_minitron.settings.recipe import Distillation
from nemo_minitron.sources.tensors import ModelSource

TRAINED = "minitron_training.json"  # in a student's folder: the digest of the training that made it


def run_training(
    student: ModelSource, teacher: ModelSource | None, prefixes: tuple[Path, Path], out: Path, recipe: Distillation,
    layout: Layout, log: Path | None = None, stop: int | None = None, plan: Path | None = None,
) -> None:  # fmt: skip
    """Distils into `out` (a host's run with `last.json` and `loss.csv`). A run of other settings there starts over.

    `prefixes`: the .bin/.idx prefixes of the training and validation text. `stop`: the step after which this call ends,
    at a checkpoint; a call with a later one resumes. `plan`: the plan that made the student. `teacher` may be None if
    the recipe has a cache; else the cache must be of this teacher. Raises InputError for a cache of anything else, and
    RuntimeError if a process fails.
    """
    identity = training_identity(student, teacher, prefixes, recipe, plan)
    files = TrainingFolder(out)
    if out.exists() and not made_with(files.settings, identity):
        shutil.rmtree(out)
    begin_on_this_host(out)
    write_json(files.settings, identity)
    if finished(out, stop or recipe.steps):
        return
    taught = teacher.path if teacher else None
    if recipe.correction_tokens and teacher:
        taught = _corrected(teacher, prefixes, files.teacher, recipe.correction(), layout, log)
    common = shared_vocabulary(student, teacher).tokens if teacher and recipe.learns_from_teacher else None
    order = DistillOrder(student.path, taught, *prefixes, out, files.index, recipe, layout, stop, plan, common)
    files.whole.unlink(missing_ok=True)  # its seals are those of checkpoints that the training replaces
    try:
        launch(order, host_of().worker, log)
    except RuntimeError:
        _saved(out)  # half a checkpoint, after a full disk, would take the space of the next one
        raise
    write_json(files.whole, sealed(out, left_by_training(out)))


def training_identity(
    student: ModelSource, teacher: ModelSource | None, prefixes: tuple[Path, Path], recipe: Distillation,
    plan: Path | None = None,
) -> str:  # fmt: skip
    """A digest of everything that decides a training's result. Arguments and refusals are those of `run_training`."""
    models = [student.identity, _learned(teacher, recipe, prefixes[0], student)]
    # Without validations the second text is not read, so another one does not start the training over.
    texts = [corpus_identity(prefix) for prefix in prefixes[: 2 if recipe.validate_every else 1]]
    cut = read_json(plan, "the plan") if plan and recipe.intermediate else None
    # The path of a cache plays no part: its content is among `models`.
    return digest_of([dataclasses.asdict(dataclasses.replace(recipe, teacher_cache="")), models, texts, cut])


def made_with(mark: Path, identity: str) -> bool:
    """Whether a training was begun with these settings, by the file `mark` in its folder."""
    try:
        return mark.is_file() and read_mark(mark) == identity
    except InputError:
        return False


def _learned(teacher: ModelSource | None, recipe: Distillation, train: Path, student: ModelSource) -> object:
    """Identity of what the student learns from: the teacher, or a cache. Raises InputError for a cache that does not
    fit."""
    if recipe.teacher_cache:
        recipe.check_cache(student.architecture.vocab_size)
        return check_cache(Path(recipe.teacher_cache), train, teacher).digest
    if teacher is None:
        raise InputError("there is nothing to learn from; give --teacher or --teacher-cache")
    return teacher.identity


def _corrected(
    teacher: ModelSource, prefixes: tuple[Path, Path], out: Path, recipe: Distillation, layout: Layout, log: Path | None
) -> Path:
    """Teacher correction: trains the teacher on the data with the LM loss. Gives its checkpoint."""
    from nemo_minitron.sources.checkpoint import last_checkpoint

    even = dataclasses.replace(layout, first_stage=0, last_stage=0)  # first_stage and last_stage are the student's
    layout_of_teacher = even.for_depth(teacher.architecture.num_layers)
    run_training(teacher, teacher, prefixes, out, recipe, layout_of_teacher, log)
    return last_checkpoint(out)


def finished(out: Path, steps: int) -> bool:
    """Whether a training has a whole checkpoint of `steps` steps, or of fewer if it ended early. A checkpoint that a
    kill left half saved or half removed is cleared, so that the next call resumes from the one before."""
    mark = TrainingFolder(out).last
    noted = _noted(mark)
    saved = {step: str(path.relative_to(out)) for step, path in _saved(out).items()}
    if "stopped" in noted and noted.get("checkpoint") in saved.values():
        return True
    last = max(saved, default=0)
    if last < steps:
        mark.unlink(missing_ok=True)
        return False
    record = {"checkpoint": saved[last]}
    if noted != record:
        write_json(mark, record)
    return True


def trained_steps(out: Path) -> int:
    """The steps of the newest whole checkpoint of a training; 0 if there is none."""
    return max(_saved(out), default=0)


def _noted(mark: Path) -> JsonObject:
    """The record of the last checkpoint; empty if it is missing or damaged."""
    try:
        kind = LAST if mark.name == TrainingFolder.last else mapped(anything())
        return read_json(mark, "the record of the last checkpoint", kind) if mark.is_file() else {}
    except InputError:
        return {}


def _saved(out: Path) -> dict[int, Path]:
    """Step -> checkpoint of a training, for the whole ones. Damaged ones are removed, and a line says so."""
    folder = out / host_of().checkpoints
    if not folder.is_dir():
        return {}
    seals = _noted(TrainingFolder(out).whole).items()
    wrong = damaged(out, {name: seal for name, seal in seals if _of_checkpoint(out, name)})
    take_away(out, wrong)
    kept, lines = host_of().keep_whole(folder)
    for line in [*(f"{out / name} {why}" for name, why in wrong.items()), *lines]:
        print(f"    {line}", flush=True)
    return kept


def _of_checkpoint(out: Path, name: str) -> bool:
    """Whether a file belongs to an existing checkpoint: the training removes earlier ones as it proceeds."""
    parts = Path(name).parts
    return parts[:2] == Path(host_of().checkpoints).parts and out.joinpath(*parts[:3]).is_dir()


def left_by_training(out: Path) -> list[str]:
    """The files of a finished training that count: its last checkpoint and its records, relative to `out`."""
    checkpoint, names = _noted(TrainingFolder(out).last).get("checkpoint"), TrainingFolder
    return [names.last, names.losses, names.validation, *([checkpoint] if checkpoint else [])]


def run_distill(
    student: str, teacher: str | None, data: str, out: Path, recipe: Distillation, layout: Layout, *,
    validation: str | None = None, plan: Path | None = None, skip_bad_lines: bool = False,
) -> Distillation:  # fmt: skip
    """`minitron distill`: a Hugging Face folder -> a distilled one, `out`, with `loss.csv` beside its files. Returns
    the settings of the training, some of which may be derived. Raises InputError for what cannot run, and RuntimeError
    if a process fails."""
    from nemo_minitron.pruning import HFSource
    from nemo_minitron.sources.open import open_source

    if teacher is None and not recipe.teacher_cache:
        raise InputError("there is nothing to learn from; give --teacher or --teacher-cache")
    source, teacher_folder = resolve(student), resolve(teacher) if teacher else None
    check_out(out, (source, teacher_folder) if teacher_folder else (source,))
    if recipe.validate_every and not validation:
        raise InputError(f"validate_every={recipe.validate_every} needs held-out text; give it with --validation")
    base, taught = HFSource(source), open_source(teacher_folder) if teacher_folder else None
    opened: list[ModelSource] = [base, *([taught] if taught else [])]
    for model in opened:
        check_model(model.config, "distill")
    models = [model.architecture for model in opened]
    fit = Fit(recipe, layout)
    if recipe.teacher_cache:
        cache = CacheHeader.load(recipe.teacher_cache)
        fit.exactly(cache.settings.sequence_length, "the cache's rows have this length")
    fit.model(positions_of(*(model.config for model in opened)))
    recipe = fit.settings
    if recipe.learns_from_teacher and taught:
        say(shared_vocabulary(base, taught).remark)
    for architecture in models if not recipe.teacher_cache else models[:1]:
        layout.for_depth(architecture.num_layers).check(architecture, training=True)
    depth = models[0].num_layers
    recipe.check_mixture(models[0])
    recipe.check_cache(models[0].vocab_size)
    if recipe.intermediate:
        kept = PrunePlan.load(plan).keep.get("layers") if plan else None
        layer_map(recipe.intermediate, depth, models[1].num_layers, kept)
    layout.check_sequence(recipe.sequence_length)
    recipe.check_tokens(layout)
    recipe.check_batch(layout)
    check_fp8(models[0], layout, recipe.precision)
    if recipe.learns_from_teacher and taught:
        check_fp8(taught.architecture, layout, recipe.teacher_precision or recipe.precision)
    if recipe.tokens == Distillation.tokens:
        say(f"the student is trained on {recipe.tokens:,} tokens; --tokens gives another number")
    begin(f"distilling {student} on {data}")
    with working(out) as work:
        rows = models[0].vocab_size
        train = tokenise(data, source, work / "train", rows, skip_bad_lines)
        held_out = train
        if validation:
            held_out = tokenise(validation, source, work / "validation", rows, skip_bad_lines)
        if not recipe.teacher_cache:
            fit.text(train, held_out)
        say(fit.remark)
        prefixes, training = (train.prefix, held_out.prefix), work / "training"
        identity = training_identity(base, taught, prefixes, fit.settings, plan)
        if trained_before(out, identity):
            return fit.settings
        run_training(
            base, taught, prefixes, training, fit.settings, layout.for_depth(depth), work / "log.txt", plan=plan
        )
        export_student(training, base, out, identity)
        write_training_card(out, student, teacher, taught, data, fit.settings)
    return fit.settings


def trained_before(out: Path, identity: str) -> bool:
    """Whether a whole student of the same training lies in `out`. It then says so."""
    if not made_with(out / TRAINED, identity):
        return False
    say(f"'{out}' was made by the same training before; nothing is trained")
    return True


def check_out(out: Path, inputs: tuple[Path, ...]) -> None:
    """Raises InputError for a folder that holds anything but a distilled student, which is never replaced, and for one
    of the `inputs`."""
    check_writable(out)
    if any(out.resolve() == path.resolve() for path in inputs):
        raise InputError(f"'{out}' is also the student or the teacher; give another folder with --out")
    if out.is_dir() and any(out.iterdir()) and not TrainingFolder(out).losses.is_file():
        raise InputError(f"'{out}' is not empty and holds no distilled student; give a new folder with --out")
    if out.is_file():
        raise InputError(f"'{out}' is a file; give a new folder with --out")


def export_student(training: Path, base: ModelSource, out: Path, identity_of_training: str = "") -> Path:
    """The last checkpoint of a training -> a Hugging Face folder `out` like that of `base`, with the new weights.

    Weights keep the dtype that `base` stores, so that the folder agrees with its config. `identity_of_training`: the
    digest that `trained_before` finds again.
    """
    from nemo_minitron.export import finish_folder
    from nemo_minitron.pruning.write import write_weights
    from nemo_minitron.sources.checkpoint import CheckpointSource, last_checkpoint
    from nemo_minitron.sources.converted import Converted

    source = Converted(CheckpointSource(last_checkpoint(training)), base)
    with atomic_folder(out, durable=True) as folder, Progress("export: MB", "MB") as progress:
        copy_side_files(base.folder, folder, TOKENIZER, SETTINGS, TERMS, RECORDS)
        write_json(folder / "config.json", written_config(base.config))
        write_weights(source, identity(base.architecture), folder, base.config, progress=progress)
        finish_folder(folder, base_folder=base.folder)
        for record in (TrainingFolder(training).losses, TrainingFolder(training).validation):
            if record.exists():
                shutil.copy2(record, folder / record.name)
        if identity_of_training:
            write_json(folder / TRAINED, identity_of_training)
    return out
