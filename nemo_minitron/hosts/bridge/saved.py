"""The checkpoints of a training on Bridge: which of them are complete after a kill while one was saved or removed."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path

from nemo_minitron.artifacts.files import atomic_file
from nemo_minitron.errors import InputError
from nemo_minitron.sources.bridge_config import TRACKER, run_config
from nemo_minitron.sources.checkpoint_files import read_metadata

_ITERATION = re.compile(r"iter_(\d{7})")
STATE, LATEST = "train_state.pt", "latest_train_state.pt"  # Bridge's: the state in a checkpoint, and the newest one's


def keep_whole(folder: Path) -> tuple[dict[int, Path], list[str]]:
    """Removes all checkpoints but the newest complete one, as `hosts.protocol.Host.keep_whole` says.

    Bridge resumes from the checkpoint that its tracker names. It is made to name the one that stays.
    """
    steps = {int(match[1]): path for path in folder.iterdir() if (match := _ITERATION.fullmatch(path.name))}
    kept: dict[int, Path] = {}
    lines = []
    for step in sorted(steps, reverse=True):
        if not kept and not (why := damage(steps[step])):
            kept[step] = steps[step]
            continue
        if not kept:
            lines.append(f"the checkpoint {steps[step]} is damaged ({why}); it is removed, and an older one is taken")
        shutil.rmtree(steps[step], ignore_errors=True)
    _track(folder, kept)
    return kept, lines


def _track(folder: Path, kept: dict[int, Path]) -> None:
    """Makes the tracker name the checkpoint that stays."""
    if not kept:
        (folder / TRACKER).unlink(missing_ok=True)
        (folder / LATEST).unlink(missing_ok=True)
        return
    ((step, path),) = kept.items()
    with atomic_file(folder / LATEST) as file:
        shutil.copyfile(path / STATE, file)
    with atomic_file(folder / TRACKER) as file:
        file.write_text(str(step))


def damage(checkpoint: Path) -> str:
    """What is wrong with a checkpoint, in words; empty if it is complete. It checks sizes and not numbers."""
    try:
        ends: dict[str, int] = {}
        for info in read_metadata(checkpoint).storage_data.values():
            ends[info.relative_path] = max(ends.get(info.relative_path, 0), info.offset + info.length)
        for name, end in ends.items():
            if not (checkpoint / name).is_file() or (checkpoint / name).stat().st_size < end:
                return f"{name} is gone or cut short"
        run_config(checkpoint)
        return "" if zipfile.is_zipfile(checkpoint / STATE) else f"{STATE} is gone or cut short"
    except (InputError, OSError, ValueError, AttributeError, TypeError) as error:
        return str(error)
