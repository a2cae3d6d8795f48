"""Measures the check of all stages in a finished run: `minitron compress` again, with and without it.

    python benchmarks/resume.py RUN RECIPE --student 0.5 [--before CHECKOUT]

RUN is a finished run folder of RECIPE. It is copied, and its weights are enlarged: the pruned and the random student
and the student to `--student` GB each, and the training's checkpoint to seven times that. The manifest's seals of the
copy are made again. It measures the seconds of the whole command, of the check alone with all files in the page cache
and with none, and of sealing the student (sizes, digest, and the wait for the disk). CHECKOUT: another version, whose
command is timed on the same folder in turn.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common

from nemo_minitron.artifacts import Manifest

BLOCK = 1 << 20


def enlarge(file: Path, size: int) -> None:
    """Enlarges the file to `size` with random bytes, which a file system cannot compress."""
    block = os.urandom(BLOCK)
    with open(file, "r+b") as stream:
        stream.seek(0, os.SEEK_END)
        while stream.tell() < size:
            stream.write(block[: size - stream.tell()])


def enlarged(run: Path, size: int) -> None:
    for folder in ("checkpoints/pruned", "checkpoints/random", "student"):
        enlarge(run / folder / "model.safetensors", size)
    chunk = max((run / "checkpoints" / "distilled").rglob("*.distcp"), key=lambda file: file.stat().st_size)
    enlarge(chunk, 7 * size)
    manifest = Manifest.open(run / "manifest.json")
    for name in [stage["name"] for stage in manifest.stages]:
        manifest.seal(name, [path for path, entry in manifest.files.items() if entry["stage"] == name])
    manifest.save()


def timed(work: Callable[[], object]) -> dict[str, float]:
    """Wall seconds, and processor seconds of this process and of its children."""
    start, before = time.perf_counter(), os.times()
    work()
    wall, after = time.perf_counter() - start, os.times()
    return {"wall": wall, "processor": sum(after[:4]) - sum(before[:4])}


def summed(runs: list[dict[str, float]]) -> dict[str, list[float]]:
    """Clock -> [median, least, most]."""
    clocks = {clock: [each[clock] for each in runs] for clock in runs[0]}
    return {clock: [round(f(all_), 3) for f in (statistics.median, min, max)] for clock, all_ in clocks.items()}


def out_of_cache(folder: Path) -> None:
    for file in filter(Path.is_file, folder.rglob("*")):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def again(run: Path, recipe: Path, checkout: Path) -> None:
    """Runs the command, which finds everything done."""
    command = [sys.executable, "-m", "nemo_minitron.cli", "compress", recipe.name, "--out", str(run)]
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    done = subprocess.run(command, cwd=recipe.parent, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.count("done before, skipped") == 10, done.stdout


def measured(run: Path, recipe: Path, before: Path | None, repeat: int) -> dict[str, Any]:
    manifest = Manifest.open(run / "manifest.json")

    def check() -> None:
        assert not any(manifest.damaged(stage["name"]) for stage in manifest.stages)

    cold = []
    for _ in range(repeat):
        out_of_cache(run)
        cold.append(timed(check))
    warm = [timed(check) for _ in range(repeat)]
    sealing = timed(lambda: manifest.seal("export", ["student"]))
    versions = {"after": common.ROOT} | ({"before": before} if before else {})
    commands: dict[str, list[dict[str, float]]] = {name: [] for name in versions}
    for _ in range(repeat):
        for name, checkout in versions.items():
            commands[name].append(timed(functools.partial(again, run, recipe, checkout)))
    return {
        "files": len(manifest.files), "gigabytes": sum(entry["bytes"] for entry in manifest.files.values()) / 1e9,
        "the check alone, page cache": summed(warm),
        "the check alone, from the disk": summed(cold),
        "sealing the student again, on the disk already": sealing,
        "the command": {name: summed(each) for name, each in commands.items()},
    }  # fmt: skip


def main() -> None:
    parser = common.parser(__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--student", type=float, default=0.5, help="gigabytes")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--before", type=Path, help="a checkout of another version")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.run.parent) as folder:
        run = Path(folder) / "run"
        shutil.copytree(arguments.run, run)
        enlarged(run, int(arguments.student * 1e9))
        seconds = measured(run.resolve(), arguments.recipe.resolve(), arguments.before, arguments.repeat)
    result = common.heading(("numpy",)) | {"student gigabytes": arguments.student, "seconds": seconds}
    print(json.dumps(result, indent=1))
    common.write(result, common.dated("resume"))


if __name__ == "__main__":
    main()
