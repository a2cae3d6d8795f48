"""Runs the stages in order and notes which are finished, so that a run folder is resumed and never begun twice."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from nemo_minitron.artifacts import Manifest
from nemo_minitron.artifacts.files import atomic_file, digest_of, read_json, write_json
from nemo_minitron.artifacts.json_types import JsonObject
from nemo_minitron.artifacts.run_folder import RunFolder
from nemo_minitron.artifacts.seals import take_away
from nemo_minitron.commands.place import check_writable
from nemo_minitron.commands.versions import versions
from nemo_minitron.errors import InputError, visible
from nemo_minitron.families import resolve
from nemo_minitron.launch.lock import LOCK
from nemo_minitron.progress import Progress
from nemo_minitron.settings.recipe import Job
from nemo_minitron.settings.written import as_python, as_yaml
from nemo_minitron.sources.open import open_source
from nemo_minitron.sources.tensors import ModelSource

FREE = ("layout", "gates")  # groups of a recipe that may change when a run is resumed


@dataclasses.dataclass
class Run:
    """A run folder and its job. `opened`: the models that the job only reads, by their path."""

    job: Job
    folder: RunFolder
    manifest: Manifest
    opened: dict[Path, ModelSource] = dataclasses.field(default_factory=dict, repr=False)

    def open(self, model: str | Path) -> ModelSource:
        """A model that the job only reads. It is opened once. Raises InputError as `open_source`."""
        path = resolve(model)
        if path not in self.opened:
            self.opened[path] = open_source(path)
        return self.opened[path]

    def path(self, *parts: str) -> Path:
        """The path of a file in the run folder, under the name that a stage gives it."""
        return self.folder.path.joinpath(*parts)

    def say(self, line: str) -> None:
        """Prints a line and appends it to `log.txt`."""
        print(visible(line), flush=True)
        self.note(line)

    def note(self, line: str) -> None:
        """Appends a line to `log.txt`. On a full disk it does nothing."""
        with contextlib.suppress(OSError), open(self.folder.log, "a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {visible(line)}\n")

    def progress(self, what: str, unit: str, scale: float) -> Progress:
        """The Progress of a part of a stage. Its lines are indented, and `log.txt` has them."""
        return Progress(what, unit, scale, lambda line: self.say(f"    {line}"), lambda line: self.note(f"    {line}"))


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a job. `inputs(run)`: plain values that, with the stages that it comes `after`, decide the result.

    `outputs`: files of the run folder that must exist for the stage to count as finished. `also(run)`: other files or
    whole folders that it leaves. A finished stage is redone if any of them is missing or damaged. `guards`: later
    stages that wait for it, although its result decides nothing in them.
    """

    name: str
    run: Callable[[Run], None]
    inputs: Callable[[Run], object]
    after: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    also: Callable[[Run], Iterable[str]] = lambda run: ()
    guards: tuple[str, ...] = ()

    def left(self, run: Run) -> list[str]:
        """Every file or folder that the stage leaves in the run folder."""
        return [*self.outputs, *self.also(run)]


def check_folder(folder: Path) -> None:
    """Raises InputError for a file, and for a folder that holds anything but a run."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the run folder '{folder}' is a file")
    check_writable(folder)
    names = {path.name for path in folder.iterdir()} - {LOCK} if folder.is_dir() else set()
    if names and RunFolder.recipe not in names:
        raise InputError(f"'{folder}' is not empty and is no run folder; give a new folder with --out")


def check_recipe(job: Job, folder: Path) -> None:
    """Raises InputError for a folder in which another recipe has finished stages: redoing them would remove their
    files. The layout may differ, since a run may resume in another one, and the gates, which decide no other stage."""
    if not used(folder):
        return
    differing = _differing(job.as_dict(), _recipe_of(folder))
    if differing:
        raise InputError(
            f"'{folder}' holds a run of another recipe: {differing[0]}"
            + (f", and {len(differing) - 1} more settings" if len(differing) > 1 else "")
            + "; give another folder with --out, or --overwrite to redo the stages that depend on them"
        )


def used(folder: Path) -> bool:
    """Whether a run folder, or one of a chain's steps in it, has finished stages."""
    manifests = [folder / RunFolder.manifest, *folder.glob(f"*/{RunFolder.manifest}")]
    return any(file.is_file() and Manifest.open(file).stages for file in manifests)


def _recipe_of(folder: Path) -> JsonObject:
    """The recipe that is written in a folder. Settings that an earlier version lacked are at their defaults."""
    written = read_json(folder / RunFolder.recipe, "the recipe")
    try:
        return Job.from_dict(written).as_dict()
    except InputError:  # another version wrote it
        return written if isinstance(written, dict) else {}


def _differing(wanted: object, there: object, name: str = "") -> list[str]:
    """The settings that differ, a sentence each."""
    if isinstance(wanted, dict) and isinstance(there, dict):
        names = [key for key in wanted | there if f"{name}{key}" not in FREE]
        groups = [_differing(wanted.get(key), there.get(key), f"{name}{key}.") for key in names]
        return [line for lines in groups for line in lines]
    if isinstance(wanted, list) and isinstance(there, list) and len(wanted) == len(there):
        pairs = enumerate(zip(wanted, there, strict=True))
        return [line for number, pair in pairs for line in _differing(*pair, f"{name}{number}.")]
    same = json.dumps(wanted) == json.dumps(there) or _one_place(wanted, there)
    return [] if same else [f"{name.rstrip('.')} is {_short(there)} there and {_short(wanted)} here"]


def _one_place(one: object, other: object) -> bool:
    """Whether two texts are paths of the same file or folder, one of them relative and the other absolute."""
    if not (isinstance(one, str) and isinstance(other, str)):
        return False
    return Path(one).exists() and Path(one).resolve() == Path(other).resolve()


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def open_run(job: Job, folder: str | Path) -> Run:
    """Creates or reopens a run folder, whose lock (`locked`) the caller holds. Raises InputError as `check_folder`."""
    files = RunFolder(folder)
    check_folder(files.path)
    files.path.mkdir(parents=True, exist_ok=True)
    write_recipe(files, job)
    run = Run(job, files, Manifest.open(files.manifest))
    run.manifest.versions = versions()
    return run


def write_recipe(files: RunFolder, job: Job) -> None:
    """Writes the recipe with all settings as JSON, and what a user reads and changes as YAML and Python."""
    write_json(files.recipe, job.as_dict())
    for file, text in ((files.recipe_yaml, as_yaml(job)), (files.recipe_python, as_python(job))):
        with atomic_file(file) as partial:
            partial.write_text(text, encoding="utf-8")


def _forget(run: Run, stage: Stage, stages: Sequence[Stage]) -> None:
    """Strikes a stage that is redone, and all stages that depend on it, from the manifest: their files become stale."""
    stale = {stage.name}
    for later in stages:
        if stale & set(later.after):
            stale.add(later.name)
    run.manifest.strike(stale)


def _done(run: Run, stage: Stage, digest: str, title: str) -> bool:
    """Whether a stage was finished from the same inputs and its files are whole. Prints which files are not."""
    if not run.manifest.done(stage.name, digest):
        return False
    wrong = run.manifest.damaged(stage.name, stage.outputs)
    for name, why in wrong.items():
        run.say(f"{title}: done before, but {run.path(name)} {why}")
    take_away(run.folder.path, wrong)
    if not wrong and not run.manifest.knows(stage.name, stage.outputs):  # a version that sealed no files finished it
        run.manifest.seal(stage.name, stage.left(run))
        run.manifest.save()
    return not wrong


def _needed(stages: Sequence[Stage], until: str) -> list[Stage]:
    """The stage `until`, the stages that it depends on and those that guard them, in order; all stages if `until` is
    empty."""
    if not until:
        return list(stages)
    names = {until}
    for stage in reversed(stages):
        if stage.name in names or not names.isdisjoint(stage.guards):
            names.add(stage.name)
            names.update(stage.after)
    return [stage for stage in stages if stage.name in names]


def execute(run: Run, stages: Sequence[Stage], until: str = "") -> None:
    """Runs the unfinished stages in order, as far as stage `until`. The manifest notes each one that finishes."""
    digests: dict[str, str] = {}
    needed = _needed(stages, until)
    for number, stage in enumerate(needed, 1):
        # The digest of a stage contains those before it, so that a change redoes everything that depends on it.
        upstream = [digests[name] for name in stage.after]
        digests[stage.name] = digest_of([stage.name, stage.inputs(run), upstream])
        title = f"[{number}/{len(needed)}] {stage.name}"
        if _done(run, stage, digests[stage.name], title):
            run.say(f"{title}: done before, skipped")
            continue
        _forget(run, stage, stages)  # before the run: a kill must not leave new files under an old note
        run.say(f"{title} ...")
        start = time.perf_counter()
        stage.run(run)
        seconds = time.perf_counter() - start
        run.manifest.finish(stage.name, seconds, digests[stage.name], stage.left(run))
        run.say(f"{title}: {seconds:.1f} s")
