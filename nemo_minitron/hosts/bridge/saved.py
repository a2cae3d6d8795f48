"""The checkpoints of a training on Bridge: which of them are complete after a kill while one was saved or removed."""

from __future__ import annotations

import re
import shutil
import zipfile
from pathlib import Path

from nemo_minitron.artifacts.files import atomic_file
from nemo_minitron.errors import InputError
from nemo_minitron.hosts.saved import cut_short, keep_newest
from nemo_minitron.sources.bridge_config import TRACKER, run_config

_ITERATION = re.compile(r"iter_(\d{7})")
STATE, LATEST = "train_state.pt", "latest_train_state.pt"  # Bridge's: the state in a checkpoint, and the newest one's


def keep_whole(folder: Path) -> tuple[dict[int, Path], list[str]]:
    """Removes all checkpoints but the newest complete one, as `hosts.protocol.Host.keep_whole` says.

    Bridge resumes from the checkpoint that its tracker names. It is made to name the one that stays.
    """
    steps = {int(match[1]): path for path in folder.iterdir() if (match := _ITERATION.fullmatch(path.name))}
    kept, lines = keep_newest(steps, damage)
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
    """What is wrong with a checkpoint, in words; empty if it is complete."""
    try:
        if name := cut_short(checkpoint):
            return f"{name} is gone or cut short"
        run_config(checkpoint)
        return "" if zipfile.is_zipfile(checkpoint / STATE) else f"{STATE} is gone or cut short"
    except (InputError, OSError, ValueError, AttributeError, TypeError) as error:
        return str(error)
