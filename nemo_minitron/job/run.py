"""The order of the stages, and which of them are done: a run folder is resumed, never begun twice."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from nemo_minitron.artifacts import Manifest
from nemo_minitron.artifacts.files import digest_of, write_json
from nemo_minitron.errors import InputError, visible
from nemo_minitron.job.processes.lock import LOCK
from nemo_minitron.job.settings.recipe import Job

PACKAGES = ("nemo_minitron", "nemo_toolkit", "megatron-core", "transformer-engine", "torch", "transformers")


@dataclasses.dataclass
class Run:
    """A run folder and its job. `say` prints a line and writes it to `log.txt`."""

    job: Job
    folder: Path
    manifest: Manifest

    def path(self, *parts: str) -> Path:
        return self.folder.joinpath(*parts)

    def say(self, line: str) -> None:
        line = visible(line)
        print(line, flush=True)
        with open(self.path("log.txt"), "a") as log:
            log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


@dataclasses.dataclass(frozen=True)
class Stage:
    """`inputs(run)`: plain values that decide the result, besides the stages it comes `after`.

    `outputs`: files in the run folder that must be there for the stage to count as done.
    """

    name: str
    run: Callable[[Run], None]
    inputs: Callable[[Run], Any]
    after: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()


def check_folder(folder: Path) -> None:
    """Raises InputError for a folder that holds something else than a run."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"the run folder '{folder}' is a file")
    held = {path.name for path in folder.iterdir()} - {LOCK} if folder.is_dir() else set()
    if held and "recipe.json" not in held:
        raise InputError(f"'{folder}' is not empty and is no run folder; give a new folder with --out")


def open_run(job: Job, folder: str | Path) -> Run:
    """Creates or reopens a run folder, which the caller holds (`locked`). Raises InputError as `check_folder`."""
    folder = Path(folder)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "recipe.json", job.as_dict())
    run = Run(job, folder, Manifest.open(folder / "manifest.json"))
    run.manifest.versions = versions()
    return run


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _forget(run: Run, stage: Stage, stages: Sequence[Stage]) -> None:
    """Strikes out a stage that is done again, and all that rests on it: their files are about to be stale."""
    stale = {stage.name}
    for later in stages:
        if stale & set(later.after):
            stale.add(later.name)
    run.manifest.stages = [entry for entry in run.manifest.stages if entry["name"] not in stale]
    run.manifest.save()


def _needed(stages: Sequence[Stage], until: str) -> list[Stage]:
    """A stage and those that it rests on, in order; all of them where it is not named."""
    if not until:
        return list(stages)
    names = {until}
    for stage in reversed(stages):
        if stage.name in names:
            names.update(stage.after)
    return [stage for stage in stages if stage.name in names]


def execute(run: Run, stages: Sequence[Stage], until: str = "") -> None:
    """Runs what is not done yet, in order, as far as stage `until`; each is written down as it finishes."""
    digests: dict[str, str] = {}
    wanted = _needed(stages, until)
    for number, stage in enumerate(wanted, 1):
        upstream = [digests[name] for name in stage.after]
        digests[stage.name] = digest_of([stage.name, stage.inputs(run), upstream])
        title = f"[{number}/{len(wanted)}] {stage.name}"
        there = all(run.path(output).exists() for output in stage.outputs)
        if there and run.manifest.done(stage.name, digests[stage.name]):
            run.say(f"{title}: done before, skipped")
            continue
        _forget(run, stage, stages)
        run.say(f"{title} ...")
        start = time.perf_counter()
        stage.run(run)
        seconds = time.perf_counter() - start
        run.manifest.finish(stage.name, seconds, digests[stage.name])
        run.say(f"{title}: {seconds:.1f} s")
