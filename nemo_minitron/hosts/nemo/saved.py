"""The checkpoints of a training: which of them are complete after a kill while one was saved or removed."""

from __future__ import annotations

import json
import re
import shutil
import zipfile
from pathlib import Path

from nemo_minitron.errors import InputError
from nemo_minitron.hosts.saved import cut_short, keep_newest

_LAST = re.compile(r"step=(\d+)-last")
UNFINISHED = "-unfinished"  # NeMo's mark beside a checkpoint that it saves or removes; NeMo does not resume with it


def keep_whole(folder: Path) -> tuple[dict[int, Path], list[str]]:
    """Removes all checkpoints but the newest complete one, as `hosts.protocol.Host.keep_whole` says.

    NeMo resumes from the checkpoint that was changed last. After a kill that may be one that was half-removed.
    """
    for marker in folder.glob(f"*{UNFINISHED}"):
        shutil.rmtree(folder / marker.name.removesuffix(UNFINISHED), ignore_errors=True)
        marker.unlink()
    # NeMo counts steps from 0: the checkpoint `step=9-last` has done ten.
    steps = {int(match[1]) + 1: path for path in folder.iterdir() if (match := _LAST.fullmatch(path.name))}
    return keep_newest(steps, damage)


def damage(checkpoint: Path) -> str:
    """What is wrong with a NeMo checkpoint, in words; empty if it is complete."""
    weights = checkpoint / "weights"
    try:
        if name := cut_short(weights):
            return f"weights/{name} is gone or cut short"
        for record in (weights / "metadata.json", checkpoint / "context" / "io.json"):
            json.loads(record.read_text())
        return "" if zipfile.is_zipfile(weights / "common.pt") else "weights/common.pt is gone or cut short"
    except (InputError, OSError, ValueError, AttributeError, TypeError) as error:
        return str(error)
